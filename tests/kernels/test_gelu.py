"""The GELU kernels against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from fastgpt.kernels import gelu
from fastgpt.ops import reference
from tests.kernels.truth import DTYPES, HAS_GPU, assert_as_good_as_plain, require_gpu_memory

SIZES = [0, 1, 63, 64, 65, 1000, 4097]


def formula(grad, x, bias=None):
    """Return gelu(x + bias) and the gradients of x and bias in the dtype of the inputs."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, bias)]
    y = reference.gelu(leaves[0] if bias is None else leaves[0] + leaves[1]).to(x.dtype)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def check(grad, x, bias=None):
    """Compare both kernels with float64, by the criterion of `truth`."""
    double = [t if t is None else t.double() for t in (grad, x, bias)]
    grad_x, grad_bias = gelu.gelu_backward(grad, x, bias)
    assert (grad_bias is None) == (bias is None)
    results = [gelu.gelu_forward(x, bias), grad_x, grad_bias][: 2 + (bias is not None)]
    names = ("y", "grad x", "grad bias")
    for name, ours, plain, true in zip(
        names, results, formula(grad, x, bias), formula(*double), strict=bias is not None
    ):
        assert_as_good_as_plain(ours, plain, true, name)


def normal(*shape, dtype, device):
    # The same values for all dtypes. A standard deviation of 3 covers the curve and both tails.
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


# The interpreter uses NumPy, which warns of overflows that a GPU ignores.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(dtype, device):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest], dtype=dtype, device=device)
    assert gelu.gelu_forward(x).tolist() == [largest, 0.0]
    assert gelu.gelu_backward(torch.ones_like(x), x)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bias", [None, 10])
def test_float64(bias, device):  # used by gradcheck
    x, grad = (normal(100, 10, dtype=torch.float64, device=device) for _ in range(2))
    bias = bias and normal(bias, dtype=torch.float64, device=device)
    actual = [gelu.gelu_forward(x, bias), *gelu.gelu_backward(grad, x, bias)]
    for ours, true in zip(actual, formula(grad, x, bias), strict=bias is not None):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (5, 255), (2, 4, 256), (17, 257), (1, 600), (40, 3), (9,)], ids=str
)
def test_bias(shape, dtype, device):
    x, grad = (normal(*shape, dtype=dtype, device=device) for _ in range(2))
    check(grad, x, normal(shape[-1], dtype=dtype, device=device))
    check(grad, x, normal(shape[-1], dtype=torch.float32, device=device))


# In the interpreter, 3 multiprocessors × 6 programs for a block of columns, 8 or 16 rows each
@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 143, 144, 145, 300])
def test_fewer_and_more_rows_than_the_programs_take_at_once(n_rows, device):
    x, grad = (normal(n_rows, 20, dtype=torch.float32, device=device) for _ in range(2))
    check(grad, x, normal(20, dtype=torch.float32, device=device))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), width=st.integers(1, 300))
def test_bias_of_any_size(rows, width):
    device = "cuda" if HAS_GPU else "cpu"
    x, grad = (normal(rows, width, dtype=torch.float32, device=device) for _ in range(2))
    check(grad, x, normal(width, dtype=torch.float32, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_with_any_strides(dtype, device):
    x = normal(5, 12, 10, dtype=dtype, device=device)
    wide = normal(12, 3, dtype=dtype, device=device)
    for view in (x.mT, x[:, ::3], x[1:, 1:, 1:], x[:, :1].expand(5, 4, 10), x[0, 0]):
        from_sum = torch.ones((), dtype=dtype, device=device).expand(view.shape)
        check(from_sum, view, wide[: view.size(-1), 1])
        check(from_sum, view, wide[0, 0].expand(view.size(-1)))


def test_the_sum_with_the_bias_is_not_rounded(device):
    x = torch.tensor([[2048.0, -2048.0]], dtype=torch.float16, device=device)
    bias = torch.tensor([-2047.5, 2048.7], device=device)
    y = gelu.gelu_forward(x, bias)
    torch.testing.assert_close(y, reference.gelu(x.float() + bias).half(), rtol=2e-3, atol=0)
    grad_x, grad_bias = gelu.gelu_backward(torch.ones_like(x), x, bias)
    assert grad_bias.dtype == torch.float32
    assert torch.equal(grad_bias.half(), grad_x[0])  # with one row, the same value, rounded once
    assert not torch.equal(grad_bias, grad_x[0].float())


def test_same_bits_twice(device):
    x, grad = (normal(300, 30, dtype=torch.float32, device=device) for _ in range(2))
    bias = normal(30, dtype=torch.float32, device=device)
    first, second = (gelu.gelu_backward(grad, x, bias) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_no_rows_no_columns(device):
    for shape in ((0, 5), (3, 0), (3, 0, 5)):
        x, bias = torch.ones(shape, device=device), torch.ones(shape[-1], device=device)
        assert gelu.gelu_forward(x, bias).shape == shape
        grad_x, grad_bias = gelu.gelu_backward(x, x, bias)
        assert grad_x.shape == shape
        assert torch.equal(grad_bias, torch.zeros_like(bias))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_the_forward(with_bias, device):
    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bias):
            ctx.save_for_backward(x, bias)
            return gelu.gelu_forward(x, bias)

        @staticmethod
        def backward(ctx, grad):
            return gelu.gelu_backward(grad, *ctx.saved_tensors)

    x, bias = (
        normal(*shape, dtype=torch.float64, device=device).requires_grad_()
        for shape in ((3, 5), (5,))
    )
    assert torch.autograd.gradcheck(Gelu.apply, (x, bias if with_bias else None))


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
    for bias in (x[:3], x[:1], x[None], x[0]):
        with pytest.raises(ValueError, match=r"bias must have shape \[C\], .* \(2, 4\), not \("):
            gelu.gelu_forward(x.expand(2, 4), bias)
        with pytest.raises(ValueError, match=r"bias must have shape \[C\], .* \(2, 4\), not \("):
            gelu.gelu_backward(x.expand(2, 4), x.expand(2, 4), bias)
    with pytest.raises(ValueError, match=r"bias must be one of .*not torch\.int64"):
        gelu.gelu_forward(x, x.long())


def test_more_elements_than_int32_counts():
    require_gpu_memory(13)
    x = torch.zeros(2**31 + 5, dtype=torch.float16, device="cuda")
    x[-5:] = 1.0
    y = gelu.gelu_forward(x)
    assert y.count_nonzero() == 5
    del y
    assert gelu.gelu_backward(x, x)[0].count_nonzero() == 5


def test_more_elements_than_int32_counts_with_a_bias():
    require_gpu_memory(18)
    x = torch.zeros(2**31 // 1024 + 3, 1024, dtype=torch.float16, device="cuda")
    x[-3:] = 1.0
    bias = torch.zeros(1024, device="cuda")
    y = gelu.gelu_forward(x, bias)
    assert y.count_nonzero() == 3 * 1024
    del y
    grad_x, grad_bias = gelu.gelu_backward(x, x, bias)
    assert grad_x.count_nonzero() == 3 * 1024
    torch.testing.assert_close(grad_bias, 3 * grad_x[-1].float(), rtol=2e-3, atol=0)
