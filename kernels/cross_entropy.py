"""The cross-entropy of the tied output head and its gradients, computed in chunks of logits.

The reference implementation is `fastgpt.ops.reference.linear_cross_entropy`. cuBLAS computes the
logits of a chunk of rows into a buffer that all chunks share; a kernel reads them, stores the loss
of each row and overwrites the logits with their gradient in place; two more matrix products turn
that into the gradients of x and the weight. Cut Cross-Entropy (Wijmans et al. 2024,
arXiv:2411.09009) does not store logits at all, but needs a second product to recompute them. Here
the chunks are large, because products with few rows leave most of a GPU idle.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import (
    DTYPES,
    LOG2_E,
    LaunchConfig,
    Variant,
    check_devices,
    check_tensors,
    compute_dtype,
    describe,
    on_device,
    upcast,
)

# Maximum size of a chunk of logits: 16,896 rows of GPT-2's vocabulary in 16 bits.
MAX_BYTES = 1_700_000_000
# The number of columns is padded to a multiple of this, so that each row of logits starts on a
# cache line, which also suits cuBLAS.
PADDING = 128
LONG_ROW = 16_384  # rows of at least this many columns use 16 warps; these do not spill either

LOG_2 = tl.constexpr(math.log(2.0))


@torch.no_grad()
def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    need_x: bool = True,
    need_weight: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the mean cross-entropy of the logits ``x @ weight.T`` and its gradients.

    The gradients are those of the *sum* of the losses, in the dtype of the loss. In this form they
    do not underflow, a sum over thousands of rows does not overflow, and the caller, which knows
    the gradient of the loss, rounds only once. Multiplied by
    ``grad_loss / n_counted.clamp(min=1)`` they equal the gradients of PyTorch's `cross_entropy`,
    including zeros if no target is counted.

    Args:
        x: `[N, C]`; fp32, fp16, bf16 or fp64.
        weight: `[V, C]`, converted to the dtype of `x`.
        targets: int64 `[N]`.
        ignore_index: target value of the rows that are excluded from the loss.
        need_x, need_weight: whether to compute the gradients of `x` and `weight`.
        chunk: number of rows per chunk (None: as many as `MAX_BYTES` of logits allow).

    Returns:
        The loss, the mean over the targets other than `ignore_index`, a scalar in fp32 (fp64 for
        fp64); it is NaN if there are none, or if one of them is outside [0, V). The number of these
        targets, an int64 scalar on the device, which is not synchronized with the host. The
        gradients of `x` and `weight`, or None where not needed.

    Raises:
        ValueError: for unsupported inputs.
    """
    _check(x, weight, targets, chunk)
    n_rows, n_vocab = x.size(0), weight.size(0)
    n_padded = triton.cdiv(n_vocab, PADDING) * PADDING
    rows = _rows(n_rows, n_padded * x.element_size()) if chunk is None else min(chunk, n_rows)
    weight = _padded(weight, n_padded, x.dtype)
    targets = targets.contiguous()  # a few bytes a row

    wide = compute_dtype(x.dtype)
    losses = x.new_empty(n_rows, dtype=wide)
    logits = x.new_empty(rows, n_padded)
    grad_x = x.new_empty(x.shape, dtype=wide) if need_x else None
    new = weight.new_empty if n_rows else weight.new_zeros  # the first chunk overwrites it
    grad_weight = new(weight.shape, dtype=wide) if need_weight else None
    for start in range(0, n_rows, max(rows, 1)):
        here = slice(start, start + rows)
        chunk_logits = logits[: min(rows, n_rows - start)]
        torch.mm(x[here], weight.T, out=chunk_logits)
        per_row = targets[here], losses[here]
        _launch(chunk_logits, *per_row, n_vocab, ignore_index, gradient=need_x or need_weight)
        if grad_x is not None:
            _multiply(grad_x[here], chunk_logits, weight)
        if grad_weight is not None:
            _multiply(grad_weight, chunk_logits.T, x[here], add=start > 0)
    n_counted = (targets != ignore_index).sum()
    if grad_weight is not None:
        grad_weight = grad_weight[:n_vocab]
    return losses.sum() / n_counted, n_counted, grad_x, grad_weight


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that the launcher can launch on a GPU of a compute capability."""
    for dtype, name in DTYPES.items():
        types = {
            "logits_ptr": f"*{name}",
            "targets_ptr": "*i64",
            "losses_ptr": f"*{DTYPES[compute_dtype(dtype)]}",
        }
        for n_padded, gradient in product((PADDING, LONG_ROW), (True, False)):
            yield describe(_cross_entropy, types, _config(dtype, n_padded, gradient))


# These two integers are arbitrary: specializing them on 1 and multiples of 16 gains nothing.
@triton.jit(do_not_specialize=("n_vocab", "ignore_index"))
def _cross_entropy(
    logits_ptr,  # [rows, n_padded]
    targets_ptr,  # [rows]
    losses_ptr,  # [rows]
    n_vocab,
    n_padded,
    ignore_index,
    GRADIENT: tl.constexpr,  # whether to replace the logits by their gradient
    SCALE: tl.constexpr,  # factor of that gradient
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,  # adjacent columns that a lane loads together: 128 bits
):
    """Compute the loss of one row and, if GRADIENT, overwrite its logits with their gradient.

    The row is read twice: a first pass computes the maximum and the sum of exponentials; a second
    one computes (softmax - one_hot(target)) * SCALE in place. Padding columns get gradient 0, so
    they do not contribute to the matrix products that follow.
    """
    row = tl.program_id(0).to(tl.int64)  # int64: rows × n_padded exceeds 2^31
    target = tl.load(targets_ptr + row)
    logits_ptr += row * n_padded
    # [LANES, WIDTH]: each lane processes WIDTH adjacent columns.
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([LANES, WIDTH], logits_ptr.dtype.element_ty)
            for start in range(0, n_padded, LANES * WIDTH):
                tl.store(logits_ptr + start + columns, zeros, mask=start + columns < n_padded)
    else:
        column = tl.where((target >= 0) & (target < n_vocab), target, -1).to(tl.int32)
        # Read the target's logit before the reductions, which synchronize the warps: later another
        # warp may have overwritten it with its gradient.
        chosen = upcast(tl.load(logits_ptr + column, mask=column >= 0, other=0.0))
        largest, total = _max_and_sum_exp(logits_ptr, columns, n_vocab, n_padded, LANES, WIDTH)
        # An invalid target makes the loss and the gradient of the row NaN.
        total = tl.where(column >= 0, total, float("nan"))
        log2_total = tl.log2(total)
        tl.store(losses_ptr + row, (largest - chosen) + log2_total * LOG_2)
        if GRADIENT:
            at_target = (tl.exp2((chosen - largest) * LOG2_E - log2_total) - 1.0) * SCALE
            full = n_vocab // (LANES * WIDTH) * (LANES * WIDTH)
            # The second pass runs backwards: the end of the row was read last and is most likely
            # still in the cache.
            x = _load_last_block(logits_ptr + full, columns, n_vocab - full, n_padded - full)
            p = tl.exp2((x - largest) * LOG2_E - log2_total)  # 0 in the padding, where x is -inf
            gradient = tl.where(columns == column - full, at_target, p * SCALE)
            _store(logits_ptr + full + columns, gradient, columns < n_padded - full)
            for done in range(0, full, LANES * WIDTH):
                start = full - LANES * WIDTH - done
                x = upcast(tl.load(logits_ptr + start + columns))
                p = tl.exp2((x - largest) * LOG2_E - log2_total)
                gradient = tl.where(columns == column - start, at_target, p * SCALE)
                _store(logits_ptr + start + columns, gradient, None)


@triton.jit
def _max_and_sum_exp(
    logits_ptr, columns, n_vocab, n_padded, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the largest logit of a row and the sum of exp(logit - largest).

    This is the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867). Each lane processes
    its own columns: there is no communication between lanes before the end, and a lane rescales its
    sum only once per WIDTH columns.
    """
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    # The initial maximum is finite, so that a lane with only padding does not compute -inf - -inf.
    # The loss of a row whose logits are all finite and below it would be wrong.
    # (A lower number would overflow to -inf in `_accumulate`, which is harmless on a GPU but an
    # error in the interpreter.)
    largest = tl.full([LANES], -1e38, dtype)
    total = tl.zeros([LANES], dtype)
    full = n_vocab // (LANES * WIDTH) * (LANES * WIDTH)  # columns that need no mask
    for start in range(0, full, LANES * WIDTH):
        x = upcast(tl.load(logits_ptr + start + columns))
        largest, total = _accumulate(x, largest, total)
    x = _load_last_block(logits_ptr + full, columns, n_vocab - full, n_padded - full)
    largest, total = _accumulate(x, largest, total)
    overall = tl.max(largest)
    return overall, tl.sum(total * tl.exp2((largest - overall) * LOG2_E))


