"""The operations on the Triton kernels of `fastgpt.kernels`, for CUDA.

Each operation is a `torch.library` operator with support for autograd and `torch.compile`. None
synchronizes with the host, so that a whole training step can be captured in a CUDA graph. Inputs
that the kernels do not support raise ValueError; there is no silent fallback to another backend.
Without a GPU the kernels run, slowly, in Triton's interpreter if TRITON_INTERPRET=1 is set before
Triton is first imported.

Under autocast, results have autocast's dtype. This includes the norms, whose results PyTorch's own
operators return in fp32 and round in the next matrix product.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels.attention import causal_attention_backward, causal_attention_forward
from fastgpt.kernels.cached_attention import cached_attention as cached_attention_forward
from fastgpt.kernels.common import compute_dtype
from fastgpt.kernels.cross_entropy import linear_cross_entropy_forward
from fastgpt.kernels.gelu import gelu_backward, gelu_forward
from fastgpt.kernels.layer_norm import layer_norm_backward, layer_norm_forward
from fastgpt.ops import composed
from fastgpt.ops.reference import linear as linear
from fastgpt.ops.reference import tied_embedding as tied_embedding

_LIBRARY = torch.library.Library("fastgpt", "FRAGMENT")  # operators exist as long as this object
_OPERATORS = torch.ops.fastgpt


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`reference.layer_norm`, reading `x` once."""
    y: Tensor = _OPERATORS.layer_norm(x, None, weight, bias, eps, _result_dtype(x))[1]
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`reference.add_layer_norm` in one pass over `x` and `residual`."""
    if residual is None:
        return x, layer_norm(x, weight, bias, eps)
    dtype = _result_dtype(x, torch.promote_types(x.dtype, residual.dtype))
    total, y, _, _ = _OPERATORS.layer_norm(x, residual, weight, bias, eps, dtype)
    return total, y


def causal_attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: int | None = None
) -> Tensor:
    """`reference.causal_attention` without materializing the scores (Dao 2023, arXiv:2307.08691).

    Head dimensions up to 128. The same `seed` gives the same dropout mask, which differs from those
    of other backends. A call without a seed that is captured in a CUDA graph draws a new mask at
    each replay.
    """
    drawn = _seed(qkv.device, seed) if dropout_p > 0.0 else None
    y: Tensor = _OPERATORS.causal_attention(qkv, n_head, dropout_p, drawn)[0]
    return y


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, end: int | None = None
) -> Tensor:
    """`reference.cached_attention` with the keys split over the GPU's SMs; has no gradients."""
    if torch.is_autocast_enabled(q.device.type):  # the cache has the dtype of the weights
        q = q.to(k_cache.dtype)
    y: Tensor = _OPERATORS.cached_attention(q, k_cache, v_cache, lengths)
    return y.to(_result_dtype(y))


