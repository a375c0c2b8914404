"""The operations on PyTorch's own fused operators, or on the C++ loops of `fastgpt.ops.cpu`.

The C++ loops are used where `cpu.fits` accepts the tensors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt import ops
from fastgpt.ops import composed, cpu
from fastgpt.ops.reference import cache_mask, merge_heads, split_heads
from fastgpt.utils.extension import _C


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.tied_embedding`; on a CPU the head's and the lookup's gradients share a tensor."""
    if cpu.fits(weight):
        return cpu.tied_embedding(ids, weight)
    return F.embedding(ids, weight), weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`reference.layer_norm` as one C++ loop, or as `torch.nn.functional.layer_norm`."""
    if cpu.fits(x, weight, bias):
        return cpu.add_layer_norm(x, None, weight, bias, eps)[1]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`reference.add_layer_norm` as one C++ loop; PyTorch has no fused form of it."""
    if residual is None:
        return x, layer_norm(x, weight, bias, eps)
    if cpu.fits(x, residual, weight, bias) and x.shape == residual.shape:
        return cpu.add_layer_norm(x, residual, weight, bias, eps)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def causal_attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: int | None = None
) -> Tensor:
    """`reference.causal_attention` as `scaled_dot_product_attention`, or as C++ loops on a CPU.

    With dropout, a `seed` requires saving and restoring the state of torch's generators.
    """
    if seed is not None and dropout_p > 0.0:
        devices = [qkv.device] if qkv.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return causal_attention(qkv, n_head, dropout_p)
    if dropout_p == 0.0 and cpu.fits(branch=qkv) and _C.attention_is_fast():
        return cpu.causal_attention(qkv, n_head)
    q, k, v = split_heads(qkv, n_head)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True))


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, end: int | None = None
) -> Tensor:
    """`reference.cached_attention` as `scaled_dot_product_attention` over the filled positions.

    On a GPU without `end`, it covers the whole cache instead, because reading `lengths` would
    synchronize with the host.
    """
    n_new, filled = q.size(2), end or k_cache.size(2)
    if end is None and lengths.device.type == "cpu":
        filled = int(lengths.max())
        end = filled if bool((lengths == filled).all()) else None
    k, v = k_cache[:, :, :filled], v_cache[:, :, :filled]
    if end is not None and n_new in (1, end):  # no mask to build
        return F.scaled_dot_product_attention(q, k, v, is_causal=n_new > 1)
    mask = cache_mask(n_new, filled, lengths)
    # [B, 1, S, 1]: unfilled positions may hold NaN, which a masked weight of 0 would not remove
    readable = mask[:, :, -1, :, None]
    k, v = k.where(readable, 0.0), v.where(readable, 0.0)
    return F.scaled_dot_product_attention(q, k, v, mask)


