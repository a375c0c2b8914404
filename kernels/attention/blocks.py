"""Blocks of scores, masks and rows: device functions of the forward and the backward.

Rows are those of one head in `[B, T, C]` or `[B, T, 3C]`, whose heads are adjacent. A block of them
has DIM columns, of which the last ones are PADDED with zeros if the head is narrower.
"""

import triton
import triton.language as tl

# Arguments whose values vary between calls. They are not specialized: specialization on 1 and on
# multiples of 16 would compile each kernel several times and gain nothing.
UNSPECIALIZED = ["n_time", "n_head", "n_heads", "heads_per_group", "scale_dim", "threshold"]


@triton.jit
def tile_coords(n_heads, heads_per_group, n_time, BLOCK: tl.constexpr):
    """Return the head of a program, the rank of its block by length, and the number of blocks.

    Heads are processed in groups whose keys and values fit into the L2 cache together. Within a
    group, the longest blocks of all heads come first, so that the short ones balance the load at
    the end. The last group may be smaller.
    """
    n_blocks = tl.cdiv(n_time, BLOCK)
    in_group = heads_per_group * n_blocks
    program = tl.program_id(0)
    first = program // in_group * heads_per_group
    size = tl.minimum(heads_per_group, n_heads - first)
    program %= in_group
    return first + program % size, program // size, n_blocks


@triton.jit
def softmax_scale(scale_dim, dtype: tl.constexpr):
    """Return 1 / sqrt(D)."""
    return 1.0 / tl.sqrt(scale_dim.to(dtype))


@triton.jit
def causal_mask(query, key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return the causal mask of a block of queries and keys: [BLOCK_M, BLOCK_N], or transposed."""
    queries = query + tl.arange(0, BLOCK_M)
    keys = key + tl.arange(0, BLOCK_N)
    transposed = keys[:, None] <= queries[None, :]
    return transposed if TRANSPOSED else keys[None, :] <= queries[:, None]


@triton.jit
def dropout_mask(
    seed, head, query, key, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return the dropout mask of a block, True if kept: [BLOCK_M, BLOCK_N], or transposed.

    The random numbers come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3") with the seed as its key. The counter (key // 4, query, head) yields four
    numbers, one for each of four neighboring keys, so the mask depends on positions only. `key`
    must be a multiple of 4.
    """
    queries = query + tl.arange(0, BLOCK_M)
    fours = key // 4 + tl.arange(0, BLOCK_N // 4)
    if TRANSPOSED:
        fours, queries = tl.broadcast(fours[:, None], queries[None, :])
    else:
        fours, queries = tl.broadcast(fours[None, :], queries[:, None])
    a, b, c, d = tl.philox(seed, fours, queries, head, 0)
    a = a.to(tl.int32, bitcast=True) >= threshold
    b = b.to(tl.int32, bitcast=True) >= threshold
    c = c.to(tl.int32, bitcast=True) >= threshold
    d = d.to(tl.int32, bitcast=True) >= threshold
    # Interleave the four masks so that keys 4 i, 4 i + 1, ... take a, b, c, d of counter i: each
    # join adds a last dimension, which gives [..., 2, 2] with [[a, b], [c, d]]. Flattening the last
    # two dimensions into that of the counters yields the order of the keys.
    kept = tl.join(tl.join(a, c), tl.join(b, d))
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        kept = tl.reshape(kept, [BLOCK_M, BLOCK_N])
    return kept


@triton.jit
def inv_keep_prob(threshold, dtype: tl.constexpr):
    """Return 1 / (1 - dropout_p): 2^32 over the number of int32 values not below `threshold`."""
    return 4294967296.0 / (2147483648.0 - threshold.to(dtype))


@triton.jit
def qkv_pointers(
    qkv_ptr, stride_b, head, n_head, head_dim, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Return pointers to the first row of the queries, keys and values of a head."""
    # `head * 0` is a zero of a tensor type, which `row_offset` casts to int64.
    q_ptr = qkv_ptr + row_offset(head, head * 0, stride_b, 0, n_head, head_dim, DIM, PADDED)
    width = n_head * (head_dim if PADDED else DIM)
    return q_ptr, q_ptr + width, q_ptr + 2 * width


@triton.jit
def row_offset(
    head, row, stride_b, stride_t, n_head, head_dim, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Return the offset of a row of a head in [B, T, C] or [B, T, 3C], whose heads are adjacent."""
    # Without padding, the head dim is the constant DIM, so that the compiler knows the alignment.
    offset = (head // n_head).to(tl.int64) * stride_b + row.to(tl.int64) * stride_t
    return offset + head % n_head * (head_dim if PADDED else DIM)


@triton.jit
def contiguous_offset(
    head, row, n_time, n_head, head_dim,
    PARTS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return the offset of a row of a head in a contiguous [B, T, PARTS * C]."""
    width = PARTS * n_head * (head_dim if PADDED else DIM)
    stride_b = width.to(tl.int64) * n_time
    return row_offset(head, row, stride_b, width, n_head, head_dim, DIM, PADDED)


@triton.jit
def load_rows(
    pointer, stride, n_rows, head_dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, BOUNDED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Load a block of rows of one head, with zeros outside of the tensor."""
    pointers = pointer + offsets(stride, ROWS, DIM)
    if BOUNDED or PADDED:
        mask = bounds_mask(n_rows, head_dim, ROWS, DIM, BOUNDED, PADDED)
        block = tl.load(pointers, mask=mask, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def store_rows(
    pointer, block, stride, n_rows, head_dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Store a block of rows of one head in the dtype of the pointer."""
    mask = bounds_mask(n_rows, head_dim, ROWS, DIM, True, PADDED)
    block = block.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets(stride, ROWS, DIM), block, mask=mask)


@triton.jit
def offsets(stride, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Return the offsets of the elements of a block of rows, [ROWS, DIM]."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, DIM)[None, :]


@triton.jit
def bounds_mask(
    n_rows, head_dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, BOUNDED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return a mask of a block: rows below `n_rows` if BOUNDED, columns < `head_dim` if PADDED."""
    mask = tl.arange(0, ROWS)[:, None] < n_rows
    if PADDED:
        columns = tl.arange(0, DIM)[None, :] < head_dim
        mask = mask & columns if BOUNDED else columns
    return mask


@triton.jit
def load_row_values(pointer, head, row, n_time, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """Load one number for each row of a block from [B, H, T]."""
    rows = row + tl.arange(0, ROWS)
    pointer += head.to(tl.int64) * n_time
    if BOUNDED:
        numbers = tl.load(pointer + rows, mask=rows < n_time, other=0.0)
    else:
        numbers = tl.load(pointer + rows)
    return numbers


@triton.jit
def store_row_values(pointer, numbers, head, row, n_time, ROWS: tl.constexpr):
    """Store one number for each row of a block in [B, H, T]."""
    rows = row + tl.arange(0, ROWS)
    tl.store(pointer + head.to(tl.int64) * n_time + rows, numbers, mask=rows < n_time)
