"""The forward kernel of attention."""

import triton
import triton.language as tl

from fastgpt.kernels.attention.blocks import (
    UNSPECIALIZED,
    causal_mask,
    contiguous_offset,
    dropout_mask,
    inv_keep_prob,
    load_rows,
    qkv_pointers,
    softmax_scale,
    store_row_values,
    store_rows,
    tile_coords,
)
from fastgpt.kernels.common import LOG2_E, upcast


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward(
    qkv_ptr, out_ptr, lse_ptr, seed_ptr, stride_b: tl.int64, stride_t,
    n_time, n_head, head_dim, n_heads, heads_per_group, scale_dim, threshold,
    DIM: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the attention of one block of queries of one head over all keys up to its last."""
    head, rank, n_blocks = tile_coords(n_heads, heads_per_group, n_time, BLOCK_M)
    first = (n_blocks - 1 - rank) * BLOCK_M  # the last queries, which see the most keys, first
    q_ptr, k_ptr, v_ptr = qkv_pointers(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    q_ptr += first.to(tl.int64) * stride_t
    q = load_rows(q_ptr, stride_t, n_time - first, head_dim, BLOCK_M, DIM, True, PADDED)
    scale = LOG2_E * softmax_scale(scale_dim, upcast(q).dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    maximum = tl.full([BLOCK_M], float("-inf"), scale.dtype)
    total = tl.zeros([BLOCK_M], scale.dtype)
    acc = tl.zeros([BLOCK_M, DIM], scale.dtype)
    # All queries of the block see the first `n_unmasked` keys: these blocks need no mask. The other
    # blocks, on the diagonal, are masked, which also excludes keys past the end. `static_range`
    # compiles both loops from one body.
    #
    # Scores are masked before the maximum and the exponential: those of the future become -inf and
    # their exponentials exactly 0, whatever they were (large ones would raise the maximum, and the
    # exponentials of the others could underflow). The first block of keys contains key 0, which
    # every query sees, so the maximum is finite from the first iteration on and -inf - -inf does
    # not occur.
    n_unmasked = first // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        start = n_unmasked if MASKED else 0
        end = tl.minimum(first + BLOCK_M, n_time) if MASKED else n_unmasked
        for key in range(start, end, BLOCK_N):
            k = load_rows(k_ptr, stride_t, n_time - key, head_dim, BLOCK_N, DIM, MASKED, PADDED)
            v = load_rows(v_ptr, stride_t, n_time - key, head_dim, BLOCK_N, DIM, MASKED, PADDED)
            k_ptr += BLOCK_N * stride_t
            v_ptr += BLOCK_N * stride_t
            scores = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if MASKED:
                visible = causal_mask(first, key, BLOCK_M, BLOCK_N, False)
                scores = tl.where(visible, scores, float("-inf"))
            p, decay, maximum = _online_softmax_step(scores, maximum, scale, q.dtype)
            # `total` and `acc` are relative to the previous maximum: rescale them before adding.
            total = total * decay + tl.sum(p, 1)  # dropout does not change the normalization
            if DROPOUT:
                kept = dropout_mask(seed, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
                p = tl.where(kept, p, 0.0)
            acc *= decay[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    if q.dtype != tl.bfloat16:  # for bf16, `_online_softmax_step` returns a scaled maximum
        maximum *= scale
    store_row_values(lse_ptr, maximum + tl.log2(total), head, first, n_time, BLOCK_M)
    if DROPOUT:
        acc *= inv_keep_prob(threshold, scale.dtype)
    out_ptr += contiguous_offset(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = acc / total[:, None]
    store_rows(out_ptr, out, n_head * head_dim, n_time - first, head_dim, BLOCK_M, DIM, PADDED)


@triton.jit
def _online_softmax_step(scores, maximum, scale, dtype: tl.constexpr):
    """Perform one step of the online softmax on a block of scores.

    The softmax of a row needs its largest score, which is only known after the last block. The sum
    of exponentials and the output are therefore kept relative to the largest score so far, and
    rescaled when a block has a larger one (Milakov & Gimelshein 2018, arXiv:1805.02867).

    Returns the exponentials 2^(scaled scores - maximum); the factor that rescales sums relative to
    the previous maximum; and the new running maximum.

    For bf16 the maximum is that of the scaled scores, so that scaling and subtraction are one fused
    multiply-add. Its rounding can make an exponential larger than 1 if scores are in the millions.
    This is harmless, because all exponentials are relative to the same number. In fp16 such a value
    would overflow. For fp16, and for the other dtypes, where it costs nothing, the maximum is that
    of the unscaled scores, and the subtraction comes before the scaling: no exponent exceeds 0.
    """
    if dtype == tl.bfloat16:
        new = tl.maximum(maximum, tl.max(scores, 1) * scale)
        p, decay = tl.exp2(scores * scale - new[:, None]), tl.exp2(maximum - new)
    else:
        new = tl.maximum(maximum, tl.max(scores, 1))
        p, decay = tl.exp2((scores - new[:, None]) * scale), tl.exp2((maximum - new) * scale)
    return p, decay, new
