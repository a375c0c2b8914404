"""The operations that have more than one implementation.

A backend is a module with one function per operation, the same name and signature in each:

- `reference`: the formulas in plain PyTorch, the truth that every other backend is held against;
- `native`: PyTorch's own fused operators, and C++ where PyTorch is slow on a CPU;
- `triton`: the Triton kernels, for CUDA.

`cuda` is not asked for by name: it takes from the last two what is faster, for ``"auto"``.
"""

import functools
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from fastgpt.utils.requirements import unsupported_version

BACKENDS = ("reference", "native", "triton")

MAX_HEAD_DIM, MAX_WIDTH = 128, 8192  # of the kernels for attention and for the norms
MIN_CAPABILITY = (8, 0)  # of the GPUs that the kernels are compiled for and checked on: Ampere

_loaded: dict[str, ModuleType] = {}


def check(name: str) -> str:
    """Return `name` if it is a backend or ``"auto"``; ValueError names the choices if not."""
    if name != "auto" and name not in BACKENDS:
        choices = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"ops must be one of {choices}, not {name!r}")
    return name


def get(name: str, device: torch.device | None = None, kernels_fit: bool = True) -> ModuleType:
    """Return the backend called `name`.

    ``"auto"`` is `cuda` on a CUDA device where Triton works, if the kernels fit the model (see
    `kernels_fit`), and `native` everywhere else. ImportError if `triton` is asked for by name and
    is not installed, or in a version that is not supported.
    """
    return _loaded[_load(name, device, kernels_fit)]


def kernels_fit(width: int, n_head: int, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels can do a model of a width and a number of heads, in a precision."""
    narrow = width <= MAX_WIDTH and width // n_head <= MAX_HEAD_DIM
    return narrow and dtype != torch.float64


def check_device(name: str, device: torch.device, kernels_fit: bool = True) -> str:
    """Return the name of the backend that `get` returns for a device, `triton` for `cuda`.

    ValueError or ImportError, which say what to do, if it cannot compute there.
    """
    name = _load(name, device, kernels_fit).replace("cuda", "triton")
    if name == "triton":
        import_module("fastgpt.kernels.common").check_device('ops="triton"', device)
    return name


def _load(name: str, device: torch.device | None, kernels_fit: bool) -> str:
    """Import the backend that `get` is to return, and return its name."""
    if check(name) == "auto":
        name = "cuda" if device and kernels_fit and _has_kernels(device) else "native"
    if name not in _loaded:
        if name == "triton" and find_spec("triton") is None:
            raise ImportError('ops="triton" needs Triton, on Linux: pip install triton')
        _loaded[name] = import_module(f"{__name__}.{name}")
    return name


# What torch.compiler.assume_constant_result does, for a compiler cannot trace imports; calling it
# would load the compiler: two seconds at the start, and 150 MB, for those who never compile.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels are the ones to use on a device."""
    if device.type != "cuda" or torch.version.hip:  # on AMD's GPUs they were never tried
        return False
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    if fault := _fault_of_triton():
        warnings.warn(
            f"PyTorch's own operators run on this GPU, not fastgpt's kernels, because {fault}",
            stacklevel=2,
        )
        return False
    return True


def _fault_of_triton() -> str | None:
    """Say why Triton can launch nothing on this machine's GPU; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed; on Linux: pip install triton"
    if fault := unsupported_version("torch", "triton"):
        return fault
    try:  # its first use builds a small library
        import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # whatever a C compiler or a loader may say
        reason = " ".join(str(error).split())[:300]
        return (
            f"Triton cannot be used here ({type(error).__name__}: {reason}); it needs a C "
            "compiler and Python's headers, on Debian: apt install gcc python3-dev"
        )
    return None
