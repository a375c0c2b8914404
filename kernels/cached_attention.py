"""Attention of new queries against a key/value cache.

The reference implementation is `fastgpt.ops.reference.cached_attention`.

With one new query per row, as in token-by-token generation, attention is limited by the memory
bandwidth of reading the cache. The matrix units would be mostly idle in a product with one row, so
`_attend_one` uses ordinary multiply-adds: about five instructions for a key and its value, a
fraction of what a GPU executes in the time of their load. Several new queries (a prompt) use the
matrix units in `_attend_tile`.

Where rows, heads and blocks of queries are too few to fill the GPU, the keys are split between
programs, whose results `_combine` merges (flash-decoding: Dao et al. 2023,
https://pytorch.org/blog/flash-decoding). Each program computes its range of keys on the device from
the row's length, without a synchronization with the host. The number of splits depends on the
shapes only, so the same inputs give bitwise identical results.
"""

from collections.abc import Iterator
from dataclasses import replace
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
    n_multiprocessors,
    on_device,
    upcast,
    uses_tf32,
)

HEAD_BLOCKS = (64, 128)  # heads are padded to one of these widths, in registers only
COMMON = (("bf16", 64), ("fp32", 64))  # the configurations that `variants` marks as common
UNALIGNED = ("n_head", "n_new", "n_rows", "n_splits")  # integers that are rarely multiples of 16
MAX_SPLITS = 64  # the number of parts that _combine merges in one tile

# Target number of programs per multiprocessor. A program of _attend_one has 16 to 24 KB of loads in
# flight, and saturating the memory takes about 25 KB per multiprocessor (4.5 TB/s with a latency of
# 0.7 µs, divided by 132 multiprocessors). Four programs also provide enough warps for the
# arithmetic.
ONE_PER_PROCESSOR = 4
TILES_PER_PROCESSOR = 2


def cached_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention of the newest T positions over a cache that already contains them.

    There is no backward.

    Args:
        q: `[B, H, T, D]`, any strides, D from 1 to 128; fp32, fp16 or bf16 (computed in fp32), or
            fp64.
        k_cache, v_cache: `[B, H, S, D]` in the dtype of `q`. The stride of the last dimension must
            be 1, the others are arbitrary: caches are never copied.
        lengths: int64 `[B]`, the number of filled positions of each row, including the T new ones:
            from T to S.

    Returns:
        `[B, H, T, D]`. Its memory layout is `[B, T, H, D]`, so that merging the heads is a view.
        Cache contents past a row's length have no effect. A query that sees no position, in a row
        with a length below T, yields NaN, as in the reference. For reads, lengths above S are
        clamped to S.

    Raises:
        ValueError: if a shape, dtype, stride or device is not supported.
    """
    _check(q, k_cache, v_cache, lengths)
    batch, n_head, n_new, head_dim = q.shape
    out = q.new_empty(batch, n_new, n_head, head_dim).transpose(1, 2)
    if out.numel() == 0:  # CUDA rejects empty grids
        return out
    if q.stride(-1) != 1:
        q = q.contiguous()  # q is small compared with the caches
    config = _select_config(q.dtype, n_new, head_dim)
    n_rows = batch * n_head * n_new
    n_blocks = batch * n_head * triton.cdiv(n_new, config.constants["BLOCK_M"])
    n_tiles = triton.cdiv(k_cache.size(2), config.constants["BLOCK_N"])
    n_splits = _n_splits(q.device, n_new, n_blocks, n_tiles)
    partial = out
    # Buffer of the splits: the results [n_rows, n_splits, head_dim], followed by the logarithms of
    # their sums of exponentials [n_rows, n_splits].
    if n_splits > 1:
        size = n_rows * n_splits * (head_dim + 1)
        partial = q.new_empty(size, dtype=compute_dtype(q.dtype))
    with on_device(q):
        _kernel(config)[(n_blocks * n_splits,)](
            *(q, k_cache, v_cache, lengths, partial),
            *(*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], lengths.stride(0)),
            *(n_head, n_new, k_cache.size(2), head_dim, n_rows, n_splits),
            SPLIT=n_splits > 1,
            **config.kwargs,
        )
        if n_splits > 1:
            sizes = (n_head, n_new, head_dim, n_rows, n_splits)
            config = _combine_config(_padded_head_dim(head_dim))
            _combine[(n_rows,)](partial, out, *sizes, **config.kwargs)
    return out


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that the launcher can launch on a GPU of a compute capability."""
    for dtype, block_d in product(DTYPES.values(), HEAD_BLOCKS):
        common = (dtype, block_d) in COMMON
        wide = "*fp64" if dtype == "fp64" else "*fp32"
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
        types |= {"lengths_ptr": "*i64", "partial_ptr": wide}
        configs = _configs(dtype, block_d, tf32=False)
        if dtype == "fp32":
            configs += _configs(dtype, block_d, tf32=True)[1:]  # the first one does not use TF32
        for config, split in product(configs, (True, False)):
            # Tiles of 16 rows are too small for the matrix instruction of sm_90 (HGMMA). Triton
            # uses that of sm_80 (HMMA) instead.
            matrix = config.constants["BLOCK_M"] > (16 if capability == 90 else 1)
            yield describe(
                _kernel(config),
                types | {"out_ptr": wide if split else f"*{dtype}"},
                replace(config, constants=config.constants | {"SPLIT": split}),
                matrix=matrix,
                unaligned=UNALIGNED,
                common=common,
            )
        types["out_ptr"] = f"*{dtype}"
        config = _combine_config(block_d)
        yield describe(_combine, types, config, unaligned=UNALIGNED, common=common)