def gelu(x: Tensor) -> Tensor:
    """`reference.gelu` as `torch.nn.functional.gelu`, or as a C++ loop for fp32 on a CPU.

    With PyTorch's vectorized tanh this form is three times as slow as the exact form with erf.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        y: Tensor = torch.ops.fastgpt.cpu_gelu(x)
        return y
    return F.gelu(x, approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear`, by the fastest available matrix product."""
    if cpu.fits(weight, bias, branch=x):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear_gelu`; the matrix product adds the bias."""
    return gelu(linear(x, weight, bias))


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`reference.norm_linear`; on a CPU the backward pass recomputes the norm."""
    tensors = x, residual, norm_weight, norm_bias, weight, bias
    if cpu.fits(*tensors):
        return cpu.norm_linear(*tensors, eps)
    return composed.norm_linear(add_layer_norm, *tensors, eps)


def norm_mlp(
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
    """`reference.norm_mlp`; on a CPU the backward pass recomputes the norm and GELU."""
    tensors = x, residual, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out
    if cpu.fits(*tensors):
        return cpu.norm_mlp(*tensors, eps)
    return composed.norm_mlp(add_layer_norm, linear_gelu, *tensors, eps)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """`reference.linear_cross_entropy` with at most `ops.MAX_LOGITS` logits (or a row) at once."""
    x, targets = x.flatten(0, -2), targets.flatten()
    if cpu.fits(x, weight):
        return cpu.linear_cross_entropy(x, weight, targets, ignore_index)
    if targets.numel() * weight.size(0) <= ops.MAX_LOGITS:
        logits = F.linear(x, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index)
    if torch.is_autocast_enabled(x.device.type):  # cast outside the function: autograd tracks it
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    wanted = torch.is_grad_enabled()  # always off inside the forward of an autograd function
    loss: Tensor = _ChunkedLinearCrossEntropy.apply(x, weight, targets, ignore_index, wanted)
    return loss


def _cpu_gelu(x: Tensor) -> Tensor:
    """GELU by csrc/training/gelu.cpp with PyTorch's number of threads; x: fp32, any strides."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _C.gelu_forward(x.numpy(), y.numpy(), torch.get_num_threads())
    return y


def _cpu_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    _C.gelu_backward(grad.numpy(), x.numpy(), grad_x.numpy(), torch.get_num_threads())
    return grad_x


def _define_cpu_gelu() -> torch.library.Library:
    """Define `torch.ops.fastgpt.cpu_gelu`, with support for autograd and tracing.

    `torch.library.custom_op` would do this in one call, but its first use loads the compiler, which
    takes two seconds and is rarely needed when generating text on a CPU.
    """
    library = torch.library.Library("fastgpt", "DEF")
    library.define("cpu_gelu(Tensor x) -> Tensor")
    library.define("cpu_gelu_backward(Tensor grad, Tensor x) -> Tensor")
    library.impl("cpu_gelu", _cpu_gelu, "CPU")
    library.impl("cpu_gelu_backward", _cpu_gelu_backward, "CPU")
    for name in ("cpu_gelu", "cpu_gelu_backward"):  # the shape of x, the last argument; contiguous
        torch.library.register_fake(
            f"fastgpt::{name}", lambda *args: args[-1].new_empty(args[-1].shape), lib=library
        )
    torch.library.register_autograd(
        "fastgpt::cpu_gelu",
        lambda ctx, grad: torch.ops.fastgpt.cpu_gelu_backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=library,
    )
    return library


_LIBRARY = _define_cpu_gelu()  # the operators exist as long as this object


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients by chunks of rows, computing the logits of each chunk only once.

    Given the logits, the gradient of the loss is known up to a scalar factor. The forward pass
    therefore computes the gradients too, and the backward pass only scales them (as in Wijmans et
    al. 2024, arXiv:2411.09009, and Liger Kernel, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, wanted: bool
    ) -> Tensor:
        need_x, need_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if need_x else None
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        counted = targets != ignore_index
        n_counted = counted.sum()
        total = torch.zeros((), dtype=wide, device=x.device)
        rows = max(1, ops.MAX_LOGITS // weight.size(0))
        for part in (slice(i, i + rows) for i in range(0, x.size(0), rows)):
            logits = (x[part] @ weight.T).to(wide)
            total += F.cross_entropy(
                logits, targets[part], ignore_index=ignore_index, reduction="sum"
            )
            if not (need_x or need_weight):
                continue
            grad = _logits_gradient(logits, targets[part], counted[part], n_counted).to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[part])
            if grad_weight is not None:
                grad_weight += grad.T @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / n_counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad_loss
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None


def _logits_gradient(logits: Tensor, targets: Tensor, counted: Tensor, n_counted: Tensor) -> Tensor:
    """Return d(mean loss)/d(logits) = (softmax − one-hot) / count, zero in rows not counted."""
    grad = logits.softmax(-1)
    index = targets.where(counted, 0)[:, None]
    grad.scatter_add_(-1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return grad.mul_((counted / n_counted)[:, None])
