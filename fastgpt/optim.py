"""AdamW with decay on matrices only, and the learning-rate schedule."""

import math
from typing import Any

import torch

from fastgpt.model import GPT
from fastgpt.recipes import Recipe


def make_optimizer(model: GPT, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused, for `model`."""
    groups = parameter_groups(model, recipe.weight_decay)
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters for AdamW: decay pulls on matrices and embeddings, not biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of step `step` (from 0): a linear warm-up, then half a cosine to `min_lr`."""
    lowest = recipe.lr / 10 if recipe.min_lr is None else recipe.min_lr
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
    span = max(1, recipe.max_steps - recipe.warmup_steps)
    progress = min(1.0, (step - recipe.warmup_steps) / span)
    return lowest + (recipe.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))
