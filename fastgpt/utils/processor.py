"""What this machine's processor says of itself."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# What Linux calls instructions that multiply bfloat16: on Intel's and AMD's processors, on Arm's.
BFLOAT16_UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "svebf16": "SVE's bfloat16",
    "bf16": "Arm's bfloat16",
}


def bfloat16_units() -> str | None:
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
