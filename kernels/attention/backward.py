"""The backward kernels of attention.

With S the scaled scores, P = softmax(S), O = P V and D the head dimension, the gradients are

    delta = sum(dO * O, over the head dimension)
    dV = Pᵀ dO
    dS = P * (dO Vᵀ - delta)
    dQ = dS K / sqrt(D)
    dK = dSᵀ Q / sqrt(D)

Dropout multiplies P in O (and thus in dV) and ``dO Vᵀ`` in dS by the mask and by
``1 / (1 - dropout_p)``.

P is recomputed as 2^(S log2(e) - lse). Queries past the end are loaded as zeros, with lse and delta
0: their P is 1, but their dO, ``dO Vᵀ`` and delta are 0, so they contribute nothing.

dQ is a sum over keys, dK and dV are sums over queries. The deterministic backward therefore takes
two passes, each of which recomputes P: one in which a program has a block of queries and iterates
over keys (`attention_backward_q`), one in which it has a block of keys and iterates over queries
(`attention_backward_kv`). Each sum is then accumulated in registers by one program, in a fixed
order. A single pass computes P once, but must add up dQ with atomic additions.
"""

import triton
import triton.language as tl

from fastgpt.kernels.attention.blocks import (
    UNSPECIALIZED,
    bounds_mask,
    causal_mask,
    contiguous_offset,
    dropout_mask,
    inv_keep_prob,
    load_row_values,
    load_rows,
    offsets,
    qkv_pointers,
    row_offset,
    softmax_scale,
    store_row_values,
    store_rows,
    tile_coords,
)
from fastgpt.kernels.common import LOG2_E, upcast


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_q(
    qkv_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_qkv_ptr, seed_ptr,
    stride_b: tl.int64, stride_t, stride_gb: tl.int64, stride_gt,
    n_time, n_head, head_dim, n_heads, heads_per_group, scale_dim, threshold,
    DIM: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute delta and the gradient of one block of queries of one head."""
    head, rank, n_blocks = tile_coords(n_heads, heads_per_group, n_time, BLOCK_M)
    first = (n_blocks - 1 - rank) * BLOCK_M  # the last queries, which see the most keys, first
    n_rows = n_time - first
    q_ptr, k_ptr, v_ptr = qkv_pointers(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    q_ptr += first.to(tl.int64) * stride_t
    q = load_rows(q_ptr, stride_t, n_rows, head_dim, BLOCK_M, DIM, True, PADDED)
    grad_out_ptr += row_offset(head, first, stride_gb, stride_gt, n_head, head_dim, DIM, PADDED)
    grad = load_rows(grad_out_ptr, stride_gt, n_rows, head_dim, BLOCK_M, DIM, True, PADDED)
    out_ptr += contiguous_offset(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = load_rows(out_ptr, n_head * head_dim, n_rows, head_dim, BLOCK_M, DIM, True, PADDED)
    delta = tl.sum(upcast(grad) * upcast(out), 1)
    store_row_values(delta_ptr, delta, head, first, n_time, BLOCK_M)
    lse = load_row_values(lse_ptr, head, first, n_time, BLOCK_M, True)
    scale = softmax_scale(scale_dim, delta.dtype)
    inv_keep = inv_keep_prob(threshold, delta.dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    grad_q = tl.zeros([BLOCK_M, DIM], delta.dtype)
    n_unmasked = first // BLOCK_N * BLOCK_N  # keys that need no mask, as in the forward
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
            p = _recompute_probabilities(scores, lse[:, None], LOG2_E * scale, q.dtype)
            grad_p = tl.dot(grad, v.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if DROPOUT:
                kept = dropout_mask(seed, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
                grad_p = tl.where(kept, grad_p * inv_keep, 0.0)
            grad_s = (p * (grad_p - delta[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_s, k, grad_q, input_precision=PRECISION, out_dtype=scale.dtype)

    grad_qkv_ptr += contiguous_offset(head, first, n_time, n_head, head_dim, 3, DIM, PADDED)
    width = 3 * n_head * head_dim
    store_rows(grad_qkv_ptr, grad_q * scale, width, n_rows, head_dim, BLOCK_M, DIM, PADDED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_kv(
    qkv_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_qkv_ptr, grad_q_ptr, seed_ptr,
    stride_b: tl.int64, stride_t, stride_gb: tl.int64, stride_gt,
    n_time, n_head, head_dim, n_heads, heads_per_group, scale_dim, threshold,
    DIM: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one block of keys and values of one head.

    The loop runs over all queries that see them. Scores, probabilities and their gradients are
    transposed, [BLOCK_N, BLOCK_M]: the first operands of the products for dV and dK are then
    results that are already in registers.

    grad_q_ptr: None, or fp32 [B, T, C], which accumulates the unscaled gradient of the queries.
    """
    head, rank, _ = tile_coords(n_heads, heads_per_group, n_time, BLOCK_N)
    first = rank * BLOCK_N  # the first keys, which are seen by the most queries, first
    q_ptr, k_ptr, v_ptr = qkv_pointers(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    n_rows = n_time - first
    k_ptr += first.to(tl.int64) * stride_t
    v_ptr += first.to(tl.int64) * stride_t
    k = load_rows(k_ptr, stride_t, n_rows, head_dim, BLOCK_N, DIM, True, PADDED)
    v = load_rows(v_ptr, stride_t, n_rows, head_dim, BLOCK_N, DIM, True, PADDED)
    scale = softmax_scale(scale_dim, upcast(k).dtype)
    inv_keep = inv_keep_prob(threshold, scale.dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    q_ptr += first.to(tl.int64) * stride_t
    grad_out_ptr += row_offset(head, first, stride_gb, stride_gt, n_head, head_dim, DIM, PADDED)
    if grad_q_ptr is not None:
        grad_q_ptr += contiguous_offset(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)

    grad_k = tl.zeros([BLOCK_N, DIM], scale.dtype)
    grad_v = tl.zeros([BLOCK_N, DIM], scale.dtype)
    # The queries in three parts: those on the diagonal, which need the causal mask (BLOCK_M divides
    # BLOCK_N); whole blocks without any mask; and a last, partial block with bounds checks only.
    later = tl.minimum(first + BLOCK_N, n_time)
    whole = later + tl.maximum(n_time - later, 0) // BLOCK_M * BLOCK_M
    for PART in tl.static_range(3):
        start = first if PART == 0 else (later if PART == 1 else whole)
        end = later if PART == 0 else (whole if PART == 1 else n_time)
        for query in range(start, end, BLOCK_M):
            n_left = n_time - query
            q = load_rows(q_ptr, stride_t, n_left, head_dim, BLOCK_M, DIM, PART != 1, PADDED)
            grad = load_rows(
                grad_out_ptr, stride_gt, n_left, head_dim, BLOCK_M, DIM, PART != 1, PADDED
            )
            lse = load_row_values(lse_ptr, head, query, n_time, BLOCK_M, PART != 1)
            delta = load_row_values(delta_ptr, head, query, n_time, BLOCK_M, PART != 1)
            q_ptr += BLOCK_M * stride_t
            grad_out_ptr += BLOCK_M * stride_gt
            scores = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if PART == 0:
                visible = causal_mask(query, first, BLOCK_M, BLOCK_N, True)
                scores = tl.where(visible, scores, float("-inf"))
            p = _recompute_probabilities(scores, lse[None, :], LOG2_E * scale, q.dtype)
            grad_p = tl.dot(v, grad.T, input_precision=PRECISION, out_dtype=scale.dtype)
            dropped = p
            if DROPOUT:
                kept = dropout_mask(seed, head, query, first, threshold, BLOCK_M, BLOCK_N, True)
                dropped = tl.where(kept, p, 0.0)
                grad_p = tl.where(kept, grad_p * inv_keep, 0.0)
            dropped = dropped.to(q.dtype)
            grad_v = tl.dot(dropped, grad, grad_v, input_precision=PRECISION, out_dtype=scale.dtype)
            grad_s = (p * (grad_p - delta[None, :])).to(q.dtype)
            grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION, out_dtype=scale.dtype)
            # Single pass: each block of keys contributes to the gradients of these queries, so the
            # programs of a head accumulate them atomically.
            if grad_q_ptr is not None:
                grad_q = tl.dot(grad_s.T, k, input_precision=PRECISION, out_dtype=scale.dtype)
                pointers = grad_q_ptr + offsets(n_head * head_dim, BLOCK_M, DIM)
                mask = bounds_mask(n_left, head_dim, BLOCK_M, DIM, True, PADDED)
                tl.atomic_add(pointers, grad_q, mask=mask, sem="relaxed")
                grad_q_ptr += BLOCK_M * n_head * head_dim

    if DROPOUT:
        grad_v *= inv_keep
    width = n_head * head_dim
    first_row = contiguous_offset(head, first, n_time, n_head, head_dim, 3, DIM, PADDED)
    grad_qkv_ptr += first_row + width
    store_rows(grad_qkv_ptr, grad_k * scale, 3 * width, n_rows, head_dim, BLOCK_N, DIM, PADDED)
    grad_qkv_ptr += width
    store_rows(grad_qkv_ptr, grad_v, 3 * width, n_rows, head_dim, BLOCK_N, DIM, PADDED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta(
    out_ptr, grad_out_ptr, delta_ptr, stride_gb: tl.int64, stride_gt,
    n_time, n_head, head_dim, n_heads,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute delta for one block of queries of one head."""
    head, rank, _ = tile_coords(n_heads, n_heads, n_time, BLOCK_M)
    first = rank * BLOCK_M
    grad_out_ptr += row_offset(head, first, stride_gb, stride_gt, n_head, head_dim, DIM, PADDED)
    n_rows = n_time - first
    grad = load_rows(grad_out_ptr, stride_gt, n_rows, head_dim, BLOCK_M, DIM, True, PADDED)
    out_ptr += contiguous_offset(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = load_rows(out_ptr, n_head * head_dim, n_rows, head_dim, BLOCK_M, DIM, True, PADDED)
    delta = tl.sum(upcast(grad) * upcast(out), 1)
    store_row_values(delta_ptr, delta, head, first, n_time, BLOCK_M)


@triton.jit
def _recompute_probabilities(scores, lse, scale, dtype: tl.constexpr):
    """Recompute the softmax probabilities from the logarithm of the sum of exponentials."""
    power = scores * scale - lse
    # The exact value is at most 0, but if lse is in the millions its rounding error can make the
    # difference positive, and the exponential would overflow in fp16.
    if dtype != tl.bfloat16:
        power = tl.minimum(power, 0.0)
    return tl.exp2(power)
