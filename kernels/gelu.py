"""GPT-2's GELU (tanh approximation), forward and backward.

The reference implementation is `fastgpt.ops.reference.gelu`. ``0.5 x (1 + tanh(u))`` is computed as
``x * sigmoid(2u)``: this needs only one exponential, does not cancel for negative x, and avoids
tanh, which Triton does not provide. The backward recomputes the sigmoid, so that only x is saved.

The kernels can also add the bias of the preceding linear layer. That layer is then a plain matrix
product, whose result is saved for the backward; the backward also computes the gradient of the
bias, a sum over all rows (completed by `fastgpt.kernels.column_sum`).
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.column_sum import add_up
from fastgpt.kernels.common import (
    DTYPES,
    LOG2_E,
    LaunchConfig,
    Variant,
    check_tensors,
    describe,
    n_multiprocessors,
    on_device,
    upcast,
)

# 8 elements per thread: one 128-bit load of 16-bit numbers, two of 32-bit numbers
FLAT = LaunchConfig({"BLOCK": 1024}, num_warps=4)

# With a bias, a program iterates over the rows of a block of columns. With 256 columns, a warp
# reads 512 bytes of a row of 16-bit numbers. The tile sizes and the number of programs per
# multiprocessor were the fastest of about a dozen on an H200 with GPT-2 in bf16.
FORWARD = LaunchConfig({"ROWS": 16, "COLUMNS": 256}, num_warps=4, programs_per_sm=8)
BACKWARD = LaunchConfig({"ROWS": 4, "COLUMNS": 256}, num_warps=4, programs_per_sm=8)

# 2u = x (LINEAR + CUBIC x²)
LINEAR = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
CUBIC = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi) * 0.044715)


def gelu_forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return gelu(x), or gelu(x + bias), contiguous, in the shape and dtype of `x`.

    Args:
        x: any shape and strides; fp32, fp16 or bf16 (computed in fp32), or fp64.
        bias: `[C]` for x `[..., C]`, in any of these dtypes. The sum is not rounded to the dtype of
            `x`.

    Raises:
        ValueError: for unsupported inputs.
    """
    check_tensors("gelu", x=x, bias=bias)
    x = x.contiguous()
    y = torch.empty_like(x)
    if bias is None:
        _launch(_gelu_forward, x, y)
        return y
    _check_bias(x, bias)
    _launch_by_columns(_bias_gelu_forward, FORWARD, x, bias.contiguous(), y)
    return y


def gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `x` and of `bias`.

    Args:
        grad: gradient of the result, in the shape and dtype of `x`; any strides, including the
            expanded gradients of autograd.
        x, bias: the arguments of `gelu_forward`.

    Returns:
        The gradient of `x`, contiguous, and that of `bias` in its dtype (None without a bias).

    Raises:
        ValueError: for unsupported inputs.
    """
    check_tensors("gelu", grad=grad, x=x, bias=bias)
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            f"gelu: grad must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
            f"not {tuple(grad.shape)} {grad.dtype}"
        )
    # Both are usually contiguous results of matrix products. Other layouts are rare (the gradient
    # of a sum has stride 0) and are copied, so that the kernels need only a flat, vectorized index.
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if bias is None:
        _launch(_gelu_backward, grad, x, grad_x)
        return grad_x, None
    _check_bias(x, bias)
    wide = torch.float64 if torch.float64 in (x.dtype, bias.dtype) else torch.float32
    n_programs = _n_programs(x, BACKWARD)
    partials = torch.empty(1, n_programs, bias.numel(), dtype=wide, device=x.device)
    tensors = (x, grad, bias.contiguous(), grad_x, partials)
    _launch_by_columns(_bias_gelu_backward, BACKWARD, *tensors)
    return grad_x, add_up(partials, bias.dtype)[0]


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that the launchers can launch on a GPU of a compute capability."""
    for dtype in DTYPES.values():
        types = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), f"*{dtype}")
        for kernel in (_gelu_forward, _gelu_backward):
            yield describe(kernel, types | {"n_elements": "i64"}, FLAT)
    dtypes = [(dtype, dtype) for dtype in DTYPES.values()]
    for dtype, bias in [*dtypes, ("fp16", "fp32"), ("bf16", "fp32")]:
        types = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), f"*{dtype}")
        types |= {"bias_ptr": f"*{bias}", "partials_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        for unaligned in ((), ("width",)) if (dtype, bias) == ("bf16", "fp32") else ((),):
            yield describe(_bias_gelu_forward, types, FORWARD, unaligned=unaligned)
            yield describe(_bias_gelu_backward, types, BACKWARD, unaligned=unaligned)


@triton.jit
def _gelu_forward(x_ptr, y_ptr, n_elements, BLOCK: tl.constexpr):
    offsets, inside = _block(n_elements, BLOCK)
    x = upcast(tl.load(x_ptr + offsets, mask=inside))
    y = _gelu(x)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(grad_ptr, x_ptr, grad_x_ptr, n_elements, BLOCK: tl.constexpr):
    offsets, inside = _block(n_elements, BLOCK)
    grad = upcast(tl.load(grad_ptr + offsets, mask=inside))
    x = upcast(tl.load(x_ptr + offsets, mask=inside))
    grad_x = grad * _slope(x)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_forward(
    x_ptr, bias_ptr, y_ptr, n_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = upcast(tl.load(bias_ptr + columns, mask=columns < width, other=0.0))  # [1, COLUMNS]
    for tile in range(tl.program_id(1), tl.cdiv(n_rows, ROWS), tl.num_programs(1)):
        offsets, inside = _tile(tile, columns, n_rows, width, ROWS)
        x = upcast(tl.load(x_ptr + offsets, mask=inside, other=0.0)) + bias  # [ROWS, COLUMNS]
        tl.store(y_ptr + offsets, _gelu(x).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward(
    x_ptr, grad_ptr, bias_ptr, grad_x_ptr, partials_ptr, n_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = upcast(tl.load(bias_ptr + columns, mask=columns < width, other=0.0))  # [1, COLUMNS]
    added = tl.zeros([ROWS, COLUMNS], partials_ptr.dtype.element_ty)
    for tile in range(tl.program_id(1), tl.cdiv(n_rows, ROWS), tl.num_programs(1)):
        offsets, inside = _tile(tile, columns, n_rows, width, ROWS)
        grad = upcast(tl.load(grad_ptr + offsets, mask=inside, other=0.0))  # [ROWS, COLUMNS]
        x = upcast(tl.load(x_ptr + offsets, mask=inside, other=0.0)) + bias
        grad_x = grad * _slope(x)
        added += grad_x  # 0 outside of the tensor, because grad is 0 there
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    partials_ptr += tl.program_id(1).to(tl.int64) * width  # [1, n_programs, C]
    total = tl.sum(added, axis=0, keep_dims=True)
    tl.store(partials_ptr + columns, total, mask=columns < width)


@triton.jit
def _gelu(x):
    e, r = _decay(x)
    return x * tl.where(x < 0.0, e * r, r)


@triton.jit
def _slope(x):
    """Return the derivative of gelu at x."""
    e, r = _decay(x)
    # With s = sigmoid(2u): d/dx (x s) = s + x s (1 - s) (2u)', and s (1 - s) = e r². Where e is 0
    # the second term is 0, but (2u)' may overflow, and 0 * inf would be NaN.
    slope = tl.where(e == 0.0, 0.0, x * (e * r * r) * (LINEAR + 3.0 * CUBIC * (x * x)))
    return tl.where(x < 0.0, e * r, r) + slope


@triton.jit
def _decay(x):
    """Return e = exp(-|2u|) and r = 1 / (1 + e).

    sigmoid(2u) is r for positive x and e r for negative x, without overflow or cancellation.
    """
    e = tl.exp2(-tl.abs(x * (LINEAR * LOG2_E + CUBIC * LOG2_E * (x * x))))
    return e, 1.0 / (1.0 + e)


@triton.jit
def _block(n_elements, BLOCK: tl.constexpr):
    # int64: tensors may have more than 2^31 elements
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < n_elements


@triton.jit
def _tile(tile, columns, n_rows, width, ROWS: tl.constexpr):
    """Return the offsets of a tile of rows, [ROWS, COLUMNS], and their mask."""
    rows = tl.full([ROWS, 1], tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return rows * width + columns, (rows < n_rows) & (columns < width)


def _launch(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    """Launch an elementwise kernel on contiguous tensors of the same size."""
    n_elements = tensors[0].numel()
    if n_elements == 0:  # CUDA rejects empty grids
        return
    with on_device(tensors[0]):
        grid = (triton.cdiv(n_elements, FLAT.constants["BLOCK"]),)
        kernel[grid](*tensors, n_elements, **FLAT.kwargs)


def _launch_by_columns(
    kernel: triton.JITFunction, config: LaunchConfig, x: Tensor, *tensors: Tensor
) -> None:
    """Launch a kernel on `x`, contiguous `[..., C]`, and further tensors.

    The grid is (blocks of columns) × (programs that share the rows of a block).
    """
    if x.numel() == 0:  # CUDA rejects empty grids
        return
    width = x.size(-1)
    grid = (triton.cdiv(width, config.constants["COLUMNS"]), _n_programs(x, config))
    with on_device(x):
        kernel[grid](x, *tensors, x.numel() // width, width, **config.kwargs)


def _n_programs(x: Tensor, config: LaunchConfig) -> int:
    """Return the number of programs that share the rows of a block of columns; 0 if x is empty."""
    if x.numel() == 0:
        return 0
    width, rows, columns = x.size(-1), config.constants["ROWS"], config.constants["COLUMNS"]
    programs = config.programs_per_sm * n_multiprocessors(x.device)
    return min(
        max(1, programs // triton.cdiv(width, columns)), triton.cdiv(x.numel() // width, rows)
    )


def _check_bias(x: Tensor, bias: Tensor) -> None:
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"gelu: bias must have shape [C], C being the last dimension of x, {tuple(x.shape)}, "
            f"not {tuple(bias.shape)}"
        )
