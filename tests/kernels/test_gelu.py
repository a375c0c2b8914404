"""The GELU kernels against the formula in float64."""

import pytest
import torch

pytest.importorskip("triton")
from fastgpt.kernels import gelu
from fastgpt.ops import reference
from tests.kernels.truth import DTYPES, HAS_GPU, assert_as_good_as_plain

SIZES = [0, 1, 63, 64, 65, 1000, 4097]


def truth(grad, x):
    """gelu(x) and the gradient of x, by autograd in float64."""
    x = x.detach().double().requires_grad_()
    y = reference.gelu(x)
    y.backward(grad.double())
    return y.detach(), x.grad


def plain(grad, x):
    """The same in the precision of `x`: what the kernels are allowed twice the error of."""
    x = x.detach().clone().requires_grad_()
    y = reference.gelu(x)
    y.backward(grad)
    return y.detach(), x.grad


def check(grad, x):
    """Hold both kernels against the truth, by FlashAttention's rule."""
    actual = gelu.gelu_forward(x), gelu.gelu_backward(grad, x)
    for ours, twin, true in zip(actual, plain(grad, x), truth(grad, x), strict=True):
        assert ours.shape == x.shape
        assert_as_good_as_plain(ours, twin, true)


def normal(*shape, dtype, device):
    # Drawn in one precision for all: width 3 reaches both tails and the curved part between them.
    return (3 * torch.randn(*shape)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes(size, dtype, device):
    check(
        normal(size, dtype=dtype, device=device),
        normal(size, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, device):
    x = normal(6, 40, 10, dtype=dtype, device=device)
    for view in (
        x.mT,
        x[:, ::3],
        x[1:, 1:, 1:],
        x[:, :1].expand(6, 7, 10),
        x[0, 0, 3],
        x.flatten()[1:],
    ):
        check(torch.ones_like(view), view)
        check(torch.ones((), dtype=dtype, device=device).expand(view.shape), view)  # from .sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_tails_and_zero(dtype, device):
    edges = [0.0, 1e-7, 1e-4, 1.0, 5.0, 8.0, 10.0, 12.0, 30.0, 1e2, 1e4]
    x = torch.tensor(edges + [-edge for edge in edges], dtype=dtype, device=device)
    check(torch.ones_like(x), x)


# The interpreter computes on NumPy, which warns of what a GPU does in silence.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(dtype, device):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest], dtype=dtype, device=device)
    assert gelu.gelu_forward(x).tolist() == [largest, 0.0]
    assert gelu.gelu_backward(torch.ones_like(x), x).tolist() == [1.0, 0.0]


def test_float64(device):  # for gradcheck, of whatever uses the kernels
    x = normal(1000, dtype=torch.float64, device=device)
    y, grad_x = truth(torch.ones_like(x), x)
    torch.testing.assert_close(gelu.gelu_forward(x), y, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        gelu.gelu_backward(torch.ones_like(x), x), grad_x, rtol=0, atol=1e-13
    )


def test_gradient_is_that_of_the_forward(device):
    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return gelu.gelu_forward(x)

        @staticmethod
        def backward(ctx, grad):
            return gelu.gelu_backward(grad, *ctx.saved_tensors)

    x = normal(3, 5, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(Gelu.apply, x)


def test_refuses_what_it_does_not_support(device):
    x = torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*not torch\.int64"):
        gelu.gelu_forward(x.long())
    with pytest.raises(ValueError, match=r"not torch\.complex64"):
        gelu.gelu_backward(x.cfloat(), x.cfloat())
    with pytest.raises(ValueError, match=r"shape and dtype of x, \(4,\) .* not \(3,\)"):
        gelu.gelu_backward(x[:3], x)
    with pytest.raises(ValueError, match=r"not \(4,\) torch\.float16"):
        gelu.gelu_backward(x.half(), x)


@pytest.mark.skipif(not HAS_GPU, reason="needs 13 GB of GPU memory")
def test_more_elements_than_int32_counts():
    x = torch.zeros(2**31 + 5, dtype=torch.float16, device="cuda")
    x[-5:] = 1.0
    y = gelu.gelu_forward(x)
    assert y.count_nonzero() == 5
    del y
    assert gelu.gelu_backward(x, x).count_nonzero() == 5
