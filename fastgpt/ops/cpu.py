"""Autograd functions for training on a CPU, implemented by the C++ loops of csrc/.

Each function saves only the activations that its backward pass cannot recompute cheaply: the output
of a norm is recomputed from the residual stream, and the output of GELU from its input. A GPT-2
layer then saves 10 numbers per token and unit of width, where PyTorch's own operators save 16.
`fits` tells whether these functions support the given tensors.

Everything is computed in fp32. Under autocast, on processors with fast bf16 products, matrix
products are computed in bf16 instead. The activations between products are then bf16 too (queries,
keys and values, the outputs of attention and GELU, and their gradients), so that 8 of the 10
numbers take half the memory. The residual stream, all sums and the weight gradients stay in fp32.
There are no bf16 copies of the weights: products round them when reading them.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt import ops
from fastgpt.ops import products
from fastgpt.ops.products import dtype_of
from fastgpt.utils.extension import _C
from fastgpt.utils.host_memory import empty, empty_like


def fits(*tensors: Tensor | None, branch: Tensor | None = None) -> bool:
    """Return whether the functions of this module support the given tensors.

    The tensors must be fp32 on the CPU. branch: a tensor that must have the dtype of products, that
    is bf16 under autocast. Returns False under autocast to another dtype, and while PyTorch traces
    or transforms the code (compile, dispatch modes, functorch), which requires its own operators.
    """
    if torch.compiler.is_compiling() or not all(
        t is None or (t.dtype == torch.float32 and t.is_cpu) for t in tensors
    ):
        return False
    bf16 = torch.is_autocast_enabled("cpu")
    if bf16 and not (torch.get_autocast_dtype("cpu") == torch.bfloat16 and products.own_in_bf16()):
        return False
    if branch is not None and (branch.dtype != dtype_of(bf16) or not branch.is_cpu):
        return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows `ids` of the weight, and the weight itself, for use in the head."""
    rows, head = _TiedEmbedding.apply(ids, weight)
    return rows, head


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + residual`` (`x` itself without a residual) and ``layer_norm(s)``."""
    total, y = _AddLayerNorm.apply(x, residual, weight, bias, eps)
    return total, y


def causal_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Return causal attention `[B, T, C]` over packed queries, keys and values `[B, T, 3C]`.

    The result and the products have the dtype of `qkv`, fp32 or bf16.
    """
    y: Tensor = _CausalAttention.apply(qkv, n_head)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in fp32; `x` has the dtype of products (see `fits`)."""
    y: Tensor = _Linear.apply(x, weight, bias, _bf16())
    return y


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + residual`` in fp32 and ``layer_norm(s) @ weight.T + bias``.

    The second result has the dtype of products: bf16 under autocast.
    """
    total, y = _NormLinear.apply(x, residual, norm_weight, norm_bias, weight, bias, eps, _bf16())
    return total, y


def norm_mlp(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + residual`` and the MLP of ``layer_norm(s)``, both in fp32."""
    mlp = (weight_in, bias_in, weight_out, bias_out)
    total, y = _NormMlp.apply(x, residual, norm_weight, norm_bias, *mlp, eps, _bf16())
    return total, y


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy of the logits ``x @ weight.T``; x: `[N, C]`, targets: `[N]`."""
    wanted = torch.is_grad_enabled()  # always off inside the forward of an autograd function
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, ignore_index, wanted, _bf16())
    return loss


