"""What the kernels share: checks of their inputs, facts of a GPU, and how to list what can be run.

Every kernel module has two kinds of public names: launchers, which take and return tensors, and
`variants`, which lists all the ways in which its launchers can launch its kernels, from the same
tables, so that each can be compiled ahead of time without a GPU.
"""

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether `@triton.jit` functions run in Triton's interpreter: decided when they are defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)

if INTERPRETED and triton.__version__.startswith("3.6."):
    # NumPy 2.4 no longer converts arrays of one element, such as the bounds of the interpreter's
    # loops, by `int()`. Triton 3.7 has the same correction.
    from triton.runtime import interpreter

    def _patch_lang_tensor(
        tensor: Any, scope: Any, original=interpreter._patch_lang_tensor
    ) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor

# What Triton calls the dtypes that the kernels take.
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


# A GPU's exponentials are powers of two.
LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Variant:
    """One way in which a launcher launches a kernel; Triton compiles each one separately.

    kernel: the name of the `@triton.jit` function in its module. signature: the type of each
    run-time argument, as Triton writes it ("*bf16", "i32", "fp32"). constants: the compile-time
    arguments (None for a pointer that is left out). options: `num_warps`, `num_stages` and so on.
    matrix: whether its products must reach the matrix units. unaligned: the run-time integers that
    are not multiples of 16 in ordinary use. common: whether training or writing with GPT-2 meets
    it, or it stands for its kind in a check that has no time for all.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    matrix: bool = False
    unaligned: tuple[str, ...] = ()
    common: bool = True


def check_tensors(operation: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless the kernels can compute with each of the tensors (None: left out)."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{operation}: {name} must be one of {names}, not {tensor.dtype}")
        if INTERPRETED and tensor.dtype == torch.bfloat16:
            raise ValueError(
                f"{operation}: {name} is torch.bfloat16, with which Triton's interpreter computes "
                "wrong numbers; take float16 or float32 there, or run on a GPU"
            )
    check_devices(operation, **given)


def check_devices(operation: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors, of any dtype, are where the kernels can run."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{operation}: all tensors must be on one device, not {places}")
    check_device(operation, next(iter(devices.values())))


def check_device(operation: str, device: torch.device) -> None:
    """Raise ValueError unless the kernels can run on a device."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"{operation}: the Triton kernels run on CUDA, not on {device}; move there, use "
            'PyTorch\'s own operators (ops="native"), or, to try the kernels slowly on a CPU, '
            "set TRITON_INTERPRET=1 before the first import of triton"
        )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return the context to launch a kernel on `tensor` in: Triton takes the current device."""
    return torch.cuda.device_of(tensor)


def capability(device: torch.device) -> int:
    """Return a GPU's compute capability, 90 for 9.0; in the interpreter that of an H100."""
    return 90 if device.type == "cpu" else _capability(device)


def n_processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; a few in the interpreter, so that grids loop."""
    return 3 if device.type == "cpu" else _n_processors(device)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that numbers are computed in: fp32, or fp64 for fp64 (`widen` casts)."""
    return torch.promote_types(dtype, torch.float32)


def multiplies_in_tf32() -> bool:
    """Whether the user has told PyTorch to multiply fp32 matrices in TF32."""
    # not `allow_tf32`, which raises where a program has set the newer name
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def widen(x):
    """Cast to fp32, in which all arithmetic is done; fp64 stays."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)
