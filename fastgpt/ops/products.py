"""The matrix products of a layer and of its gradients, for fp32 on a CPU.

Two ways to each: this package's own product, which does GELU and the bias on its way, where the
processor makes it the faster one, and PyTorch's. No autograd here: see `fastgpt.ops.cpu`. Matrices
are `[rows, columns]`; a layer's weight is `[out, in]`, as in `nn.Linear`.
"""

import functools

import torch
from torch import Tensor

from fastgpt.compiled import _C
from fastgpt.host_memory import empty, empty_like

FEWEST_ROWS = 16  # with fewer, a product reads its weight once, whoever does it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``."""
    if not _own(x):
        return torch.nn.functional.linear(x, weight, bias)
    y = empty(x.size(0), weight.size(0))
    _C.gemm(x, weight, y, transpose_b=True, bias=bias, threads=torch.get_num_threads())
    return y


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``y = gelu(pre)`` and ``pre = x @ weight.T + bias``."""
    threads = torch.get_num_threads()
    y = empty(x.size(0), weight.size(0))
    if not _own(x):
        pre = torch.nn.functional.linear(x, weight, bias)
        _C.gelu_forward(pre.numpy(), y.numpy(), threads)
        return y, pre
    pre = empty_like(y)
    _C.gemm(x, weight, y, transpose_b=True, bias=bias, gelu=True, pre=pre, threads=threads)
    return y, pre


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of `x`, given that of ``x @ weight.T``."""
    if not _own(grad):
        return grad @ weight
    grad_x = empty(grad.size(0), weight.size(1))
    _C.gemm(grad, weight, grad_x, threads=torch.get_num_threads())
    return grad_x


def gelu_input_gradient(grad: Tensor, weight: Tensor, pre: Tensor) -> Tensor:
    """Return the gradient of `pre`, given that of ``gelu(pre) @ weight.T``."""
    threads = torch.get_num_threads()
    grad_pre = empty_like(pre)
    if _own(grad):
        _C.gemm(grad, weight, grad_pre, gelu_grad=pre, threads=threads)
    else:
        torch.mm(grad, weight, out=grad_pre)
        _C.gelu_backward(grad_pre.numpy(), pre.numpy(), grad_pre.numpy(), threads)
    return grad_pre


def weight_gradient(
    grad: Tensor, x: Tensor, with_bias: bool, *, of_gelu: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of weight and bias, given that of ``x @ weight.T + bias``.

    of_gelu: the layer's input was ``gelu(x)``.
    """
    threads = torch.get_num_threads()
    if not _own(grad):
        if of_gelu:
            y = empty_like(x)
            _C.gelu_forward(x.numpy(), y.numpy(), threads)
            x = y
        return grad.T @ x, grad.sum(0) if with_bias else None
    grad_weight = empty(grad.size(1), x.size(1))
    grad_bias = empty(grad.size(1)) if with_bias else None
    _C.gemm(
        grad,
        x,
        grad_weight,
        transpose_a=True,
        gelu_b=of_gelu,
        row_sums=grad_bias,
        threads=threads,
    )
    return grad_weight, grad_bias


def add_weight_gradient(grad: Tensor, x: Tensor, total: Tensor) -> None:
    """Add a part of the batch's gradient of a weight to `total`."""
    if _own(grad):
        threads = torch.get_num_threads()
        _C.gemm(grad, x, total, transpose_a=True, accumulate=True, threads=threads)
    else:
        total.addmm_(grad.T, x)


def linear_into(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Write ``x @ weight.T`` into `y`."""
    if _own(x):
        _C.gemm(x, weight, y, transpose_b=True, threads=torch.get_num_threads())
    else:
        torch.mm(x, weight.T, out=y)


def _own(rows: Tensor) -> bool:
    return rows.size(0) >= FEWEST_ROWS and _own_is_faster()


@functools.cache
def _own_is_faster() -> bool:
    return _C.gemm_is_faster()
