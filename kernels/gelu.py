"""GPT-2's GELU in its tanh form, forward and backward (the twin of `fastgpt.ops.reference.gelu`).

``0.5 x (1 + tanh(u))`` is ``x * sigmoid(2u)``: one exponential, no cancellation for negative x, and
Triton has no tanh. The backward recomputes the sigmoid from x, so that only x is kept.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import DTYPES, Variant, check_tensors, on_device, widen

BLOCK = 1024  # 8 elements a thread: one 128-bit load of 16-bit numbers, two of 32-bit ones
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

# 2u = x (LINEAR + CUBIC x²)
LINEAR = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
CUBIC = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi) * 0.044715)


def gelu_forward(x: Tensor) -> Tensor:
    """Return gelu(x), contiguous, in the shape and dtype of `x`.

    x: any shape and strides; fp32, fp16 or bf16, computed in fp32, or fp64. ValueError if not.
    """
    check_tensors("gelu", x=x)
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(_gelu_forward, x, y)
    return y


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of `x`, contiguous, given `grad`, that of gelu(x).

    grad: shape and dtype of `x`, any strides (autograd's expanded ones too); ValueError if not.
    """
    check_tensors("gelu", grad=grad, x=x)
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            f"gelu: grad must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
            f"not {tuple(grad.shape)} {grad.dtype}"
        )
    # Both come out of matrix products and are contiguous; the rare one that is not (the gradient of
    # a sum has stride 0) is worth a copy, which keeps the kernels to one flat, vectorised index.
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    _launch(_gelu_backward, grad, x, grad_x)
    return grad_x


def variants(capability: int) -> Iterator[Variant]:
    """Yield all that the launchers can launch on a GPU of a compute capability."""
    for dtype in DTYPES.values():
        for kernel, pointers in (
            (_gelu_forward, ("x_ptr", "y_ptr")),
            (_gelu_backward, ("grad_ptr", "x_ptr", "grad_x_ptr")),
        ):
            signature = dict.fromkeys(pointers, f"*{dtype}") | {"n_elements": "i64"}
            yield Variant(kernel.__name__, signature, {"BLOCK": BLOCK}, OPTIONS)


@triton.jit
def _gelu_forward(x_ptr, y_ptr, n_elements, BLOCK: tl.constexpr):
    offsets, inside = _block(n_elements, BLOCK)
    x = widen(tl.load(x_ptr + offsets, mask=inside))
    e, r = _decay(x)
    y = x * tl.where(x < 0.0, e * r, r)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(grad_ptr, x_ptr, grad_x_ptr, n_elements, BLOCK: tl.constexpr):
    offsets, inside = _block(n_elements, BLOCK)
    grad = widen(tl.load(grad_ptr + offsets, mask=inside))
    x = widen(tl.load(x_ptr + offsets, mask=inside))
    e, r = _decay(x)
    # d/dx x s(2u) = s + x s (1 - s) (2u)', and s (1 - s) = e r². Where e is 0, (2u)' may overflow.
    slope = tl.where(e == 0.0, 0.0, x * (e * r * r) * (LINEAR + 3.0 * CUBIC * x * x))
    grad_x = grad * (tl.where(x < 0.0, e * r, r) + slope)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decay(x):
    """Return e = exp(-|2u|) and r = 1 / (1 + e).

    sigmoid(2u) is r for positive x and e r for negative x; nothing overflows or cancels.
    """
    e = tl.exp(-tl.abs(x * (LINEAR + CUBIC * x * x)))
    return e, 1.0 / (1.0 + e)


@triton.jit
def _block(n_elements, BLOCK: tl.constexpr):
    # int64: tensors of more than 2^31 elements are in use
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < n_elements


def _launch(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    """Run an elementwise kernel over contiguous tensors of one size."""
    n_elements = tensors[0].numel()
    if n_elements == 0:  # CUDA has no empty grid
        return
    with on_device(tensors[0]):
        kernel[(triton.cdiv(n_elements, BLOCK),)](*tensors, n_elements, BLOCK=BLOCK, **OPTIONS)