def rows_at_once(n_rows: int, n_classes: int) -> int:
    """Return the number of rows per chunk of the loss.

    Chunks are of equal size (up to rounding) and hold at most `ops.MAX_LOGITS` logits.
    """
    n_parts = max(1, -(-n_rows // max(1, ops.MAX_LOGITS // n_classes)))
    return max(1, -(-n_rows // n_parts))


class _TiedEmbedding(torch.autograd.Function):
    """An embedding whose weight is also the matrix of the output head.

    PyTorch would create a gradient of the size of the weight for each of the two uses, and add
    them. Here the rows of the lookup's gradient are added to the head's gradient in place. This is
    safe because this function is the only consumer of the head's gradient.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return torch.nn.functional.embedding(ids, weight), weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor | None, grad: Tensor | None) -> Any:
        if grad is None:
            grad = empty(*ctx.shape).zero_()
        elif not grad.is_contiguous():
            grad = grad.contiguous()
        if grad_rows is not None:
            (ids,) = ctx.saved_tensors
            ids = ids.flatten().contiguous()
            _C.add_rows(ids, grad_rows.contiguous(), grad, torch.get_num_threads())
        return None, grad


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        weight, bias = _packed(weight, bias)
        total, y, stats = _norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, stats, weight)
        ctx.has = residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None) -> Any:
        has_residual, has_bias = ctx.has
        if grad_y is None:
            return grad_total, grad_total if has_residual else None, None, None, None
        total, stats, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _norm_backward(
            _rows(grad_y), grad_total, total, stats, weight, has_bias, ctx.needs_input_grad[2:4]
        )
        return grad_x, grad_x if has_residual else None, grad_weight, grad_bias, None


class _CausalAttention(torch.autograd.Function):
    """Saves the input, the output and one log-sum-exp per head and position."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        (qkv,) = _packed(qkv)
        batch, time, width = qkv.shape
        y = empty(batch, time, width // 3, dtype=qkv.dtype)
        log_sums = empty(batch, n_head, time)
        _C.attention_forward(qkv, n_head, time, y, log_sums, torch.get_num_threads())
        ctx.save_for_backward(qkv, y, log_sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, y, log_sums = ctx.saved_tensors
        grad_qkv = empty_like(qkv)
        _C.attention_backward(
            *(qkv, log_sums.size(1), qkv.size(1), y, log_sums, grad.contiguous(), grad_qkv),
            torch.get_num_threads(),
        )
        return grad_qkv, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
        rows = _rows(x)
        weight, bias = _packed(weight, bias)
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(rows if trains else None, weight)
        ctx.has_bias, ctx.bf16, ctx.dtype = bias is not None, bf16, x.dtype
        return products.linear(rows, weight, bias, bf16).view(*x.shape[:-1], weight.size(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        shape, grad = grad.shape[:-1], _rows(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = products.weight_gradient(grad, x, ctx.has_bias, ctx.bf16)
        if ctx.needs_input_grad[0]:
            grad_x = products.input_gradient(grad, weight, ctx.bf16, ctx.dtype)
            grad_x = grad_x.view(*shape, weight.size(1))
        return grad_x, grad_weight, grad_bias, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        bf16: bool,
    ) -> tuple[Tensor, Tensor]:
        norm_weight, norm_bias, weight, bias = _packed(norm_weight, norm_bias, weight, bias)
        total, normed, stats = _norm(x, residual, norm_weight, norm_bias, eps, dtype_of(bf16))
        ctx.save_for_backward(total, stats, norm_weight, norm_bias, weight)
        ctx.has, ctx.bf16 = (residual is not None, bias is not None), bf16
        ctx.set_materialize_grads(False)
        y = products.linear(_rows(normed), weight, bias, bf16, dtype_of(bf16))
        return total, y.view(*x.shape[:-1], weight.size(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None) -> Any:
        has_residual, has_bias = ctx.has
        if grad_y is None:
            return grad_total, grad_total if has_residual else None, *[None] * 6
        total, stats, norm_weight, norm_bias, weight = ctx.saved_tensors
        grad_y, bf16 = _rows(grad_y), ctx.bf16
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            normed = _recompute_norm(total, stats, norm_weight, norm_bias, dtype_of(bf16))
            grad_weight, grad_bias = products.weight_gradient(grad_y, normed, has_bias, bf16)
            del normed
        grad_normed = products.input_gradient(grad_y, weight, bf16)
        grad_x, grad_norm_weight, grad_norm_bias = _norm_backward(
            *(grad_normed, grad_total, total, stats, norm_weight, norm_bias is not None),
            ctx.needs_input_grad[2:4],
        )
        return (
            grad_x,
            grad_x if has_residual else None,
            *(grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None),
        )


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        eps: float,
        bf16: bool,
    ) -> tuple[Tensor, Tensor]:
        norm_weight, norm_bias = _packed(norm_weight, norm_bias)
        weight_in, bias_in = _packed(weight_in, bias_in)
        weight_out, bias_out = _packed(weight_out, bias_out)
        total, normed, stats = _norm(x, residual, norm_weight, norm_bias, eps, dtype_of(bf16))
        y, pre = products.linear_gelu(_rows(normed), weight_in, bias_in, bf16)
        ctx.save_for_backward(total, stats, norm_weight, norm_bias, weight_in, weight_out, pre)
        ctx.has = residual is not None, bias_in is not None, bias_out is not None
        ctx.bf16 = bf16
        ctx.set_materialize_grads(False)
        return total, products.linear(y, weight_out, bias_out, bf16).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None) -> Any:
        has_residual, has_bias_in, has_bias_out = ctx.has
        if grad_y is None:
            return grad_total, grad_total if has_residual else None, *[None] * 8
        total, stats, norm_weight, norm_bias, weight_in, weight_out, pre = ctx.saved_tensors
        need, bf16 = ctx.needs_input_grad, ctx.bf16
        grad_y = _rows(grad_y)
        grad_weight_in = grad_bias_in = grad_weight_out = grad_bias_out = None
        if need[6] or need[7]:
            grad_weight_out, grad_bias_out = products.weight_gradient(
                grad_y, pre, has_bias_out, bf16, of_gelu=True
            )
        grad_pre = products.gelu_input_gradient(grad_y, weight_out, pre, bf16)
        if need[4] or need[5]:
            normed = _recompute_norm(total, stats, norm_weight, norm_bias, dtype_of(bf16))
            grad_weight_in, grad_bias_in = products.weight_gradient(
                grad_pre, normed, has_bias_in, bf16
            )
            del normed
        grad_normed = products.input_gradient(grad_pre, weight_in, bf16)
        del grad_pre
        grad_x, grad_norm_weight, grad_norm_bias = _norm_backward(
            *(grad_normed, grad_total, total, stats, norm_weight, norm_bias is not None),
            need[2:4],
        )
        return (
            grad_x,
            grad_x if has_residual else None,
            *(grad_norm_weight, grad_norm_bias, grad_weight_in, grad_bias_in),
            *(grad_weight_out, grad_bias_out, None, None),
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradients in the forward pass, so logits are computed only once.

    The backward pass multiplies the gradients by the gradient of the loss in place and returns them
    without a copy. A second backward pass through a retained graph therefore recomputes them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        wanted: bool,
        bf16: bool,
    ) -> Tensor:
        need = (wanted and needed for needed in ctx.needs_input_grad[:2])
        ctx.how = (ignore_index, bf16, *need)
        x, weight, targets = _packed(x, weight, targets)
        ctx.save_for_backward(x, weight, targets)
        loss, *ctx.grads = _loss_and_gradients(x, weight, targets, *ctx.how)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, *grads = _loss_and_gradients(*ctx.saved_tensors, *ctx.how)
        if grad_loss != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_loss)
        return *grads, None, None, None, None


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    bf16: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n_rows, n_classes = x.size(0), weight.size(0)
    losses = empty(n_rows)
    grad_x = empty_like(x) if need_x else None
    # allocated before the logits, which are freed before it
    grad_weight = empty_like(weight) if need_weight else None
    n_counted = int((targets != ignore_index).sum())
    size = rows_at_once(n_rows, n_classes)
    logits = empty(size, n_classes)
    for first in range(0, n_rows, size):
        part = slice(first, min(first + size, n_rows))
        chunk = logits[: part.stop - first]
        products.linear_into(x[part], weight, chunk, bf16)
        _C.cross_entropy(
            chunk,
            targets[part],
            ignore_index,
            need_x or need_weight,
            1.0 / max(1, n_counted),
            losses[part],
            torch.get_num_threads(),
        )
        if grad_x is not None:
            grad_x[part] = products.input_gradient(chunk, weight, bf16)
        if grad_weight is not None:
            products.weight_gradient_into(chunk, x[part], grad_weight, first > 0, bf16)
    return losses.sum() / n_counted, grad_x, grad_weight


# --- norms --------------------------------------------------------------------------------------


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum, its norm in `dtype`, and mean and 1/σ of each row, fp32 `[2, N]`."""
    x = x.contiguous()
    total, y = x, empty(*x.shape, dtype=dtype)
    if residual is not None:
        residual, total = residual.contiguous(), empty_like(x)
    stats = empty(2, x.numel() // weight.numel())
    written = None if residual is None else total
    _C.norm_forward(
        *(x, residual, weight, bias, eps, written, y, stats[0], stats[1]), torch.get_num_threads()
    )
    return total, y, stats


def _recompute_norm(
    total: Tensor, stats: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Recompute the norm `[N, C]` from the sum and its row statistics."""
    y = empty(*total.shape, dtype=dtype)
    _C.norm_apply(total, weight, bias, stats[0], stats[1], y, torch.get_num_threads())
    return _rows(y)


def _norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    has_bias: bool,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the sum (including `grad_total`), the weight and the bias.

    need: whether the weight and the bias require gradients.
    """
    grad_x = empty_like(total)
    grad_weight = empty_like(weight) if need[0] else None
    grad_bias = empty_like(weight) if has_bias and need[1] else None
    passed = None if grad_total is None else grad_total.contiguous()
    _C.norm_backward(
        *(grad_y, passed, total, weight, stats[0], stats[1]),
        *(grad_x, grad_weight, grad_bias, torch.get_num_threads()),
    )
    return grad_x, grad_weight, grad_bias


def _bf16() -> bool:
    """Return whether products are computed in bf16, given tensors accepted by `fits`."""
    return torch.is_autocast_enabled("cpu")


def _rows(x: Tensor) -> Tensor:
    """Return `[..., C]` as a contiguous matrix `[N, C]`."""
    return x.reshape(prod(x.shape[:-1]), x.size(-1)).contiguous()


def _packed(*tensors: Any) -> list[Any]:
    """Return contiguous tensors, copied only if necessary; None stays None."""
    return [t if t is None else t.contiguous() for t in tensors]
