"""Detect the features of this machine's processor."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# Linux's names of bfloat16 multiplication instructions (two of x86, then two of Arm processors),
# and the names to display.
BFLOAT16_UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "svebf16": "SVE's bfloat16",
    "bf16": "Arm's bfloat16",
}


def bfloat16_units() -> str | None:
    """Return the name of this processor's bfloat16 instructions, or None if there are none."""
    flags = _flags()
    return next((name for flag, name in BFLOAT16_UNITS.items() if flag in flags), None)


def _flags() -> set[str]:
    """Return the processor flags reported by Linux; an empty set on other systems."""
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
