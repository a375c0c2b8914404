"""Attention of new queries against a key/value cache (twin: `reference.cached_attention`).

One new query a row, which is how text is written, is bound by how fast the cache is read. A product
with one row would leave matrix units idle, so `_attend_one` multiplies and adds plainly: about five
instructions for a key and its value, a fraction of what a GPU does in the time of their load.
Several new queries (a prompt) go through the matrix units in `_attend_tile`.

Where rows, heads and blocks of queries are too few to fill the GPU, the keys are split between
programs, whose results `_combine` puts together (flash-decoding: Dao et al. 2023,
https://pytorch.org/blog/flash-decoding). Each program finds its part from the row's length, on the
device, so the host never waits for the GPU. How many parts there are depends on the shapes alone,
so the same inputs give the same bits.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import (
    DTYPES,
    LOG2_E,
    Variant,
    check_devices,
    check_tensors,
    multiplies_in_tf32,
    n_processors,
    on_device,
    wide_dtype,
    widen,
)

HEAD_BLOCKS = (64, 128)  # heads are padded to one of these widths, in registers only
COMMON = (("bf16", 64), ("fp32", 64))  # of the forms that `variants` lists
MAX_SPLITS = 64  # what _combine takes in one tile

# Programs wanted for each multiprocessor. Those of _attend_one have 16 to 24 KB of loads under way
# each, and memory wants about 25 KB a multiprocessor (4.5 TB/s for 0.7 µs on 132 of them): four
# also give its arithmetic enough warps.
ONE_PER_PROCESSOR = 4
TILES_PER_PROCESSOR = 2


def cached_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention `[B, H, T, D]` of the newest T positions over a cache that holds them.

    q: `[B, H, T, D]`, any strides, D from 1 to 128. k_cache, v_cache: `[B, H, S, D]`, any strides
    but the last, which is 1: caches are never copied. lengths: int64 `[B]`, the filled positions of
    each row, the T new ones included: from T to S. fp32, fp16, bf16 (computed in fp32) or fp64, the
    same for all three. ValueError names what does not fit.

    What a cache holds past a row's length counts for nothing. A query that would see no position,
    in a row of fewer than T, gets NaN, as from the twin; lengths past S count as S for reading.
    The result lies in memory as `[B, T, H, D]`, so that putting heads together is only a view.
    There is no backward.
    """
    _check(q, k_cache, v_cache, lengths)
    batch, n_head, n_new, head_dim = q.shape
    out = q.new_empty(batch, n_new, n_head, head_dim).transpose(1, 2)
    if out.numel() == 0:  # CUDA has no empty grid
        return out
    if q.stride(-1) != 1:
        q = q.contiguous()  # next to the caches a copy of q is nothing
    plan = _plan(q.dtype, n_new, head_dim)
    n_rows = batch * n_head * n_new
    n_blocks = batch * n_head * triton.cdiv(n_new, plan.tile["BLOCK_M"])
    n_tiles = triton.cdiv(k_cache.size(2), plan.tile["BLOCK_N"])
    n_splits = _n_splits(q.device, n_new, n_blocks, n_tiles)
    partial = out
    if n_splits > 1:  # every part's result, and behind all of them the logarithms of their sums
        size = n_rows * n_splits * (head_dim + 1)
        partial = q.new_empty(size, dtype=wide_dtype(q.dtype))
    with on_device(q):
        plan.kernel[(n_blocks * n_splits,)](
            *(q, k_cache, v_cache, lengths, partial),
            *(*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], lengths.stride(0)),
            *(n_head, n_new, k_cache.size(2), head_dim, n_rows, n_splits),
            SPLIT=n_splits > 1,
            **plan.tile,
            **plan.options,
        )
        if n_splits > 1:
            sizes = (n_head, n_new, head_dim, n_rows, n_splits)
            plan = _combine_plan(_head_block(head_dim))
            _combine[(n_rows,)](partial, out, *sizes, **plan.tile, **plan.options)
    return out


