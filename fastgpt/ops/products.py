"""The matrix products of a layer and of its gradients, on a CPU.

Products multiply in fp32 or bf16 and always accumulate in fp32. In bf16, operands may be fp32 or
bf16; the product rounds fp32 operands while reading them. In fp32, each product has two
implementations: this package's own GEMM, which fuses GELU and the bias and is used on processors
where it is faster, and PyTorch's. In bf16, only the own GEMM is used. Nothing here supports
autograd; see `fastgpt.ops.cpu` for that. Matrices are `[rows, columns]`; a layer's weight is
`[out, in]`, as in `nn.Linear`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastgpt.utils.extension import _C
from fastgpt.utils.host_memory import empty, empty_like

FEWEST_ROWS = 16  # with fewer rows, reading the weight dominates and the own GEMM has no advantage


def own_in_bf16() -> bool:
    """Return whether the own GEMM is the fast way to multiply in bf16 on this processor."""
    return _own_is_faster(True)


def dtype_of(bf16: bool) -> torch.dtype:
    """Return the dtype in which products multiply."""
    return torch.bfloat16 if bf16 else torch.float32


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bf16: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``x @ weight.T + bias`` in `dtype`."""
    if not _own(x, bf16):
        return torch.nn.functional.linear(x, weight, bias)
    y = empty(x.size(0), weight.size(0), dtype=dtype)
    _gemm(x, weight, y, transpose_b=True, bias=bias, bf16=bf16)
    return y


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Return ``y = gelu(pre)`` and ``pre = x @ weight.T + bias``, in the dtype of the products."""
    y = empty(x.size(0), weight.size(0), dtype=dtype_of(bf16))
    if not _own(x, bf16):
        pre = torch.nn.functional.linear(x, weight, bias)
        _C.gelu_forward(pre.numpy(), y.numpy(), torch.get_num_threads())
        return y, pre
    pre = empty_like(y)
    _gemm(x, weight, y, transpose_b=True, bias=bias, gelu=True, pre=pre, bf16=bf16)
    return y, pre


def input_gradient(
    grad: Tensor, weight: Tensor, bf16: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the gradient of `x` in `dtype`, given the gradient of ``x @ weight.T``."""
    if not _own(grad, bf16):
        return _theirs(grad, weight)
    grad_x = empty(grad.size(0), weight.size(1), dtype=dtype)
    _gemm(grad, weight, grad_x, bf16=bf16)
    return grad_x


def gelu_input_gradient(grad: Tensor, weight: Tensor, pre: Tensor, bf16: bool) -> Tensor:
    """Return the gradient of `pre`, given the gradient of ``gelu(pre) @ weight.T``."""
    grad_pre = empty_like(pre)
    if _own(grad, bf16):
        _gemm(grad, weight, grad_pre, gelu_grad=pre, bf16=bf16)
    else:
        torch.mm(grad, weight, out=grad_pre)
        threads = torch.get_num_threads()
        _C.gelu_backward(grad_pre.numpy(), pre.numpy(), grad_pre.numpy(), threads)
    return grad_pre


def weight_gradient(
    grad: Tensor, x: Tensor, with_bias: bool, bf16: bool, *, of_gelu: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the fp32 gradients of weight and bias, given that of ``x @ weight.T + bias``.

    of_gelu: the input of the layer was ``gelu(x)``, which is recomputed here.
    """
    if not _own(grad, bf16):
        if of_gelu:
            y = empty_like(x)
            _C.gelu_forward(x.numpy(), y.numpy(), torch.get_num_threads())
            x = y
        return _theirs(grad.T, x), grad.sum(0) if with_bias else None
    grad_weight = empty(grad.size(1), x.size(1))
    grad_bias = empty(grad.size(1)) if with_bias else None
    _gemm(
        *(grad, x, grad_weight),
        transpose_a=True,
        gelu_b=of_gelu,
        row_sums=grad_bias,
        bf16=bf16,
    )
    return grad_weight, grad_bias


def weight_gradient_into(grad: Tensor, x: Tensor, total: Tensor, add: bool, bf16: bool) -> None:
    """Write the weight gradient of a part of the batch to `total` (fp32), or add it if `add`."""
    if _own(grad, bf16):
        _gemm(grad, x, total, transpose_a=True, accumulate=add, bf16=bf16)
    else:
        total.addmm_(grad.T, x, beta=1 if add else 0)


def linear_into(x: Tensor, weight: Tensor, y: Tensor, bf16: bool) -> None:
    """Write ``x @ weight.T`` to `y`."""
    if _own(x, bf16):
        _gemm(x, weight, y, transpose_b=True, bf16=bf16)
    else:
        torch.mm(x, weight.T, out=y)


def _theirs(left: Tensor, right: Tensor) -> Tensor:
    """Multiply with PyTorch in fp32, even if the backward pass runs under autocast."""
    with torch.autocast("cpu", enabled=False):
        return left @ right


def _gemm(a: Tensor, b: Tensor, c: Tensor, **options: Any) -> None:
    _C.gemm(a, b, c, threads=torch.get_num_threads(), **options)


def _own(rows: Tensor, bf16: bool) -> bool:
    return bf16 or (rows.size(0) >= FEWEST_ROWS and _own_is_faster(False))


@functools.cache
def _own_is_faster(bf16: bool) -> bool:
    return _C.gemm_is_faster(bf16=bf16)
