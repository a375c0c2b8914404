"""In which precision a device multiplies, and why."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.errors import UsageError


@dataclass(frozen=True)
class Precision:
    """What `recipe.dtype` came to: the products' `dtype`, TF32 or not, and the reason in words."""

    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    reason: str = ""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context to run the model in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def __str__(self) -> str:
        name = "TF32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{name}: {self.reason}" if self.reason else name


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the precision that a recipe's `dtype` means on a device; UsageError if it has none."""
    if name == "auto":
        return _best(device)
    if name == "tf32":
        if device.type != "cuda":
            raise UsageError(f"dtype tf32 is for NVIDIA GPUs, not for {device.type}: use float32")
        torch.set_float32_matmul_precision("high")
        return Precision(device, torch.float32, tf32=True)
    return Precision(device, getattr(torch, name))


def _best(device: torch.device) -> Precision:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision(device, torch.bfloat16)
        return Precision(device, torch.float16, reason="this GPU has no bfloat16 units")
    return Precision(device, torch.float32)