@triton.jit
def _attend_one(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, lengths_b,
    n_head, n_new, n_cache, head_dim, n_rows, n_splits,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the attention of one query over one part of its keys; n_new and BLOCK_M are 1.

    Each of the BLOCK_N positions of a tile has its own running maximum, sum and result, over the
    keys n, n + BLOCK_N, ... of the part. There are no reductions over keys inside the loop; the
    positions are merged after it.
    """
    split = tl.program_id(0) % n_splits
    row = tl.program_id(0) // n_splits
    b, h = (row // n_head).to(tl.int64), (row % n_head).to(tl.int64)
    end = tl.minimum(tl.load(lengths_ptr + b * lengths_b), n_cache).to(tl.int32)
    first, last = _split_range(end, split, n_splits, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    q = upcast(tl.load(q_ptr + b * q_b + h * q_h + d, mask=inside, other=0.0))
    q *= _log2_scale(head_dim, q.dtype)
    n = first + tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + b * k_b + h * k_h + n.to(tl.int64)[:, None] * k_n + d[None, :]
    v_ptrs = v_ptr + b * v_b + h * v_h + n.to(tl.int64)[:, None] * v_n + d[None, :]
    step_k, step_v = tl.cast(BLOCK_N, tl.int64) * k_n, tl.cast(BLOCK_N, tl.int64) * v_n

    # Online softmax for each position: maximum, sum of exponentials and weighted sum of values.
    maximum = tl.full((BLOCK_N,), float("-inf"), q.dtype)
    total = tl.zeros((BLOCK_N,), q.dtype)
    acc = tl.zeros((BLOCK_N, BLOCK_D), q.dtype)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        filled = start + tl.arange(0, BLOCK_N) < last
        # Values past the end are loaded as 0: the cache may hold NaN there, and 0 * NaN is NaN.
        mask = filled[:, None] & inside[None, :]
        k = upcast(tl.load(k_ptrs, mask=mask, other=0.0))
        v = upcast(tl.load(v_ptrs, mask=mask, other=0.0))
        score = tl.where(filled, tl.sum(q[None, :] * k, 1), float("-inf"))
        maximum, finite, decay = _update_maximum(maximum, score)
        p = tl.exp2(score - finite)
        total = total * decay + p
        acc = acc * decay[:, None] + p[:, None] * v
        k_ptrs += step_k
        v_ptrs += step_v

    # Merge the positions: rescale their sums from their own maxima to the overall one.
    highest = tl.max(maximum, 0)
    p = tl.exp2(maximum - _finite(highest))
    total = tl.sum(total * p, 0)
    acc = tl.sum(acc * p[:, None], 0)
    if SPLIT:
        part = row.to(tl.int64) * n_splits + split
        # An empty part stores a result of 0 and, as `highest` is -inf, the logarithm -inf.
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + part * head_dim + d, acc / total, mask=inside)
        log_ptr = out_ptr + tl.cast(n_rows, tl.int64) * n_splits * head_dim
        tl.store(log_ptr + part, highest + tl.log2(total))
    else:
        out_ptrs = out_ptr + row.to(tl.int64) * head_dim + d  # T is 1: [B, T, H, D] is [B, H, D]
        tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attend_tile(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, lengths_b,
    n_head, n_new, n_cache, head_dim, n_rows, n_splits,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the attention of BLOCK_M queries of one row and head over one part of their keys.

    The parts divide the keys that at least one of the queries sees.
    """
    split = tl.program_id(0) % n_splits
    block = tl.program_id(0) // n_splits
    n_blocks = tl.cdiv(n_new, BLOCK_M)
    row = block // n_blocks
    block = n_blocks - 1 - block % n_blocks  # the last queries, which see the most keys, first
    b, h = (row // n_head).to(tl.int64), (row % n_head).to(tl.int64)
    length = tl.load(lengths_ptr + b * lengths_b).to(tl.int32)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Query t is at position length - n_new + t and sees the keys up to its own position. `end` is
    # the number of keys that the last query of the block sees.
    visible = tl.minimum(length - n_new + t + 1, n_cache)
    end = tl.minimum(tl.minimum(length, n_cache), length - n_new + (block + 1) * BLOCK_M)
    first, last = _split_range(end, split, n_splits, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    n = first + tl.arange(0, BLOCK_N)
    q_ptrs = q_ptr + b * q_b + h * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
    k_ptrs = k_ptr + b * k_b + h * k_h + n.to(tl.int64)[:, None] * k_n + d[None, :]
    v_ptrs = v_ptr + b * v_b + h * v_h + n.to(tl.int64)[:, None] * v_n + d[None, :]
    step_k, step_v = tl.cast(BLOCK_N, tl.int64) * k_n, tl.cast(BLOCK_N, tl.int64) * v_n
    q = tl.load(q_ptrs, mask=(t < n_new)[:, None] & inside[None, :], other=0.0)
    wide: tl.constexpr = tl.float64 if q.dtype == tl.float64 else tl.float32
    scale = _log2_scale(head_dim, wide)

    maximum = tl.full((BLOCK_M,), float("-inf"), wide)
    total = tl.zeros((BLOCK_M,), wide)
    acc = tl.zeros((BLOCK_M, BLOCK_D), wide)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < last)[:, None] & inside[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=wide) * scale
        seen = (n[None, :] < visible[:, None]) & (n < last)[None, :]
        score = tl.where(seen, score, float("-inf"))
        maximum, finite, decay = _update_maximum(maximum, tl.max(score, 1))
        p = tl.exp2(score - finite[:, None])
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        acc = tl.dot(
            p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION, out_dtype=wide
        )
        k_ptrs += step_k
        v_ptrs += step_v

    mask = (t < n_new)[:, None] & inside[None, :]
    t = t.to(tl.int64)
    if SPLIT:
        part = (row.to(tl.int64) * n_new + t) * n_splits + split
        # A query that sees no key of this part stores a result of 0 and the logarithm -inf.
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + part[:, None] * head_dim + d[None, :], acc / total[:, None], mask=mask)
        log_ptr = out_ptr + tl.cast(n_rows, tl.int64) * n_splits * head_dim
        tl.store(log_ptr + part, maximum + tl.log2(total), mask=t < n_new)
    else:
        out_ptrs = out_ptr + (((b * n_new + t) * n_head + h) * head_dim)[:, None] + d[None, :]
        tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine(
    partial_ptr, out_ptr, n_head, n_new, head_dim, n_rows, n_splits,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query, weighted by their shares of the total sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)  # (b * n_head + h) * n_new + t
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    part = row * n_splits + split
    exists = split < n_splits
    log_ptr = partial_ptr + tl.cast(n_rows, tl.int64) * n_splits * head_dim
    log = tl.load(log_ptr + part, mask=exists, other=float("-inf"))
    acc = tl.load(
        partial_ptr + part[:, None] * head_dim + d[None, :],
        mask=exists[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    p = tl.exp2(log - _finite(tl.max(log, 0)))
    acc = tl.sum(acc * p[:, None], 0) / tl.sum(p, 0)
    b, h, t = row // (n_head * n_new), row // n_new % n_head, row % n_new
    out_ptrs = out_ptr + ((b * n_new + t) * n_head + h) * head_dim + d
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=d < head_dim)


@triton.jit
def _split_range(end, split, n_splits, BLOCK_N: tl.constexpr):
    """Return the range of keys [first, last) of a part.

    Each part is a range of consecutive tiles; their numbers of tiles differ by at most one. If
    there are fewer tiles than parts, some parts are empty.
    """
    n_tiles = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    first = split * n_tiles // n_splits * BLOCK_N
    last = (split + 1) * n_tiles // n_splits * BLOCK_N
    return first, tl.minimum(last, end)


@triton.jit
def _update_maximum(maximum, score):
    """Return the new maximum, the same made finite, and the factor that rescales earlier sums."""
    new = tl.maximum(maximum, score)
    finite = _finite(new)
    return new, finite, tl.exp2(maximum - finite)


@triton.jit
def _finite(maximum):
    """Replace -inf, the maximum of no scores, by 0, because -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _log2_scale(head_dim, dtype: tl.constexpr):
    """Return the factor from dot products to exponents of two: log2(e) / sqrt(head_dim)."""
    return LOG2_E / tl.sqrt(tl.cast(head_dim, dtype))


def _kernel(config: LaunchConfig) -> triton.JITFunction:
    """Return the kernel of a configuration: `_attend_one` for tiles of one query."""
    return _attend_one if config.constants["BLOCK_M"] == 1 else _attend_tile


def _select_config(dtype: torch.dtype, n_new: int, head_dim: int) -> LaunchConfig:
    """Return the launch configuration for `n_new` queries per row: the smallest fitting tile."""
    configs = _configs(DTYPES[dtype], _padded_head_dim(head_dim), uses_tf32())
    return next((c for c in configs if n_new <= c.constants["BLOCK_M"]), configs[-1])


def _configs(dtype: str, block_d: int, tf32: bool) -> list[LaunchConfig]:
    """Return the launch configurations, ordered by the number of queries in a tile."""
    if dtype == "fp64":  # used for tests only; 8 warps for 128 columns spill on sm_100
        return [_tile_config(16, 2048 // block_d, block_d, "ieee", num_warps=block_d // 8)]
    # Each of the 128 threads holds 16 elements of keys and 16 of values, in 128-bit loads.
    tile = {"BLOCK_M": 1, "BLOCK_N": 2048 // block_d, "BLOCK_D": block_d, "STAGES": 3}
    one = LaunchConfig(tile, num_warps=4)
    num_warps = 4 if block_d == 64 else 8  # the results of 64 queries take 32 registers a thread
    if dtype == "fp32" and tf32:
        return [one, _tile_config(64, 32, block_d, "tf32", num_warps)]
    if dtype == "fp32":  # without matrix units, registers limit the size of the tile
        block_m = 64 if block_d == 64 else 16
        return [one, _tile_config(block_m, 32, block_d, "ieee", num_warps=8, max_registers=128)]
    few = _tile_config(16, 64, block_d, "ieee", num_warps=4)
    return [one, few, _tile_config(64, 64, block_d, "ieee", num_warps)]


def _tile_config(
    block_m: int,
    block_n: int,
    block_d: int,
    precision: str,
    num_warps: int,
    max_registers: int = 255,
) -> LaunchConfig:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": 2}
    # Without a limit of registers ptxas may spill one or two for another block per multiprocessor.
    return LaunchConfig(tile | {"PRECISION": precision}, num_warps, max_registers=max_registers)


def _combine_config(block_d: int) -> LaunchConfig:
    return LaunchConfig({"BLOCK_S": MAX_SPLITS, "BLOCK_D": block_d}, num_warps=4)


def _n_splits(device: torch.device, n_new: int, n_blocks: int, n_tiles: int) -> int:
    """Return the number of parts into which to split the keys in order to fill the GPU.

    n_blocks: number of programs without a split. n_tiles: number of tiles of keys in a full cache.
    """
    wanted = ONE_PER_PROCESSOR if n_new == 1 else TILES_PER_PROCESSOR
    enough = triton.cdiv(wanted * n_multiprocessors(device), n_blocks)
    return min(enough, n_tiles, MAX_SPLITS)


def _padded_head_dim(head_dim: int) -> int:
    return next(block for block in HEAD_BLOCKS if head_dim <= block)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless the launcher supports the shapes, dtypes and strides."""
    name = "cached_attention"
    check_tensors(name, q=q, k_cache=k_cache, v_cache=v_cache)
    check_devices(name, q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"{name}: q, k_cache and v_cache must have one dtype, "
            f"not {q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{name}: q must be [B, H, T, D], k_cache and v_cache [B, H, S, D], "
            f"not {list(q.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    batch, n_head, n_new, head_dim = q.shape
    if k_cache.shape[:2] != q.shape[:2] or k_cache.size(3) != head_dim:
        raise ValueError(
            f"{name}: the caches must be [{batch}, {n_head}, S, {head_dim}] for q {list(q.shape)}, "
            f"not {list(k_cache.shape)}"
        )
    if n_new > k_cache.size(2):
        raise ValueError(
            f"{name}: the caches hold {k_cache.size(2)} positions, but the {n_new} new ones of q "
            "must be among them"
        )
    if not 1 <= head_dim <= HEAD_BLOCKS[-1]:
        raise ValueError(
            f"{name}: head dims from 1 to {HEAD_BLOCKS[-1]} are supported, not {head_dim}; use "
            'ops="native"'
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"{name}: the last dimension of the caches must have stride 1 (they are not copied), "
            f"not {k_cache.stride(3)} and {v_cache.stride(3)}; allocate contiguous caches"
        )
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"{name}: lengths must be int64 [{batch}], not {lengths.dtype} {list(lengths.shape)}"
        )
