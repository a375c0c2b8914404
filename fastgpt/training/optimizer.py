"""What happens to the weights after a backward: the schedule, AdamW, loss scaling, averaging."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.model import GPT
from fastgpt.training.fused_adamw import FusedAdamW
from fastgpt.training.recipes import Recipe


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused, for `model`.

    For whole fp32 parameters on a CPU, or where the Triton kernels compute, it is `FusedAdamW`,
    which clips on its way.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    betas = (recipe.beta1, recipe.beta2)
    if all(_is_plain(p) for group in groups for p in group["params"]) and _has_fused(model, recipe):
        return FusedAdamW(groups, recipe.lr, betas, max_norm=recipe.grad_clip or None)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters for AdamW: decay pulls on matrices and embeddings, not biases and norms.

    Frozen ones are in neither group.
    """
    parameters = list(trainable(model).values())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of step `step` (from 0): a linear warm-up, then the recipe's schedule."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
    lowest = recipe.lr / 10 if recipe.min_lr is None else recipe.min_lr
    span = max(1, recipe.max_steps - recipe.warmup_steps)
    progress = min(1.0, (step - recipe.warmup_steps) / span)
    return lowest + (recipe.lr - lowest) * _height(progress, span, recipe)


def _height(progress: float, span: int, recipe: Recipe) -> float:
    """Return where between its end (0) and its peak (1) the rate is; `progress`: since warm-up."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "linear":
        return 1.0 - progress
    if recipe.schedule == "wsd":  # Hu et al. 2024, arXiv:2404.06395; the decay a line, as in
        decay = min(1.0, recipe.decay_fraction * recipe.max_steps / span)  # arXiv:2405.18392
        return min(1.0, (1.0 - progress) / decay)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _is_plain(parameter: Tensor) -> bool:
    """Whether a parameter is fp32 and not spread over processes."""
    return not hasattr(parameter, "full_tensor") and parameter.dtype == torch.float32


def _has_fused(model: torch.nn.Module, recipe: Recipe) -> bool:
    """Whether `FusedAdamW` computes where the model is, with what the recipe wants to compute."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return ops.check_device(recipe.ops, device) == "triton"
    return device.type == "cpu"


class Updater:
    """Applies a step's gradients: unscaled, checked, clipped, then AdamW and the average.

    Nothing waits for the device: an update whose gradient norm is not finite is left out on the
    device itself, and `skipped` counts, there too, how many were left out in a row. With
    `recipe.ema` the averaged weights are in `average`, by parameter name.
    """

    def __init__(self, model: GPT, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model, self.recipe = model, recipe
        parameters = trainable(model)
        self.parameters = list(parameters.values())
        self.optimizer = make_optimizer(model, recipe)
        self.scale = LossScale(model.device) if dtype == torch.float16 else None
        self.skipped = torch.zeros((), device=model.device)
        self.average: dict[str, Tensor] = {}
        if recipe.ema:
            self.average = {name: p.detach().clone() for name, p in parameters.items()}

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to take the gradient of."""
        return loss if self.scale is None else loss * self.scale.factor

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Update the weights at a rate, and drop the gradients; return their norm (a scalar)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip_and_update([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.zero_grad()
        unusable = (~norm.isfinite()).float()
        self.skipped = (self.skipped + 1) * unusable
        if self.scale is not None:
            self.scale.update(unusable)
        if self.average:
            averages = list(self.average.values())
            weights = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(averages, weights, 1.0 - self.recipe.ema)
        return norm

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights and their average; nothing happens without one."""
        for name, average in self.average.items():
            parameter = self.model.get_parameter(name)
            kept = parameter.clone()  # one at a time: there may be no room for all
            parameter.copy_(average)
            average.copy_(kept)

    @property
    def patience(self) -> int:
        """How many updates in a row may be left out; float16 starts with a scale that overflows."""
        return self.recipe.max_skipped + (LossScale.HALVINGS if self.scale else 0)

    def extra_state(self) -> dict[str, float]:
        """Return what a checkpoint must hold besides tensors."""
        state = {"skipped": self.skipped.item()}
        return state if self.scale is None else state | self.scale.state()

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        self.skipped.fill_(float(state.get("skipped", 0.0)))
        if self.scale is not None and "loss_scale" in state:
            self.scale.restore(state)

    def _clip_and_update(self, grads: list[Tensor]) -> Tensor:
        """Do AdamW's step with clipped gradients, if they are finite; return their norm before."""
        if isinstance(self.optimizer, FusedAdamW):
            self._unscale(grads)
            self.optimizer.step()
            assert self.optimizer.grad_norm is not None
            return self.optimizer.grad_norm
        norm = self._unscale_and_clip(grads)
        # PyTorch's fused AdamW looks at this, and leaves everything as it is.
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return norm

    def _unscale(self, grads: list[Tensor]) -> None:
        if self.scale is not None:
            torch._foreach_div_(grads, self.scale.factor)

    def _unscale_and_clip(self, grads: list[Tensor]) -> Tensor:
        """Unscale and clip gradients in one pass; return their norm before clipping."""
        norm = torch.nn.utils.get_total_norm(grads)
        if hasattr(norm, "full_tensor"):  # of gradients that are spread over processes
            norm = norm.full_tensor()
        factor = torch.ones_like(norm)
        if self.scale is not None:
            factor = factor / self.scale.factor
            norm = norm * factor
        if self.recipe.grad_clip:
            factor = factor * (self.recipe.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        if self.recipe.grad_clip or self.scale is not None:
            torch._foreach_mul_(grads, factor)
        return norm


class LossScale:
    """The factor that keeps float16's gradients from vanishing (Micikevicius et al. 2018).

    Halved after an overflow, doubled after 2,000 steps without one (arXiv:1710.03740, section 3.2).
    PyTorch's GradScaler does the same, but waits for the device when gradients are also clipped.
    """

    GROWTH_INTERVAL = 2000
    HALVINGS = 16  # from the first scale to 1

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.tensor(2.0**self.HALVINGS, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """Learn from a step; `overflowed` is 1 or 0."""
        self.good_steps = (self.good_steps + 1) * (1 - overflowed)
        grown = self.good_steps >= self.GROWTH_INTERVAL
        self.factor = self.factor * torch.where(grown, 2.0, 1.0) * (1.0 - 0.5 * overflowed)
        self.good_steps = self.good_steps * ~grown

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"loss_scale": self.factor.item(), "good_steps": self.good_steps.item()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.factor.fill_(float(state["loss_scale"]))
        self.good_steps.fill_(float(state["good_steps"]))
