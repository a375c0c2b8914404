"""Operations with more than one implementation.

A backend is a module with one function per operation; names and signatures are the same in every
backend:

- `reference`: the formulas in plain PyTorch, which every other backend is tested against;
- `native`: PyTorch's own fused operators, and C++ where PyTorch is slow on a CPU;
- `triton`: the Triton kernels, for CUDA.

A fourth module, `cuda`, cannot be selected by name. It combines the faster operations of `native`
and `triton`, for ``"auto"``.
"""

import functools
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from fastgpt.utils.requirements import unsupported_version

BACKENDS = ("reference", "native", "triton")

MAX_HEAD_DIM, MAX_WIDTH = 128, 8192  # limits of the attention and LayerNorm kernels
MAX_LOGITS = 2**25  # at most held at once: 128 MB in fp32, enough for products at full speed
MIN_CAPABILITY = (8, 0)  # Ampere: the kernels are not compiled for or tested on older GPUs

_loaded: dict[str, ModuleType] = {}


def check(name: str) -> str:
    """Return `name` if it is a backend or ``"auto"``; otherwise raise ValueError."""
    if name != "auto" and name not in BACKENDS:
        choices = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"ops must be one of {choices}, not {name!r}")
    return name


def get(name: str, device: torch.device | None = None, kernels_fit: bool = True) -> ModuleType:
    """Return the backend called `name`.

    ``"auto"`` selects `cuda` on a CUDA device where Triton works, if the kernels support the model
    (see `kernels_fit`), and `native` otherwise.

    Raises: ImportError if `triton` is requested by name but is not installed, or has an unsupported
        version.
    """
    return _loaded[_load(name, device, kernels_fit)]


def kernels_fit(width: int, n_head: int, dtype: torch.dtype) -> bool:
    """Return whether the Triton kernels support a width, a number of heads and a dtype."""
    narrow = width <= MAX_WIDTH and width // n_head <= MAX_HEAD_DIM
    return narrow and dtype != torch.float64


def check_device(name: str, device: torch.device, kernels_fit: bool = True) -> str:
    """Return the name of the backend that `get` selects for a device (`triton` for `cuda`).

    Raises: ValueError or ImportError, with instructions, if it cannot run on the device.
    """
    name = _load(name, device, kernels_fit).replace("cuda", "triton")
    if name == "triton":
        import_module("fastgpt.kernels.common").check_device('ops="triton"', device)
    return name


def _load(name: str, device: torch.device | None, kernels_fit: bool) -> str:
    """Import the backend that `get` returns, and return its name."""
    if check(name) == "auto":
        name = "cuda" if device and kernels_fit and _has_kernels(device) else "native"
    if name not in _loaded:
        if name == "triton" and find_spec("triton") is None:
            raise ImportError('ops="triton" needs Triton, on Linux: pip install triton')
        _loaded[name] = import_module(f"{__name__}.{name}")
    return name


# The compiler cannot trace imports, so the result is marked as a constant. This is what
# torch.compiler.assume_constant_result does, but calling that loads the compiler, which costs two
# seconds of startup time and 150 MB even in programs that never compile.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Return whether the Triton kernels can be used on a device; warn if Triton is broken."""
    if device.type != "cuda" or torch.version.hip:  # not tested on AMD GPUs
        return False
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    if fault := _triton_error():
        warnings.warn(
            f"using PyTorch's own operators on this GPU instead of fastgpt's kernels: {fault}",
            stacklevel=2,
        )
        return False
    return True


def _triton_error() -> str | None:
    """Return the reason why Triton cannot launch kernels on this machine; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed; on Linux: pip install triton"
    if fault := unsupported_version("torch", "triton"):
        return f"{fault}; pip install --upgrade torch installs the Triton that fits it"
    try:  # the first use compiles a small library with the system's C compiler
        import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # the compiler or the loader may raise anything
        reason = " ".join(str(error).split())[:300]
        return (
            f"Triton cannot be used here ({type(error).__name__}: {reason}); it needs a C "
            "compiler and Python's headers, on Debian: apt install gcc python3-dev"
        )
    return None