def variants(capability: int) -> Iterator[Variant]:
    """Yield all that the launcher can launch on a GPU of a compute capability."""
    for dtype, block_d in product(DTYPES.values(), HEAD_BLOCKS):
        common = (dtype, block_d) in COMMON
        wide = "fp64" if dtype == "fp64" else "fp32"
        plans = _plans(dtype, block_d, tf32=False)
        if dtype == "fp32":
            plans += _plans(dtype, block_d, tf32=True)[1:]  # the first is the same
        for plan, split in product(plans, (True, False)):
            pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
            pointers |= {"lengths_ptr": "*i64", "out_ptr": f"*{wide if split else dtype}"}
            # Sixteen rows are too few for sm_90's own instruction (HGMMA): Triton then takes the
            # one of sm_80.
            matrix = plan.tile["BLOCK_M"] > (16 if capability == 90 else 1)
            plan = plan._replace(tile=plan.tile | {"SPLIT": split})
            yield _variant(plan, pointers, common, matrix)
        pointers = {"partial_ptr": f"*{wide}", "out_ptr": f"*{dtype}"}
        yield _variant(_combine_plan(block_d), pointers, common)


@triton.jit
def _attend_one(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, lengths_b,
    n_head, n_new, n_cache, head_dim, n_rows, n_splits,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One query of one row and head over one part of its keys; n_new and BLOCK_M are 1.

    Each of the BLOCK_N places in a tile keeps a maximum, sum and result of its own, over the keys
    n, n + BLOCK_N, ...: threads have nothing to tell each other until the loop is over.
    """
    split = tl.program_id(0) % n_splits
    row = tl.program_id(0) // n_splits
    b, h = (row // n_head).to(tl.int64), (row % n_head).to(tl.int64)
    end = tl.minimum(tl.load(lengths_ptr + b * lengths_b), n_cache).to(tl.int32)
    first, last = _part(end, split, n_splits, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    q = widen(tl.load(q_ptr + b * q_b + h * q_h + d, mask=inside, other=0.0))
    q *= _to_powers_of_two(head_dim, q.dtype)
    n = first + tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + b * k_b + h * k_h + n.to(tl.int64)[:, None] * k_n + d[None, :]
    v_ptrs = v_ptr + b * v_b + h * v_h + n.to(tl.int64)[:, None] * v_n + d[None, :]
    step_k, step_v = tl.cast(BLOCK_N, tl.int64) * k_n, tl.cast(BLOCK_N, tl.int64) * v_n

    top = tl.full((BLOCK_N,), float("-inf"), q.dtype)
    total = tl.zeros((BLOCK_N,), q.dtype)
    y = tl.zeros((BLOCK_N, BLOCK_D), q.dtype)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        filled = start + tl.arange(0, BLOCK_N) < last
        here = filled[:, None] & inside[None, :]
        k = widen(tl.load(k_ptrs, mask=here, other=0.0))
        v = widen(tl.load(v_ptrs, mask=here, other=0.0))
        score = tl.where(filled, tl.sum(q[None, :] * k, 1), float("-inf"))
        top, finite, shrink = _raise(top, score)
        weight = tl.exp2(score - finite)
        total = total * shrink + weight
        y = y * shrink[:, None] + weight[:, None] * v
        k_ptrs += step_k
        v_ptrs += step_v

    highest = tl.max(top, 0)
    weight = tl.exp2(top - _finite(highest))
    total = tl.sum(total * weight, 0)
    y = tl.sum(y * weight[:, None], 0)
    if SPLIT:
        part = row.to(tl.int64) * n_splits + split
        total = tl.where(total == 0.0, 1.0, total)  # an empty part: the logarithm becomes -inf
        tl.store(out_ptr + part * head_dim + d, y / total, mask=inside)
        log_ptr = out_ptr + tl.cast(n_rows, tl.int64) * n_splits * head_dim
        tl.store(log_ptr + part, highest + tl.log2(total))
    else:
        out_ptrs = out_ptr + row.to(tl.int64) * head_dim + d  # T is 1: [B, T, H, D] is [B, H, D]
        tl.store(out_ptrs, (y / total).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attend_tile(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, lengths_b,
    n_head, n_new, n_cache, head_dim, n_rows, n_splits,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one row and head over one part of the keys that any of them sees."""
    split = tl.program_id(0) % n_splits
    block = tl.program_id(0) // n_splits
    n_blocks = tl.cdiv(n_new, BLOCK_M)
    row = block // n_blocks
    block = n_blocks - 1 - block % n_blocks  # the last queries see most: those first
    b, h = (row // n_head).to(tl.int64), (row % n_head).to(tl.int64)
    length = tl.load(lengths_ptr + b * lengths_b).to(tl.int32)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    visible = tl.minimum(length - n_new + t + 1, n_cache)  # how many keys each query sees
    end = tl.minimum(tl.minimum(length, n_cache), length - n_new + (block + 1) * BLOCK_M)
    first, last = _part(end, split, n_splits, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    n = first + tl.arange(0, BLOCK_N)
    q_ptrs = q_ptr + b * q_b + h * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :]
    k_ptrs = k_ptr + b * k_b + h * k_h + n.to(tl.int64)[:, None] * k_n + d[None, :]
    v_ptrs = v_ptr + b * v_b + h * v_h + n.to(tl.int64)[:, None] * v_n + d[None, :]
    step_k, step_v = tl.cast(BLOCK_N, tl.int64) * k_n, tl.cast(BLOCK_N, tl.int64) * v_n
    q = tl.load(q_ptrs, mask=(t < n_new)[:, None] & inside[None, :], other=0.0)
    wide: tl.constexpr = tl.float64 if q.dtype == tl.float64 else tl.float32
    scale = _to_powers_of_two(head_dim, wide)

    top = tl.full((BLOCK_M,), float("-inf"), wide)
    total = tl.zeros((BLOCK_M,), wide)
    y = tl.zeros((BLOCK_M, BLOCK_D), wide)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        here = (n < last)[:, None] & inside[None, :]
        k = tl.load(k_ptrs, mask=here, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=wide) * scale
        seen = (n[None, :] < visible[:, None]) & (n < last)[None, :]
        score = tl.where(seen, score, float("-inf"))
        top, finite, shrink = _raise(top, tl.max(score, 1))
        weight = tl.exp2(score - finite[:, None])
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(v_ptrs, mask=here, other=0.0)
        y = tl.dot(
            weight.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION, out_dtype=wide
        )
        k_ptrs += step_k
        v_ptrs += step_v

    here = (t < n_new)[:, None] & inside[None, :]
    t = t.to(tl.int64)
    if SPLIT:
        part = (row.to(tl.int64) * n_new + t) * n_splits + split
        total = tl.where(total == 0.0, 1.0, total)  # an empty part: the logarithm becomes -inf
        tl.store(out_ptr + part[:, None] * head_dim + d[None, :], y / total[:, None], mask=here)
        log_ptr = out_ptr + tl.cast(n_rows, tl.int64) * n_splits * head_dim
        tl.store(log_ptr + part, top + tl.log2(total), mask=t < n_new)
    else:
        out_ptrs = out_ptr + (((b * n_new + t) * n_head + h) * head_dim)[:, None] + d[None, :]
        tl.store(out_ptrs, (y / total[:, None]).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _combine(
    partial_ptr, out_ptr, n_head, n_new, head_dim, n_rows, n_splits,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one query, each with the weight that its sum has in the whole."""
    row = tl.program_id(0).to(tl.int64)  # (b * n_head + h) * n_new + t
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    part = row * n_splits + split
    exists = split < n_splits
    log_ptr = partial_ptr + tl.cast(n_rows, tl.int64) * n_splits * head_dim
    log = tl.load(log_ptr + part, mask=exists, other=float("-inf"))
    y = tl.load(
        partial_ptr + part[:, None] * head_dim + d[None, :],
        mask=exists[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    weight = tl.exp2(log - _finite(tl.max(log, 0)))
    y = tl.sum(y * weight[:, None], 0) / tl.sum(weight, 0)
    b, h, t = row // (n_head * n_new), row // n_new % n_head, row % n_new
    out_ptrs = out_ptr + ((b * n_new + t) * n_head + h) * head_dim + d
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=d < head_dim)


@triton.jit
def _part(end, split, n_splits, BLOCK_N: tl.constexpr):
    """Return the first key of a part, at the edge of a tile, and the one behind its last."""
    n_tiles = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    first = split * n_tiles // n_splits * BLOCK_N
    last = (split + 1) * n_tiles // n_splits * BLOCK_N
    return first, tl.minimum(last, end)


@triton.jit
def _raise(top, score):
    """Return the new maximum, the same made finite, and the factor of what was summed before."""
    new = tl.maximum(top, score)
    finite = _finite(new)
    return new, finite, tl.exp2(top - finite)


@triton.jit
def _finite(top):
    """Return the maximum of scores, or 0 where there is none yet (-inf): nothing becomes NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _to_powers_of_two(head_dim, dtype: tl.constexpr):
    """Return what makes a score an exponent of two: log2(e) / sqrt(head_dim)."""
    return LOG2_E / tl.sqrt(tl.cast(head_dim, dtype))


class _Plan(NamedTuple):
    """How to launch a kernel: its compile-time arguments and options."""

    kernel: triton.JITFunction
    tile: dict[str, Any]
    options: dict[str, Any]


def _plan(dtype: torch.dtype, n_new: int, head_dim: int) -> _Plan:
    """Return how `n_new` queries a row attend: with the smallest tile that takes them all."""
    plans = _plans(DTYPES[dtype], _head_block(head_dim), multiplies_in_tf32())
    return next((plan for plan in plans if n_new <= plan.tile["BLOCK_M"]), plans[-1])


def _plans(dtype: str, block_d: int, tf32: bool) -> list[_Plan]:
    """Return how to attend with more and more queries a row."""
    if dtype == "fp64":  # for checks only: one plan for all
        return [_tile_plan(16, 2048 // block_d, block_d, "ieee", num_warps=4)]
    # 16 numbers of keys and 16 of values a thread, loaded 128 bits at a time
    tile = {"BLOCK_M": 1, "BLOCK_N": 2048 // block_d, "BLOCK_D": block_d, "STAGES": 3}
    one = _Plan(_attend_one, tile, {"num_warps": 4, "enable_fp_fusion": True})
    num_warps = 4 if block_d == 64 else 8  # 64 queries' results in registers, 32 or so a thread
    if dtype == "fp32" and tf32:
        return [one, _tile_plan(64, 32, block_d, "tf32", num_warps)]
    if dtype == "fp32":  # without matrix units the registers bound the tile
        return [one, _tile_plan(64 if block_d == 64 else 16, 32, block_d, "ieee", num_warps=8)]
    few = _tile_plan(16, 64, block_d, "ieee", num_warps=4)
    return [one, few, _tile_plan(64, 64, block_d, "ieee", num_warps)]


def _tile_plan(block_m: int, block_n: int, block_d: int, precision: str, num_warps: int) -> _Plan:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": 2}
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return _Plan(_attend_tile, tile | {"PRECISION": precision}, options)


def _combine_plan(block_d: int) -> _Plan:
    tile = {"BLOCK_S": MAX_SPLITS, "BLOCK_D": block_d}
    return _Plan(_combine, tile, {"enable_fp_fusion": True, "num_warps": 4})


def _variant(plan: _Plan, pointers: dict[str, str], common: bool, matrix: bool = False) -> Variant:
    """Describe a plan for the compiler, given the types of its pointers."""
    given = pointers.keys() | plan.tile.keys()
    integers = [name for name in plan.kernel.arg_names if name not in given]
    return Variant(
        plan.kernel.__name__,
        pointers | dict.fromkeys(integers, "i32"),
        plan.tile,
        plan.options,
        matrix,
        unaligned=("n_head", "n_new", "n_rows", "n_splits"),
        common=common,
    )


def _n_splits(device: torch.device, n_new: int, n_blocks: int, n_tiles: int) -> int:
    """Return into how many parts to split the keys, so that the GPU has enough to do.

    n_blocks: programs that there are without a split. n_tiles: tiles of keys in a full cache.
    """
    wanted = ONE_PER_PROCESSOR if n_new == 1 else TILES_PER_PROCESSOR
    enough = triton.cdiv(wanted * n_processors(device), n_blocks)
    return min(enough, n_tiles, MAX_SPLITS)


def _head_block(head_dim: int) -> int:
    return next(block for block in HEAD_BLOCKS if head_dim <= block)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless the shapes, dtypes and strides are those that the launcher takes."""
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
            f"{name}: the caches hold {k_cache.size(2)} positions, and the {n_new} new ones of q "
            "must be among them"
        )
    if not 1 <= head_dim <= HEAD_BLOCKS[-1]:
        raise ValueError(
            f'{name}: a head must be 1 to {HEAD_BLOCKS[-1]} wide, not {head_dim}; use ops="native"'
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"{name}: the last dimension of the caches must have stride 1 (they are not copied), "
            f"not {k_cache.stride(3)} and {v_cache.stride(3)}; make them contiguous once"
        )
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"{name}: lengths must be int64 [{batch}], not {lengths.dtype} {list(lengths.shape)}"
        )
