"""Causal self-attention on packed qkv.

The reference implementation is `fastgpt.ops.reference.causal_attention`.

The matrix of scores is never materialized: each program computes it block by block, with a running
maximum and sum for the softmax (FlashAttention-2, Dao 2023, arXiv:2307.08691). The backward
recomputes the probabilities from the logarithm of that sum. Queries, keys and values are read
directly from the packed `[B, T, 3C]`, and their gradients are written to one packed gradient of the
same shape.

Exponentials are computed as powers of two; log2(e) is folded into the scale of the scores. The
dropout mask is a function of (seed, batch and head, query, key) alone and is recomputed wherever it
is needed, so it does not depend on the block sizes.

`launch` has the public functions, `configs` the block sizes, `forward` and `backward` the kernels,
and `blocks` the device functions that both use.
"""

from fastgpt.kernels.attention.launch import (
    LARGEST_HEAD,
    causal_attention_backward,
    causal_attention_forward,
    variants,
)

__all__ = ["LARGEST_HEAD", "causal_attention_backward", "causal_attention_forward", "variants"]
