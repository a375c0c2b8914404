"""Which precision a device multiplies matrices in the fastest, where training still works as well.

bfloat16 halves the memory of what is multiplied, and is several times as fast as float32 on units
made for it; without them it is far slower.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

CPUINFO = Path("/proc/cpuinfo")

# What Linux calls instructions that multiply bfloat16: on Intel's and AMD's processors, on Arm's.
BFLOAT16_UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "svebf16": "SVE's bfloat16",
    "bf16": "Arm's bfloat16",
}


@dataclass(frozen=True)
class Precision:
    """What matrices are multiplied in, and why, as a person is told."""

    dtype: Literal["float32", "bfloat16"]
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype}: {self.reason}"


def choose_dtype(device: torch.device) -> Precision:
    """Return the precision for training on a device. Weights and sums stay in fp32 either way."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bfloat16", "this GPU has units for it")
        return Precision("float32", "this GPU has no bfloat16 units")
    if device.type == "cpu":
        units = cpu_bfloat16_units()
        if units:
            return Precision("bfloat16", f"this processor has units for it ({units})")
        return Precision("float32", "this processor has no bfloat16 units")
    return Precision("float32", f"bfloat16 was not tried on {device.type}")


def cpu_bfloat16_units() -> str | None:
    """Return the name of this processor's instructions for bfloat16; None if none are known."""
    flags = _flags()
    return next((name for flag, name in BFLOAT16_UNITS.items() if flag in flags), None)


def _flags() -> set[str]:
    """Return what Linux says that this processor can do; elsewhere nothing is known."""
    try:
        lines = CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    found = (line.partition(":") for line in lines)
    return {
        flag
        for name, _, flags in found
        if name.strip() in ("flags", "Features")
        for flag in flags.split()
    }
