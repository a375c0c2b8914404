"""Layer normalization over the last dimension, alone or fused with a residual addition.

The reference implementations are `fastgpt.ops.reference.layer_norm` and `add_layer_norm`.

A program of the forward holds several whole rows in registers. It reads them once and computes the
mean and then the variance of the centered values (the mean of squares minus the squared mean would
suffer from cancellation). The backward reads the rows, normalizes them again with the saved mean
and 1 / std, and accumulates the gradients of weight and bias in the same pass: it is a persistent
kernel, in which a few programs per multiprocessor iterate over all rows and keep the sums in
registers. `fastgpt.kernels.column_sum` adds up the sums of the programs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.column_sum import add_up
from fastgpt.kernels.common import (
    DTYPES,
    LaunchConfig,
    Variant,
    capability,
    check_tensors,
    compute_dtype,
    describe,
    n_multiprocessors,
    on_device,
    upcast,
)

# Rows are held entirely in registers; wider ones would spill.
MAX_WIDTH = 8192
MAX_WIDTH_FP64 = 2048
MIN_BLOCK = 128


class Gradients(NamedTuple):
    """Results of `layer_norm_backward`."""

    total: Tensor
    x: Tensor | None
    weight: Tensor
    bias: Tensor | None


def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return ``total = x + residual``, the normalized total, and the mean and 1 / std of each row.

    Args:
        x, residual: `[..., C]`, any strides, C at most 8192 (2048 for fp64); without a residual,
            total is `x`.
        weight, bias: `[C]`. All inputs may be fp32, fp16 and bf16 in any combination (computed in
            fp32), or all fp64.
        eps: value added to the variance.
        out_dtype: dtype of the normalized result (None: that of total).

    Returns:
        `(total, y, mean, rstd)`. total is contiguous `[..., C]`, in the dtype of PyTorch's type
        promotion (fp32 for fp16 + fp32), or None without a residual; the normalization uses total
        as rounded to this dtype, because the backward recomputes it from the stored tensor. y is
        the normalized total, contiguous `[..., C]`; mean and rstd are `[n_rows]`, fp32 (fp64 for
        fp64).

    Raises:
        ValueError: for unsupported inputs.
    """
    _check_inputs(x, residual, weight, bias, out_dtype)
    x, weight = x.contiguous(), weight.contiguous()
    residual, bias = (None if t is None else t.contiguous() for t in (residual, bias))
    total = None
    if residual is not None:
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = torch.empty_like(x if total is None else total, dtype=out_dtype)
    width, n_rows = weight.numel(), x.shape[:-1].numel()
    mean, rstd = (x.new_empty(n_rows, dtype=compute_dtype(x.dtype)) for _ in range(2))
    if n_rows:  # CUDA rejects empty grids
        config = forward_config(width)
        tensors = (x, residual, weight, bias, total, y, mean, rstd)
        with on_device(x):
            _layer_norm_forward[(triton.cdiv(n_rows, config.constants["ROWS"]),)](
                *tensors, n_rows, width, eps, **config.kwargs
            )
    return total, y, mean, rstd


def layer_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    x_dtype: torch.dtype | None = None,
) -> Gradients:
    """Return the gradients of total, x, weight and bias.

    Args:
        grad_y: gradient of the normalized result, `[..., C]`; any strides, including the expanded
            gradients of autograd.
        grad_total: gradient of total from its other uses, which is added to the result (None: it
            has no other uses); any strides.
        total: the normalized tensor: total of the forward, or its `x` without a residual.
        weight: the argument of the forward.
        mean, rstd: the results of the forward.
        has_bias: whether to compute the gradient of the bias.
        x_dtype: dtype of x in ``total = x + residual`` if it differs from that of total.

    Returns:
        The gradient of total, which is also that of both summands; the gradient of x in `x_dtype`
        if that differs from the dtype of total, rounded from the same fp32 values, else None; the
        gradients of weight and bias (None without `has_bias`) in the dtype of weight.
    """
    _check_gradients(grad_y, grad_total, total, weight, mean, rstd, x_dtype)
    # All are usually contiguous results of kernels. Other layouts are rare (the gradient of a sum
    # has stride 0) and are copied, so that each row is a contiguous range for vectorized loads.
    grad_y, total, weight = grad_y.contiguous(), total.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad = torch.empty_like(total)
    grad_x = None if x_dtype in (None, total.dtype) else torch.empty_like(total, dtype=x_dtype)

    n_rows, width = mean.numel(), weight.numel()
    n_bytes = _max_element_size(grad_y, grad_total, total)
    config = backward_config(width, n_bytes, capability(total.device), has_bias)
    resident = n_multiprocessors(total.device) * config.programs_per_sm
    n_programs = min(triton.cdiv(n_rows, config.constants["ROWS"]), resident)
    partials = torch.empty(1 + has_bias, n_programs, width, dtype=mean.dtype, device=total.device)
    if n_programs:  # CUDA rejects empty grids
        tensors = (grad_y, grad_total, total, weight, mean, rstd, grad, grad_x, partials)
        with on_device(total):
            _layer_norm_backward[(n_programs,)](*tensors, n_rows, width, **config.kwargs)
    grad_weight, grad_bias = (*add_up(partials, weight.dtype), None)[:2]
    return Gradients(grad, grad_x, grad_weight, grad_bias)


