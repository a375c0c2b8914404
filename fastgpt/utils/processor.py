"""The name and the features of this machine's processor.

The C++ code detects instruction sets by itself, in ``csrc/common/processor.cpp``.
"""

import platform
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


def processor_name() -> str:
    """Return the name of this processor, as reported by the system."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def bfloat16_units() -> str | None:
    """Return the name of this processor's bfloat16 instructions, or None if there are none."""
    found = cpuinfo()
    flags = f"{found.get('flags', '')} {found.get('Features', '')}".split()  # of x86, of Arm
    return next((name for flag, name in BFLOAT16_UNITS.items() if flag in flags), None)


def cpuinfo() -> dict[str, str]:
    """Return the fields of a processor in Linux's /proc/cpuinfo; empty on other systems."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in fields}