@triton.jit
def _accumulate(x, largest, total):
    """Update each lane's running maximum and sum of exponentials with the logits x."""
    larger = tl.maximum(largest, tl.max(x, axis=1))
    # Subtract before multiplying by log2(e): the product of a large logit and log2(e) would carry a
    # large rounding error.
    total *= tl.exp2((largest - larger) * LOG2_E)
    return larger, total + tl.sum(tl.exp2((x - larger[:, None]) * LOG2_E), axis=1)


@triton.jit
def _load_last_block(logits_ptr, columns, n_vocab, n_padded):
    """Load the last, partial block of columns, with -inf in the padding."""
    # n_padded is a multiple of 16 and thus of WIDTH: its mask is uniform within each 128-bit load,
    # unlike a mask of n_vocab. The padding is excluded after the load.
    x = upcast(tl.load(logits_ptr + columns, mask=columns < n_padded, other=0.0))
    return tl.where(columns < n_vocab, x, float("-inf"))


@triton.jit
def _store(pointers, gradient, mask):
    # ".cs" (streaming): the gradient is not read again before it would be evicted from the cache.
    tl.store(pointers, gradient.to(pointers.dtype.element_ty), mask=mask, cache_modifier=".cs")


def _launch(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    n_vocab: int,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Store the loss of each row and, if `gradient`, overwrite the logits with their gradient."""
    n_rows, n_padded = logits.shape
    config = _config(logits.dtype, n_padded, gradient)
    with on_device(logits):
        _cross_entropy[(n_rows,)](
            logits, targets, losses, n_vocab, n_padded, ignore_index, **config.kwargs
        )


def _config(dtype: torch.dtype, n_padded: int, gradient: bool) -> LaunchConfig:
    """Return the launch configuration for rows of `n_padded` columns."""
    warps = 16 if n_padded >= LONG_ROW else 4
    constants = {
        "GRADIENT": gradient,
        "SCALE": _scale(dtype),
        "LANES": 32 * warps,
        "WIDTH": 16 // dtype.itemsize,
    }
    return LaunchConfig(constants, warps)


def _scale(dtype: torch.dtype) -> float:
    """Return the factor by which the gradient of the logits is scaled while stored in `dtype`.

    The gradient lies in [-1, 1], and most of it consists of probabilities of about 1/V or far less.
    In fp16, values below 6e-8 underflow and those below 6e-5 are subnormal and lose bits. Scaled by
    2^15, these limits are 2e-12 and 2e-9, and the largest value still fits. The matrix products of
    the scaled gradient are in fp32, where the scale is removed exactly.
    """
    return 2.0**15 if dtype == torch.float16 else 1.0


def _multiply(out: Tensor, scaled: Tensor, b: Tensor, add: bool = False) -> None:
    """Compute ``out = scaled @ b / scale`` in fp32 or fp64, or add it to `out` if `add`."""
    if out.dtype == scaled.dtype:  # not fp16, so not scaled
        torch.addmm(out, scaled, b, beta=float(add), out=out)  # with beta 0, out is not read
    elif add:  # in two steps: not every PyTorch version has addmm from 16 bits to fp32
        out.add_(_product(scaled, b, out.dtype), alpha=1.0 / _scale(scaled.dtype))
    else:
        _product(scaled, b, out.dtype, out)
        if _scale(scaled.dtype) != 1.0:
            out.mul_(1.0 / _scale(scaled.dtype))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return ``a @ b`` computed in a wider dtype."""
    if a.device.type == "cpu":  # `out_dtype` is not supported on CPUs
        return torch.mm(a.to(dtype), b.to(dtype), out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def _padded(weight: Tensor, n_padded: int, dtype: torch.dtype) -> Tensor:
    """Return `weight` in `dtype`, padded with rows of zeros to `n_padded`; no copy if unchanged."""
    if weight.size(0) == n_padded:
        return weight.to(dtype)
    padded = weight.new_empty(n_padded, weight.size(1), dtype=dtype)
    padded[: weight.size(0)].copy_(weight)
    padded[weight.size(0) :].zero_()
    return padded


def _rows(n_rows: int, row_bytes: int) -> int:
    """Return the number of rows per chunk, such that all chunks have about the same size."""
    at_most = max(1, MAX_BYTES // row_bytes)
    return triton.cdiv(n_rows, max(1, triton.cdiv(n_rows, at_most)))


def _check(x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> None:
    name = "linear_cross_entropy"
    check_tensors(name, x=x, weight=weight)
    check_devices(name, x=x, weight=weight, targets=targets)
    if targets.dtype != torch.int64:
        raise ValueError(f"{name}: targets must be torch.int64, not {targets.dtype}")
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1) or not weight.numel():
        raise ValueError(
            f"{name}: x must be [N, C] and weight [V, C], with the same C and neither V nor C 0, "
            f"not {list(x.shape)} and {list(weight.shape)}"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: there must be one target for each row of x, so {list(x.shape[:1])} for x of "
            f"{list(x.shape)}, not {list(targets.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name}: chunk must be at least 1 row, not {chunk}")