def gelu(x: Tensor) -> Tensor:
    """`reference.gelu`; only `x` is saved for the backward pass."""
    y: Tensor = _OPERATORS.gelu(x, None)
    return y


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear_gelu`: cuBLAS computes the product, one kernel adds the bias and GELU.

    Its backward kernel also computes the gradient of the bias, without a separate pass.
    """
    y: Tensor = _OPERATORS.gelu(F.linear(x, weight), bias)
    return y


norm_linear = partial(composed.norm_linear, add_layer_norm)
norm_mlp = partial(composed.norm_mlp, add_layer_norm, linear_gelu)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """`reference.linear_cross_entropy`, one chunk of the logits at a time.

    The forward pass also computes the gradients, up to a scalar factor that the backward pass
    multiplies them by (as in Liger Kernel, arXiv:2410.10989). A target outside `[0, V)` that is not
    `ignore_index` makes the loss NaN.
    """
    wanted = torch.is_grad_enabled()
    loss: Tensor = _OPERATORS.linear_cross_entropy(
        x.to(_result_dtype(x)).flatten(0, -2),  # the kernel reads the weight in the dtype of x
        weight,
        targets.flatten(),
        ignore_index,
        wanted and x.requires_grad,
        wanted and weight.requires_grad,
    )[0]
    return loss


def _result_dtype(x: Tensor, unless_autocast: torch.dtype | None = None) -> torch.dtype:
    dtype = unless_autocast or x.dtype
    # autocast leaves fp64 alone, in PyTorch's own operators too
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _seed(device: torch.device, seed: int | None) -> Tensor:
    """Return a seed on the device, int64 `[1]`; None draws one with the device's generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


# --- the operators -----------------------------------------------------------------------------
#
# Operators are defined with low-level functions because `torch.library.custom_op` adds overhead to
# every call. An operator may not return one of its inputs or None, so results that are not needed
# are returned as empty tensors.


def _define(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `torch.ops.fastgpt.NAME` from a schema.

    compute: the implementation. fake: returns empty tensors of the result's shapes, for tracing.
    setup_context, backward: the autograd formula, if there is one.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):  # on a CPU, the launchers raise an error that explains what to do
        _LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"fastgpt::{name}", _announced(name, fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"fastgpt::{name}", _once(name, backward), setup_context=setup_context, lib=_LIBRARY
        )


def _announced(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Add an operator to inductor's list of known fallbacks when it is traced.

    For an operator that is not in the list, PyTorch 2.11 formats a log message with the whole
    expression that leads to it. For the loss, after a dozen blocks, that takes extremely long.
    """

    @wraps(fake)
    def announce(*args: Any) -> Any:
        inductor = sys.modules.get("torch._inductor.lowering")  # loaded if inductor is used
        expected: set[str] = getattr(inductor, "FALLBACK_ALLOW_LIST", set())
        expected.add(f"fastgpt::{name}")
        return fake(*args)

    return announce


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward function to raise ValueError for second derivatives.

    The kernels' gradients are not differentiable; without the check, second derivatives would
    silently be missing.
    """

    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # in a backward pass, only with create_graph=True
            raise ValueError(
                f"{name}: the kernels do not support second derivatives (create_graph=True); use "
                'ops="reference" for those'
            )
        return backward(ctx, *grads)

    return checked


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _statistics(x: Tensor) -> Tensor:
    """Return an empty tensor for one number per row, in the dtype of the computation."""
    return x.new_empty(x.shape[:-1].numel(), dtype=compute_dtype(x.dtype))


def _contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


# layer_norm, with or without a residual


def _layer_norm(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    total, *others = layer_norm_forward(x, *args)
    return _or_empty(total, x), *others


def _fake_layer_norm(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    total, dtype = x.new_empty(0), args[-1]
    if residual is not None:
        total = _contiguous_like(x, torch.promote_types(x.dtype, residual.dtype))
    return total, _contiguous_like(x, dtype), _statistics(x), _statistics(x)


def _setup_layer_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual)]
    ctx.mark_non_differentiable(mean, rstd, *([total] if residual is None else []))
    ctx.set_materialize_grads(False)


def _grad_layer_norm(
    ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None, *unused: None
) -> tuple[Any, ...]:
    total, weight, mean, rstd = ctx.saved_tensors
    wide = grad_total
    narrow = narrowed = grad_weight = grad_bias = None
    if grad_y is not None:
        narrow = next((dtype for dtype in ctx.dtypes if dtype not in (None, total.dtype)), None)
        wide, narrowed, grad_weight, grad_bias = _OPERATORS.layer_norm_backward(
            grad_y, grad_total, total, weight, mean, rstd, ctx.has_bias, narrow
        )
    grads: list[Tensor | None] = [None, None]  # of x and the residual
    for i, dtype in enumerate(ctx.dtypes):
        if dtype is not None and wide is not None:
            grads[i] = narrowed if dtype == narrow else wide.to(dtype)
    return *grads, grad_weight, grad_bias if ctx.has_bias else None, None, None


def _layer_norm_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, weight = args[2:4]
    grads = layer_norm_backward(*args)
    return grads.total, _or_empty(grads.x, total), grads.weight, _or_empty(grads.bias, weight)


def _fake_layer_norm_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, total, weight, _, _, has_bias, narrow = args
    both = narrow not in (None, total.dtype)
    return (
        _contiguous_like(total),
        total.new_empty(total.shape if both else 0, dtype=narrow),
        _contiguous_like(weight),
        weight.new_empty(weight.shape if has_bias else 0),
    )


# causal_attention


def _fake_causal_attention(
    qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = qkv.shape
    return (
        qkv.new_empty(batch, time, width // 3),
        qkv.new_empty(batch, n_head, time, dtype=compute_dtype(qkv.dtype)),
    )


def _setup_causal_attention(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.n_head, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _grad_causal_attention(ctx: Any, grad: Tensor | None, unused: None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    qkv, out, lse, seed = ctx.saved_tensors
    grad_qkv = _OPERATORS.causal_attention_backward(
        grad, qkv, out, lse, ctx.n_head, ctx.dropout_p, seed
    )
    return grad_qkv, None, None, None


# gelu


def _gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = gelu_backward(grad, x, bias)
    return grad_x, _or_empty(grad_bias, x)


def _fake_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), x.new_empty(0) if bias is None else _contiguous_like(bias)


def _setup_gelu(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grad_gelu(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _OPERATORS.gelu_backward(grad, x, bias)
    return grad_x, None if bias is None else grad_bias


# linear_cross_entropy


def _linear_cross_entropy(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, n_counted, grad_x, grad_weight = linear_cross_entropy_forward(*args)
    return loss, n_counted, _or_empty(grad_x, loss), _or_empty(grad_weight, loss)


def _fake_linear_cross_entropy(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, targets, _, need_x, need_weight = args
    wide = compute_dtype(x.dtype)
    return (
        x.new_empty((), dtype=wide),
        targets.new_empty(()),
        x.new_empty(x.shape if need_x else 0, dtype=wide),
        x.new_empty(weight.shape if need_weight else 0, dtype=wide),
    )


def _setup_linear_cross_entropy(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, *_, need_x, need_weight = inputs
    _, n_counted, grad_x, grad_weight = output
    ctx.save_for_backward(n_counted, grad_x, grad_weight)
    ctx.dtypes = x.dtype if need_x else None, weight.dtype if need_weight else None
    ctx.mark_non_differentiable(n_counted, grad_x, grad_weight)
    ctx.set_materialize_grads(False)


def _grad_linear_cross_entropy(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    n_counted, *sums = ctx.saved_tensors
    factor = grad / n_counted.clamp(min=1)  # without counted targets the gradients are zero
    grads = (
        None if dtype is None else torch.mul(total, factor, out=_contiguous_like(total, dtype))
        for total, dtype in zip(sums, ctx.dtypes, strict=True)
    )
    return *grads, None, None, None, None


_define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor total, Tensor y, Tensor mean, Tensor rstd)",
    _layer_norm,
    _fake_layer_norm,
    _setup_layer_norm,
    _grad_layer_norm,
)
_define(
    "layer_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor weight,"
    " Tensor mean, Tensor rstd, bool has_bias, ScalarType? narrow)"
    " -> (Tensor grad_total, Tensor narrowed, Tensor grad_weight, Tensor grad_bias)",
    _layer_norm_backward,
    _fake_layer_norm_backward,
)
_define(
    "causal_attention(Tensor qkv, int n_head, float dropout_p, Tensor? seed)"
    " -> (Tensor y, Tensor lse)",
    causal_attention_forward,
    _fake_causal_attention,
    _setup_causal_attention,
    _grad_causal_attention,
)
_define(
    "causal_attention_backward(Tensor grad, Tensor qkv, Tensor y, Tensor lse, int n_head,"
    " float dropout_p, Tensor? seed) -> Tensor",
    causal_attention_backward,
    lambda grad, qkv, *_: _contiguous_like(qkv),
)
_define(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths) -> Tensor",
    cached_attention_forward,
    lambda q, *_: _contiguous_like(q.transpose(1, 2)).transpose(1, 2),
)
_define(
    "gelu(Tensor x, Tensor? bias) -> Tensor",
    gelu_forward,
    lambda x, bias: _contiguous_like(x),
    _setup_gelu,
    _grad_gelu,
)
_define(
    "gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor grad_x, Tensor grad_bias)",
    _gelu_backward,
    _fake_gelu_backward,
)
_define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool need_x,"
    " bool need_weight) -> (Tensor loss, Tensor n_counted, Tensor grad_x, Tensor grad_weight)",
    _linear_cross_entropy,
    _fake_linear_cross_entropy,
    _setup_linear_cross_entropy,
    _grad_linear_cross_entropy,
)
