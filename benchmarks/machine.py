"""Properties of the machine that benchmarks report."""

from importlib.metadata import PackageNotFoundError, version

from fastgpt.utils.processor import cpuinfo, processor_name


def processor() -> str:
    """Return the name of the processor and its SIMD extensions, as reported by the system."""
    flags = cpuinfo().get("flags", "").split()
    simd = [flag for flag in ("avx2", "avx512bw") if flag in flags]
    return f"{processor_name()} ({', '.join(simd) or 'no AVX2'})"


def version_of(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
