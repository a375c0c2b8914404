"""Helpers shared by the kernels: launch configurations, variants, input checks, device properties.

Every kernel module has two kinds of public names: launchers, which take and return tensors, and
`variants`, which yields every configuration in which the launchers can launch the kernels. Both
use the same `LaunchConfig`s, so that each one can be compiled ahead of time without a GPU. The
masks and the dropout of attention are in `attention/blocks.py`.
"""

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether `@triton.jit` functions run in Triton's interpreter. Triton decides this when a function
# is defined, that is when the kernel modules are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)

if INTERPRETED and triton.__version__.startswith("3.6."):
    # The interpreter converts its loop bounds, arrays of one element, with `int()`, which NumPy 2.4
    # no longer supports. Triton 3.7 contains the same fix.
    from triton.runtime import interpreter

    def _patch_lang_tensor(
        tensor: Any, scope: Any, original=interpreter._patch_lang_tensor
    ) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor

# The supported dtypes and their names in Triton.
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


# NVIDIA GPUs have an instruction for 2^x only: exp(x) is computed as exp2(x * log2(e)).
LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class LaunchConfig:
    """The compile-time arguments of a kernel and the options of its compiler.

    A kernel is launched as ``kernel[grid](*arguments, **config.kwargs)``.
    """

    constants: dict[str, Any]
    """Compile-time arguments: block sizes, flags."""
    num_warps: int
    num_stages: int | None = None
    """Number of iterations of a loop whose loads are in flight at the same time (None: 3)."""
    max_registers: int | None = None
    """Limit of registers per thread (None: none below the 255 of the hardware)."""
    programs_per_sm: int = 0
    """For kernels whose programs iterate over the rows: the number to launch per multiprocessor."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of Triton's compiler."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            "maxnreg": self.max_registers,
        }
        return {name: value for name, value in options.items() if value is not None}

    @property
    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of a launch."""
        return self.constants | self.options


@dataclass(frozen=True)
class Variant:
    """One configuration of a kernel launch; Triton compiles each one separately.

    module, kernel: the module and the name of the `@triton.jit` function. signature: the type of
    each run-time argument in Triton's notation ("*bf16", "i32", "fp32"). constants: the
    compile-time arguments (None for an omitted pointer). options: `num_warps`, `num_stages` and so
    on. matrix: whether its matrix products must use the matrix units. unaligned: the run-time
    integers that are usually not multiples of 16. common: whether the configuration occurs in
    training or generation with GPT-2, or represents its kind in a check that does not cover all
    configurations.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    matrix: bool
    unaligned: tuple[str, ...]
    common: bool


def describe(
    kernel: triton.JITFunction,
    types: Mapping[str, str | None],
    config: LaunchConfig,
    *,
    matrix: bool = False,
    unaligned: tuple[str, ...] = (),
    common: bool = True,
) -> Variant:
    """Return the variant of a kernel for a configuration.

    types: the types of run-time arguments, None for an omitted pointer. Other arguments are i32,
    and names that the kernel does not have are ignored. The remaining arguments: see `Variant`.
    """
    constants = config.constants | {name: None for name, kind in types.items() if kind is None}
    names = kernel.arg_names
    return Variant(
        kernel.fn.__module__,
        kernel.__name__,
        {name: types.get(name) or "i32" for name in names if name not in constants},
        {name: value for name, value in constants.items() if name in names},
        config.options,
        matrix,
        unaligned,
        common,
    )


def check_tensors(operation: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless the kernels support the dtype and device of each tensor.

    Tensors that are None are ignored. All tensors must be on the same device.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{operation}: {name} must be one of {names}, not {tensor.dtype}")
        if INTERPRETED and tensor.dtype == torch.bfloat16:
            raise ValueError(
                f"{operation}: {name} is torch.bfloat16, for which Triton's interpreter computes "
                "wrong numbers; use float16 or float32 in the interpreter, or run on a GPU"
            )
    check_devices(operation, **given)


def check_devices(operation: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors, of any dtype, are on one device that can run kernels."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{operation}: all tensors must be on one device, not {places}")
    check_device(operation, next(iter(devices.values())))


def check_device(operation: str, device: torch.device) -> None:
    """Raise ValueError unless the kernels can run on a device."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"{operation}: the Triton kernels run on CUDA, not on {device}; use a CUDA device, "
            'PyTorch\'s own operators (ops="native"), or, to try the kernels slowly on a CPU, '
            "set TRITON_INTERPRET=1 before the first import of triton"
        )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context manager that makes the device of `tensor` the current CUDA device.

    Triton launches kernels on the current device, which need not be that of their arguments.
    """
    return torch.cuda.device_of(tensor)


def capability(device: torch.device) -> int:
    """Return the compute capability of a GPU (90 for 9.0); in the interpreter that of an H100."""
    return 90 if device.type == "cpu" else _capability(device)


def n_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU.

    In the interpreter it is 3, so that tests of small tensors also run persistent kernels for more
    than one iteration of their loops.
    """
    return 3 if device.type == "cpu" else _n_processors(device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of computations on `dtype`: fp64 for fp64, else fp32 (see `upcast`)."""
    return torch.promote_types(dtype, torch.float32)


def uses_tf32() -> bool:
    """Return whether PyTorch is configured to multiply fp32 matrices in TF32."""
    # `allow_tf32` raises an error if the program has set the newer option, `fp32_precision`.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def upcast(x):
    """Cast to fp32, the dtype of all arithmetic; fp64 is returned unchanged."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)
