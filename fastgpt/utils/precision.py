"""Select the precision of matrix products on a device."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastgpt.utils.errors import UsageError
from fastgpt.utils.processor import bfloat16_units

TRIAL_SECONDS = 0.5  # for the trials of all precisions together; each is run at least once


@dataclass(frozen=True)
class Precision:
    """The precision selected for `recipe.dtype`.

    Attributes:
        device: the device.
        dtype: dtype of the matrix products.
        tf32: whether float32 products use TF32.
        reason: why this precision was selected, for messages.
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        """The value of a recipe's `dtype` that selects this precision."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager in which to run the model."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose_precision(name: str, device: torch.device) -> list[Precision]:
    """Return the candidate precisions for a recipe's `dtype` on a device.

    There are several if a trial is needed to find the faster one: see `fastest`. The names
    ``"tf32"`` and ``"float32"`` also set PyTorch's float32 matmul precision.

    Raises: UsageError if the device does not support the dtype.
    """
    if name == "auto":
        return _best(device)
    if name == "tf32":
        if device.type != "cuda":
            raise UsageError(f"dtype tf32 is for NVIDIA GPUs, not for {device.type}: use float32")
        torch.set_float32_matmul_precision("high")
        return [Precision(device, torch.float32, tf32=True)]
    if name == "float32":
        torch.set_float32_matmul_precision("highest")  # an earlier run may have set TF32
    return [Precision(device, getattr(torch, name))]


def fastest(precisions: Sequence[Precision], trial: Callable[[Precision], object]) -> Precision:
    """Return the precision with which `trial` is fastest.

    A processor with bfloat16 instructions multiplies large matrices twice as fast in bfloat16, but
    the conversions can cost more than that saves in a small model. The trial is repeated, with the
    precisions alternating, and the minimum time of each is compared, so that other load on the
    machine does not affect the result.
    """
    if len(precisions) == 1:
        return precisions[0]
    for precision in precisions:  # warm up: memory is allocated and code is loaded
        _time(trial, precision)
    seconds = dict.fromkeys(precisions, math.inf)
    until = time.perf_counter() + TRIAL_SECONDS
    while math.inf in seconds.values() or time.perf_counter() < until:
        for precision in precisions:
            seconds[precision] = min(seconds[precision], _time(trial, precision))
    best, next_best = sorted(precisions, key=seconds.__getitem__)[:2]
    reason = (
        f"a trial took {1e3 * seconds[best]:,.0f} ms, {1e3 * seconds[next_best]:,.0f} in "
        f"{next_best.name}"
    )
    return replace(best, reason=reason)


def _best(device: torch.device) -> list[Precision]:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return [Precision(device, torch.bfloat16)]
        return [Precision(device, torch.float16, reason="this GPU has no bfloat16 units")]
    if device.type == "cpu":
        if bfloat16_units():
            return [Precision(device, torch.float32), Precision(device, torch.bfloat16)]
        return [Precision(device, torch.float32, reason="this processor has no bfloat16 units")]
    return [Precision(device, torch.float32)]


def _time(trial: Callable[[Precision], object], precision: Precision) -> float:
    began = time.perf_counter()
    trial(precision)
    return time.perf_counter() - began
