"""The weight update: learning rate schedule, clipping, AdamW, loss scaling, weight averaging."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.model import GPT
from fastgpt.training.distributed import full_tensor
from fastgpt.training.fused_adamw import FusedAdamW
from fastgpt.training.recipes import Recipe


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return a fused AdamW optimizer (Loshchilov & Hutter 2019, arXiv:1711.05101) for `model`.

    This is `FusedAdamW`, which also clips the gradients, if all parameters are fp32 and unsharded,
    and are on a CPU or on a GPU that runs the Triton kernels. Otherwise it is `torch.optim.AdamW`.

    Two other places depend on the optimizer: `Updater`, which skips updates with non-finite
    gradients, and `fastgpt.training.memory_estimate`, which counts AdamW's two moments.
    """
    groups = parameter_groups(model, recipe.weight_decay)
    betas = (recipe.beta1, recipe.beta2)
    if _has_fused(model, recipe):
        return FusedAdamW(groups, recipe.lr, betas, max_norm=recipe.grad_clip or None)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: weight decay applies to parameters of 2 or more dimensions.

    These are matrices and embeddings. Biases and norms are not decayed. Frozen parameters are in
    neither group.
    """
    parameters = list(trainable(model).values())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of step `step` (from 0).

    The rate rises linearly during the warm-up, then follows the recipe's schedule from `lr` to
    `min_lr` (by default `lr` / 10).
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
    lowest = recipe.lr / 10 if recipe.min_lr is None else recipe.min_lr
    span = max(1, recipe.max_steps - recipe.warmup_steps)
    progress = min(1.0, (step - recipe.warmup_steps) / span)
    return lowest + (recipe.lr - lowest) * _decay_factor(progress, span, recipe)


def _decay_factor(progress: float, span: int, recipe: Recipe) -> float:
    """Return the learning rate as a fraction: 0 is `min_lr` and 1 is the peak `lr`.

    progress: the fraction of the steps after the warm-up that are done. span: their number.
    """
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "linear":
        return 1.0 - progress
    if recipe.schedule == "wsd":
        # Warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395), with linear decay
        # (arXiv:2405.18392). `decay_fraction` is relative to all steps, `progress` to `span`.
        decay = min(1.0, recipe.decay_fraction * recipe.max_steps / span)
        return min(1.0, (1.0 - progress) / decay)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _has_fused(model: torch.nn.Module, recipe: Recipe) -> bool:
    """Whether `FusedAdamW` supports the model, and its device with the recipe's backend (`ops`)."""
    parameters = trainable(model).values()
    if any(hasattr(p, "full_tensor") or p.dtype != torch.float32 for p in parameters):
        return False
    device = next(model.parameters()).device
    if device.type == "cuda":
        return ops.check_device(recipe.ops, device) == "triton"
    return device.type == "cpu"


class Updater:
    """Applies gradients to the weights: unscaling, clipping, AdamW, and weight averaging.

    Updates with a non-finite gradient norm are skipped. The device decides this by itself, without
    synchronizing with the host.

    Attributes:
        optimizer: The AdamW optimizer.
        scale: The `LossScale` with float16, else None.
        skipped: The number of consecutive skipped updates so far, a scalar tensor on the device.
        average: With `recipe.ema`, the averaged weights by parameter name.
    """

    def __init__(self, model: GPT, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model, self.recipe = model, recipe
        parameters = trainable(model)
        self.parameters = list(parameters.values())
        self.optimizer = make_optimizer(model, recipe)
        self.scale = LossScale(model.device) if dtype == torch.float16 else None
        self.skipped = torch.zeros((), device=model.device)
        averaged = parameters if recipe.ema else {}
        self.average = {name: p.detach().clone() for name, p in averaged.items()}

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss multiplied by the loss scale, on which to call `backward`."""
        return loss if self.scale is None else loss * self.scale.factor

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Update the weights with learning rate `lr` and clear the gradients.

        Returns the norm of the unscaled gradients before clipping, a scalar on the device.
        """
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
        """Exchange the weights and their average in place. Does nothing without averaging."""
        for name, average in self.average.items():
            parameter = self.model.get_parameter(name)
            kept = parameter.clone()  # one at a time: a copy of all may not fit into memory
            parameter.copy_(average)
            average.copy_(kept)

    @property
    def patience(self) -> int:
        """How many updates in a row may be skipped before the run ends.

        Higher with float16, whose initial loss scale usually overflows and must be halved first.
        """
        return self.recipe.max_skipped + (LossScale.HALVINGS if self.scale else 0)

    def extra_state(self) -> dict[str, float]:
        """Return the state, other than weights and moments, to be saved in a checkpoint."""
        state = {"skipped": self.skipped.item()}
        return state if self.scale is None else state | self.scale.state()

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `extra_state`."""
        self.skipped.fill_(float(state.get("skipped", 0.0)))
        if self.scale is not None and "loss_scale" in state:
            self.scale.restore(state)

    def _clip_and_update(self, grads: list[Tensor]) -> Tensor:
        """Run AdamW's step with clipped gradients if their norm is finite; return the norm before.

        The returned norm is that of the unscaled gradients before clipping.
        """
        if isinstance(self.optimizer, FusedAdamW):
            if self.scale is not None:
                torch._foreach_div_(grads, self.scale.factor)
            self.optimizer.step()
            assert self.optimizer.grad_norm is not None
            return self.optimizer.grad_norm
        norm = self._unscale_and_clip(grads)
        # PyTorch's fused AdamW reads this attribute, and skips the update on the device if it is 1.
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return norm

    def _unscale_and_clip(self, grads: list[Tensor]) -> Tensor:
        """Unscale and clip gradients in one pass; return their norm before clipping."""
        norm = full_tensor(torch.nn.utils.get_total_norm(grads))
        # One factor for both, so that the gradients are read and written only once.
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
    """Dynamic loss scale that keeps float16 gradients from underflowing.

    The scale is halved after an overflow and doubled after 2,000 steps without one (Micikevicius et
    al. 2018, arXiv:1710.03740, section 3.2). PyTorch's GradScaler does the same, but synchronizes
    with the device if gradients are also clipped. Here all state is in tensors on the device.
    """

    GROWTH_INTERVAL = 2000
    HALVINGS = 16  # from the initial scale 2**16 down to 1

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.tensor(2.0**self.HALVINGS, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """Update the scale after a step. overflowed: 1.0 or 0.0, a scalar on the device."""
        # Arithmetic instead of branches, so that the host does not need to read the values.
        self.good_steps = (self.good_steps + 1) * (1 - overflowed)
        grown = self.good_steps >= self.GROWTH_INTERVAL
        self.factor = self.factor * torch.where(grown, 2.0, 1.0) * (1.0 - 0.5 * overflowed)
        self.good_steps = self.good_steps * ~grown

    def state(self) -> dict[str, float]:
        """Return the state to be saved in a checkpoint."""
        return {"loss_scale": self.factor.item(), "good_steps": self.good_steps.item()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state`."""
        self.factor.fill_(float(state["loss_scale"]))
        self.good_steps.fill_(float(state["good_steps"]))
