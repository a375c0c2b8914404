"""Layers composed of a backend's own operations.

A backend defines ``norm_linear = partial(composed.norm_linear, add_layer_norm)``, with its own
`add_layer_norm`, or has an implementation that is faster than this composition.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

AddLayerNorm = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, float], tuple[Tensor, Tensor]
]
LinearGelu = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def norm_linear(
    add_layer_norm: AddLayerNorm,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + residual`` and ``linear(layer_norm(s))``, the projection for attention.

    x, residual: `[..., C]`; without a residual, s is x. weight: `[M, C]`; returns `[..., C]` and
    `[..., M]`.
    """
    total, normed = add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return total, F.linear(normed, weight, bias)


def norm_mlp(
    add_layer_norm: AddLayerNorm,
    linear_gelu: LinearGelu,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + residual`` and GPT-2's MLP of ``layer_norm(s)``, both `[..., C]`.

    weight_in: `[F, C]`, weight_out: `[C, F]`; without a residual, s is x.
    """
    total, normed = add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return total, F.linear(linear_gelu(normed, weight_in, bias_in), weight_out, bias_out)
