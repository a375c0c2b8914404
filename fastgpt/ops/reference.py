"""Reference implementations of the operations in plain PyTorch, which define their results.

The code favors clarity over speed. Half-precision inputs are computed in fp32 and rounded once at
the end; fp32 and fp64 are computed in their own precision. Gradients come from autograd.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import composed


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows `ids` of an embedding, and its weight for use as the matrix of the head.

    ids: int64 `[...]`, weight: `[V, C]`; returns `[..., C]` and `weight`. Using the returned weight
    in the head allows a backend to compute the gradients of both uses in one tensor.
    """
    return F.embedding(ids, weight), weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Layer normalization over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    x: `[..., C]`, weight and bias: `[C]`; returns `[..., C]` in the dtype of `x`.
    """
    wide = _upcast(x)
    centered = wide - wide.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)  # biased: divided by C, as in GPT-2
    normed = centered / torch.sqrt(variance + eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + residual`` and ``layer_norm(s)``, both `[..., C]`.

    Without a residual, s is x.
    """
    total = x if residual is None else x + residual
    return total, layer_norm(total, weight, bias, eps)


def causal_attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: int | None = None
) -> Tensor:
    """Multi-head causal self-attention (Vaswani et al. 2017, arXiv:1706.03762).

    qkv: `[B, T, 3C]`, queries, keys and values concatenated; returns `[B, T, C]`. Attention
    probabilities are dropped with probability `dropout_p`. seed: the seed of the dropout mask
    (None: torch's default generator is used).
    """
    q, k, v = split_heads(qkv, n_head)  # 3 × [B, H, T, D]
    weights = attention_weights(q, k)  # [B, H, T, T]
    if dropout_p > 0.0:
        weights = weights * _dropout_mask(weights, dropout_p, seed)
    return merge_heads((weights @ _upcast(v)).to(qkv.dtype))


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, end: int | None = None
) -> Tensor:
    """Attention of the newest T positions over a key/value cache that already contains them.

    q: `[B, H, T, D]`; k_cache, v_cache: `[B, H, S, D]`; lengths: int64 `[B]`, the filled positions
    of each row, including the T new ones. Returns `[B, H, T, D]`. Cache entries beyond a row's
    length are ignored, whatever their values. end: the common length of all rows, if the host knows
    that they are equal; it saves some backends reading `lengths`.
    """
    visible = cache_mask(q.size(2), k_cache.size(2), lengths)  # [B, 1, T, S]
    scores = _upcast(q) @ _upcast(k_cache).mT / math.sqrt(q.size(-1))
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    readable = visible[:, :, -1, :, None]  # [B, 1, S, 1]: 0 × an unfilled value may be NaN
    return (weights @ _upcast(v_cache).where(readable, 0.0)).to(q.dtype)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""
    wide = _upcast(x)
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``; x: `[..., K]`, weight: `[M, K]`, bias: `[M]`."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``gelu(x @ weight.T + bias)``, the first half of GPT-2's MLP.

    x: `[..., C]`, weight: `[F, C]`, bias: `[F]`; returns `[..., F]`.
    """
    return gelu(F.linear(x, weight, bias))


norm_linear = partial(composed.norm_linear, add_layer_norm)
norm_mlp = partial(composed.norm_mlp, add_layer_norm, linear_gelu)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean cross-entropy of the logits ``x @ weight.T`` against `targets`.

    x: `[..., C]`, weight: `[V, C]`, targets: int64 `[...]`. Positions whose target is
    `ignore_index` are ignored; if none remain the loss is NaN, as in PyTorch's `cross_entropy`.
    """
    logits = _upcast(x.flatten(0, -2) @ weight.T)  # [N, V]
    targets = targets.flatten()
    counted = targets != ignore_index
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    picked = log_probs.gather(-1, targets.where(counted, 0)[:, None])[:, 0]
    return -(picked * counted).sum() / counted.sum()


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed `[B, T, 3C]` into three views `[B, H, T, D]` without a copy."""
    batch, time, width = qkv.shape
    q, k, v = qkv.view(batch, time, 3, n_head, width // 3 // n_head).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(y: Tensor) -> Tensor:
    """Merge the heads of `[B, H, T, D]` into `[B, T, C]`."""
    return y.transpose(1, 2).flatten(2)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the causal attention probabilities `[B, H, T, T]` of `q` and `k` `[B, H, T, D]`.

    Half-precision inputs give fp32 probabilities.
    """
    scores = _upcast(q) @ _upcast(k).mT / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def cache_mask(n_new: int, n_cache: int, lengths: Tensor) -> Tensor:
    """Return the attention mask of the `n_new` newest positions over `n_cache` cached ones.

    The mask is bool `[B, 1, T, S]`, True where a position may attend.
    """
    device = lengths.device
    position = torch.arange(n_new, device=device) - n_new + lengths[:, None]  # [B, T]
    return (torch.arange(n_cache, device=device) <= position[..., None])[:, None]


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _dropout_mask(like: Tensor, dropout_p: float, seed: int | None) -> Tensor:
    generator = None
    if seed is not None:
        generator = torch.Generator(like.device).manual_seed(seed)
    kept = torch.empty_like(like).bernoulli_(1.0 - dropout_p, generator=generator)
    return kept / (1.0 - dropout_p)
