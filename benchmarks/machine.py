"""Properties of the machine that benchmarks report."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """Return the name of the processor and its SIMD extensions, as reported by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    simd = [flag for flag in ("avx2", "avx512bw") if flag in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({', '.join(simd) or 'no AVX2'})"


def version_of(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