def forward_config(width: int) -> LaunchConfig:
    """Return the launch configuration of the forward for rows of `width`.

    A thread holds 8 columns (16 for the widest rows), which is one 128-bit load of 16-bit numbers,
    of several rows. This keeps tens of KB of loads in flight for each multiprocessor, the product
    of its share of the memory bandwidth and the latency.
    """
    block = _block(width)
    return LaunchConfig({"ROWS": max(1, min(4, 8192 // block)), "BLOCK": block}, _n_warps(block))


def backward_config(
    width: int, n_bytes: int, capability: int, has_bias: bool = True
) -> LaunchConfig:
    """Return the launch configuration of the backward for rows of `width`.

    n_bytes: size of an element in the widest of the tensors that it reads. All programs must be
    resident on the multiprocessors at the same time, so that there is no second wave; the limit of
    registers makes this possible. Rows of 32-bit numbers keep as many bytes in flight with fewer
    warps, and need more registers.
    """
    block = _block(width)
    warps = _n_warps(block)
    if n_bytes == 8:  # used for gradient checks only: does not spill, but is not tuned
        rows, programs, registers = 1, 1, None
    elif warps > 8:
        rows, programs, registers = MAX_WIDTH // block, 1, None
    elif n_bytes == 4 and capability == 90 and block >= 1024 and width % 16 == 0:
        # One row at a time: the fastest of a dozen configurations on an H200; it may spill on
        # other GPUs.
        rows, programs, registers = 1, 32 // warps, 128
        warps //= 2
    else:  # accesses of single elements take more registers
        rows, programs, registers = 2 if width % 16 == 0 else 1, 16 // warps, 128
    constants = {"ROWS": rows, "BLOCK": block, "HAS_BIAS": has_bias}
    return LaunchConfig(constants, warps, max_registers=registers, programs_per_sm=programs)


def _block(width: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(width))


def _n_warps(block: int) -> int:
    return min(max(1, block // 256), 16)


# The combinations of dtypes in training: x, the residual stream, weight and bias, y. These are a
# single precision throughout; autocast; and autocast with the residual stream in 16 bits.
AUTOCAST = ("bf16", "fp32", "fp32", "bf16")
MIXES = [*((dtype,) * 4 for dtype in DTYPES.values()), AUTOCAST, ("bf16", "bf16", "fp32", "bf16")]
COMMON = (AUTOCAST, MIXES[-1])
WIDTHS = (768, 1600)
OTHER_WIDTHS = (MIN_BLOCK, 256, 512, 4096, MAX_WIDTH)


def variants(capability: int) -> Iterator[Variant]:
    """Yield configurations that the launchers can launch on a GPU of a compute capability.

    They are all combinations of dtypes that occur in training, in widths of GPT-2, and one of them,
    which needs the most registers, in all widths. Combinations that are not listed, such as fp16
    with bf16, differ only in a conversion or omit a tensor.
    """
    for mix in MIXES:
        for width in WIDTHS + OTHER_WIDTHS * (mix == AUTOCAST):
            common = mix in COMMON and width in (*WIDTHS, MAX_WIDTH)
            yield from _pair(mix, width, capability, common=common)
        yield from _pair(mix, WIDTHS[0], capability, common=mix == AUTOCAST, alone=True)
    yield from _pair(AUTOCAST, 1023, capability, common=True, unaligned=("n_rows", "width"))


def _pair(
    mix: tuple[str, ...],
    width: int,
    capability: int,
    common: bool,
    alone: bool = False,
    unaligned: tuple[str, ...] = (),
) -> Iterator[Variant]:
    """Yield the forward and the backward for a combination of dtypes and a width.

    alone: without a residual.
    """
    x, residual, weight, y = (f"*{dtype}" for dtype in mix)
    wide = "*fp64" if residual == "*fp64" else "*fp32"
    types = {
        "x_ptr": residual if alone else x,
        "residual_ptr": None if alone else residual,
        "grad_total_ptr": None if alone else residual,
        "grad_ptr": residual,
        "grad_x_ptr": None if alone or x == residual else x,
        "y_ptr": y,
        "grad_y_ptr": y,
        "eps": "fp32",
    }
    types |= dict.fromkeys(("weight_ptr", "bias_ptr"), weight)
    types |= dict.fromkeys(("mean_ptr", "rstd_ptr", "partials_ptr"), wide)
    n_bytes = int(residual.lstrip("*bfp")) // 8
    for kernel, config, total in (
        (_layer_norm_forward, forward_config(width), None if alone else residual),
        (_layer_norm_backward, backward_config(width, n_bytes, capability), residual),
    ):
        here = types | {"total_ptr": total}
        yield describe(kernel, here, config, unaligned=unaligned, common=common)


@triton.jit
def _layer_norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr,
    n_rows, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, offsets, present, inside = _tile(tl.program_id(0), n_rows, width, ROWS, BLOCK)
    x = upcast(tl.load(x_ptr + offsets, mask=inside, other=0.0))  # [ROWS, BLOCK]
    weight = _vector(weight_ptr, width, BLOCK)  # [1, BLOCK]
    if bias_ptr is not None:
        bias = _vector(bias_ptr, width, BLOCK)
    if residual_ptr is not None:
        residual = upcast(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=inside)
        x = upcast(total)

    mean = tl.sum(x, axis=1, keep_dims=True) / width  # [ROWS, 1]
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=1, keep_dims=True) / width
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_ptr + rows, mean, mask=present)
    tl.store(rstd_ptr + rows, rstd, mask=present)

    y = centered * rstd * weight
    if bias_ptr is not None:
        y += bias
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_backward(
    grad_y_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_ptr, grad_x_ptr,
    partials_ptr,
    n_rows, width,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    weight = _vector(weight_ptr, width, BLOCK)  # [1, BLOCK]
    grad_weight = tl.zeros([1, BLOCK], partials_ptr.dtype.element_ty)
    grad_bias = tl.zeros([1, BLOCK], partials_ptr.dtype.element_ty)
    for tile in range(program, tl.cdiv(n_rows, ROWS), n_programs):
        _, offsets, _, inside = _tile(tile, n_rows, width, ROWS, BLOCK)
        grad_y = upcast(tl.load(grad_y_ptr + offsets, mask=inside, other=0.0))  # [ROWS, BLOCK]
        total = upcast(tl.load(total_ptr + offsets, mask=inside, other=0.0))
        # The loads are issued early, to be in flight together. The widest rows take all registers:
        # for them, weight is loaded again for each tile, and grad_total where it is added.
        if BLOCK > 4096:
            weight = _vector(weight_ptr, width, BLOCK)
        elif grad_total_ptr is not None:
            grad_total = tl.load(grad_total_ptr + offsets, mask=inside, other=0.0)
        mean = _load_per_row(mean_ptr, tile, n_rows, ROWS)  # [ROWS, 1]
        rstd = _load_per_row(rstd_ptr, tile, n_rows, ROWS)

        normed = (total - mean) * rstd
        grad_weight += tl.sum(grad_y * normed, axis=0, keep_dims=True)
        if HAS_BIAS:
            grad_bias += tl.sum(grad_y, axis=0, keep_dims=True)
        # With xhat = normed and g = grad_y * weight, the gradient of a row is
        # rstd * (g - xhat * mean(g * xhat) - mean(g)). Outside of the tensor g is 0, so the value
        # of xhat there has no effect on the sums.
        grad_normed = grad_y * weight
        along = tl.sum(grad_normed * normed, axis=1, keep_dims=True) / width  # [ROWS, 1]
        level = tl.sum(grad_normed, axis=1, keep_dims=True) / width
        grad = rstd * (grad_normed - normed * along - level)
        if grad_total_ptr is not None:
            if BLOCK > 4096:
                grad_total = tl.load(grad_total_ptr + offsets, mask=inside, other=0.0)
            grad += upcast(grad_total)
        tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + offsets, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)

    columns = tl.arange(0, BLOCK)[None, :]
    partials_ptr += program.to(tl.int64) * width  # [1 or 2, n_programs, C]
    tl.store(partials_ptr + columns, grad_weight, mask=columns < width)
    if HAS_BIAS:
        partials_ptr += n_programs.to(tl.int64) * width
        tl.store(partials_ptr + columns, grad_bias, mask=columns < width)


@triton.jit
def _tile(tile, n_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows [ROWS, 1] and offsets [ROWS, BLOCK] of a tile, and the masks of both."""
    # int64: tensors may have more than 2^31 elements
    rows = tl.full([ROWS, 1], tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    present = rows < n_rows
    return rows, rows * width + columns, present, present & (columns < width)


@triton.jit
def _load_per_row(pointer, tile, n_rows, ROWS: tl.constexpr):
    """Load one number for each row of a tile as [ROWS, 1], with 0 past the last row."""
    # Load in one dimension and reshape: Triton up to 3.8 loads a tensor [ROWS, 1] in the layout of
    # the tile, that is once for each column of a thread, into as many registers.
    rows = tl.full([ROWS], tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.load(pointer + rows, mask=rows < n_rows, other=0.0)[:, None]


@triton.jit
def _vector(pointer, width, BLOCK: tl.constexpr):
    """Load a weight or bias as [1, BLOCK], with 0 past its width."""
    # Load in two dimensions: each thread then loads the columns that it uses, without an exchange.
    columns = tl.arange(0, BLOCK)[None, :]
    return upcast(tl.load(pointer + columns, mask=columns < width, other=0.0))


def _max_element_size(*tensors: Tensor | None) -> int:
    """Return the largest element size, in bytes, of the tensors that are not None."""
    return max(tensor.element_size() for tensor in tensors if tensor is not None)


def _check_inputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError unless the forward kernel supports the tensors."""
    operation = "layer_norm" if residual is None else "add_layer_norm"
    check_tensors(operation, x=x, residual=residual, weight=weight, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{operation}: residual must have the shape of x, {tuple(x.shape)}, "
            f"not {tuple(residual.shape)}"
        )
    given = (tensor for tensor in (x, residual, weight, bias) if tensor is not None)
    _check_dtypes(operation, {*(tensor.dtype for tensor in given), out_dtype} - {None})
    _check_width(operation, x, weight, bias)


def _check_gradients(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError unless the backward kernel supports the tensors."""
    operation = "layer_norm backward"
    gradients = {"grad_y": grad_y, "grad_total": grad_total}
    check_tensors(operation, **gradients, total=total, weight=weight, mean=mean, rstd=rstd)
    for name, grad in gradients.items():
        if grad is not None and grad.shape != total.shape:
            raise ValueError(
                f"{operation}: {name} must have the shape of total, {tuple(total.shape)}, "
                f"not {tuple(grad.shape)}"
            )
    given = [grad for grad in gradients.values() if grad is not None]
    dtypes = {tensor.dtype for tensor in (*given, total, weight, mean, rstd)}
    _check_dtypes(operation, {*dtypes, x_dtype} - {None})
    _check_width(operation, total, weight, None)
    kept, n_rows = compute_dtype(total.dtype), total.shape[:-1].numel()
    for name, tensor in {"mean": mean, "rstd": rstd}.items():
        if tensor.shape != (n_rows,) or tensor.dtype != kept or not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name} must be what the forward returned, ({n_rows},) {kept}, "
                f"not {tuple(tensor.shape)} {tensor.dtype}"
            )


def _check_dtypes(operation: str, dtypes: set[torch.dtype | None]) -> None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            names = ", ".join(map(str, DTYPES))
            raise ValueError(f"{operation}: results must be one of {names}, not {dtype}")
    if torch.float64 in dtypes and len(dtypes) > 1:
        others = ", ".join(sorted(str(dtype) for dtype in dtypes - {torch.float64}))
        raise ValueError(
            f"{operation}: torch.float64 cannot be mixed with {others}; cast all to one dtype"
        )


def _check_width(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    width = x.size(-1) if x.dim() else 0
    largest = MAX_WIDTH_FP64 if x.dtype == torch.float64 else MAX_WIDTH
    if not 1 <= width <= largest:
        raise ValueError(
            f"{operation}: the last dimension must have 1 to {largest} elements in {x.dtype}, but "
            f'the shape is {tuple(x.shape)}; use ops="native" for other sizes'
        )
    for name, vector in {"weight": weight, "bias": bias}.items():
        if vector is not None and vector.shape != (width,):
            raise ValueError(
                f"{operation}: {name} must have shape ({width},), the size of a row, not "
                f"{tuple(vector.shape)}"
            )
