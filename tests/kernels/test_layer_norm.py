"""The layer-norm kernels, alone and after a residual addition, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from fastgpt.kernels import layer_norm
from fastgpt.ops import reference
from tests.kernels.truth import DTYPES, HAS_GPU, assert_as_good_as_plain, error, require_gpu_memory

EPS = 1e-5
SHAPES = [(1, 1), (1, 3), (5, 7), (3, 129), (2, 5, 768), (4, 1000), (2, 1600), (2, 8192)]
HALF = torch.bfloat16 if HAS_GPU else torch.float16
MIXES = {  # dtypes of x, residual, weight, y
    "autocast": (HALF, torch.float32, torch.float32, HALF),
    "autocast, first layer": (torch.float32, HALF, torch.float32, HALF),
    "16-bit stream": (HALF, HALF, torch.float32, HALF),
    "widened": (HALF, HALF, HALF, torch.float32),
}


def ours(x, residual, weight, bias, grad_y, grad_total, out_dtype=None):
    """Return the results of the kernels: total, y, gradients of x, residual, weight and bias."""
    total, y, mean, rstd = layer_norm.layer_norm_forward(x, residual, weight, bias, EPS, out_dtype)
    if residual is None:
        assert total is None
        total = x
    narrower = x if residual is None or x.dtype != total.dtype else residual
    grads = layer_norm.layer_norm_backward(
        grad_y, grad_total, total, weight, mean, rstd, bias is not None, narrower.dtype
    )
    by_dtype = {total.dtype: grads.total}
    if grads.x is not None:
        by_dtype[narrower.dtype] = grads.x
    both = [by_dtype[tensor.dtype] for tensor in (x, residual) if tensor is not None]
    results = [total, y, *both, grads.weight, grads.bias]
    return [result for result in results if result is not None]


def formula(x, residual, weight, bias, grad_y, grad_total, out_dtype=None):
    """Return the same results by autograd, in the dtypes of the inputs."""
    given = [x, residual, weight, bias]
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in given]
    x, residual, weight, bias = leaves
    total = x if residual is None else x + residual
    y = reference.layer_norm(total, weight, bias, EPS).to(out_dtype or total.dtype)
    outputs = [(y, grad_y)] + [(total, grad_total)] * (grad_total is not None)
    torch.autograd.backward(*zip(*outputs, strict=True))
    grads = [leaf.grad for leaf in leaves if leaf is not None]
    return [total.detach(), y.detach(), *grads]


def truth(x, residual, weight, bias, grad_y, grad_total, out_dtype=None):
    """Return the same results in float64, but computed from the total as stored."""
    total = x if residual is None else x + residual
    double = [None if t is None else t.double() for t in (total, weight, bias, grad_y, grad_total)]
    total, weight, bias, grad_y, grad_total = double
    true = formula(total, None, weight, bias, grad_y, grad_total)
    return true if residual is None else [*true[:3], true[2], *true[3:]]


def check(x, residual, weight, bias, grad_y, grad_total=None, out_dtype=None):
    """Compare forward and backward with float64, by the criterion of `truth`."""
    arguments = (x, residual, weight, bias, grad_y, grad_total, out_dtype)
    names = ["total", "y", "grad x", "grad residual", "grad weight", "grad bias"]
    if residual is None:
        names.remove("grad residual")
    results = ours(*arguments), formula(*arguments), truth(*arguments)
    for name, mine, plain, true in zip(names, *results, strict=bias is not None):
        assert_as_good_as_plain(mine, plain, true, name)


def normal(*shape, dtype=torch.float32, device):
    return torch.randn(*shape).to(device, dtype)


def affine(width, dtype, device):
    return 1 + normal(width, dtype=dtype, device=device) / 4, normal(
        width, dtype=dtype, device=device
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    x, residual, grad_y, grad_total = (normal(*shape, dtype=dtype, device=device) for _ in range(4))
    weight, bias = affine(shape[-1], dtype, device)
    check(x, None, weight, bias, grad_y)
    check(x, residual, weight, bias, grad_y, grad_total)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("with_grad_total", [True, False])
def test_mixed_dtypes(mix, with_grad_total, device):
    x, residual, weights, out = MIXES[mix]
    stream = torch.promote_types(x, residual)
    weight, bias = affine(96, weights, device)
    check(
        normal(9, 96, dtype=x, device=device),
        normal(9, 96, dtype=residual, device=device),
        weight,
        bias,
        normal(9, 96, dtype=out, device=device),
        normal(9, 96, dtype=stream, device=device) if with_grad_total else None,
        out,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_bias(dtype, device):
    x, residual, grad_y = (normal(6, 40, dtype=dtype, device=device) for _ in range(3))
    weight, _ = affine(40, dtype, device)
    check(x, None, weight, None, grad_y)
    check(x, residual, weight, None, grad_y, grad_y)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 95, 96, 97, 150])
def test_fewer_and_more_rows_than_the_programs_take_at_once(n_rows, device):
    if not HAS_GPU:  # in the interpreter, 3 multiprocessors × 16 programs × 2 rows
        config = layer_norm.backward_config(16, 4, 90)
        assert 3 * config.programs_per_sm * config.constants["ROWS"] == 96
    x, grad_y = (normal(n_rows, 16, device=device) for _ in range(2))
    check(x, None, *affine(16, torch.float32, device), grad_y)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), width=st.integers(1, 300), bias=st.booleans())
def test_any_size(rows, width, bias):
    device = "cuda" if HAS_GPU else "cpu"
    x, residual, grad = (normal(rows, width, device=device) for _ in range(3))
    weight, shift = affine(width, torch.float32, device)
    check(x, residual, weight, shift if bias else None, grad, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, device):
    x = normal(3, 8, 12, dtype=dtype, device=device)
    one = torch.ones((), dtype=dtype, device=device)
    for view in (
        x.mT,
        x[:, ::3],
        x[:, -1:],
        x[1:, 1:, 1:],
        x[:, :1].expand(3, 4, 12),
        x[0, 0],
    ):
        width = view.size(-1)
        wide = normal(width, 3, dtype=dtype, device=device)
        from_sum = one.expand(view.shape)
        by_row = normal(width, dtype=dtype, device=device).expand(view.shape)
        check(view, None, wide[:, 1], wide[:, 2], from_sum)
        check(x[0, 0, 0].expand(view.shape), view, wide[:, 1], wide[:, 2], by_row, from_sum)


def test_constant_rows_are_bias_only(device):
    x = torch.tensor([[0.0], [3.0], [-1e4], [1e-20]], device=device).expand(4, 37)
    weight, bias = affine(37, torch.float32, device)
    _, y, mean, rstd = layer_norm.layer_norm_forward(x, None, weight, bias, EPS)
    torch.testing.assert_close(mean, x[:, 0])
    torch.testing.assert_close(rstd[[0, 3]], torch.full((2,), EPS**-0.5, device=device))
    torch.testing.assert_close(y[[0, 3]], bias.expand(2, 37))
    rounding = 4e-7 * EPS**-0.5 * x.abs() * weight.abs()  # of the mean, magnified by 1 / std
    assert ((y - bias).abs() <= rounding + 1e-6).all()
    grads = layer_norm.layer_norm_backward(y, None, x, weight, mean, rstd, True)
    assert grads.total.isfinite().all()


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_a_large_mean_does_not_cost_the_variance(offset, device):
    # The mean of squares would be 1e6 (1e8) with a rounding error of 0.06 (6), too large for a
    # variance of 1.
    x = offset + normal(4, 768, device=device)
    weight, bias = affine(768, torch.float32, device)
    grad = normal(4, 768, device=device)
    _, y, _, rstd = layer_norm.layer_norm_forward(x, None, weight, bias, EPS)
    true = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert error(y, true) < 4e-7 * abs(offset)  # the rounding error of the mean
    std = (x.double().var(-1, correction=0) + EPS).sqrt()
    torch.testing.assert_close(rstd.double() * std, torch.ones_like(std), rtol=0, atol=1e-5)
    check(x, None, weight, bias, grad)


def test_total_is_normalised_as_stored(device):
    x = torch.tensor([[2048.0, 0.0, 1.0, -5.0]], dtype=torch.float16, device=device)
    residual = torch.tensor([[1.0, 0.5, 1.0, 3.0]], dtype=torch.float16, device=device)
    weight = torch.ones(4, device=device)
    total, y, mean, rstd = layer_norm.layer_norm_forward(
        x, residual, weight, None, EPS, torch.float32
    )
    assert torch.equal(total, x + residual)
    assert total[0, 0] == 2048  # 2049 is not representable in fp16
    _, *again = layer_norm.layer_norm_forward(total, None, weight, None, EPS, torch.float32)
    for first, second in zip((y, mean, rstd), again, strict=True):
        assert torch.equal(first, second)


def test_both_gradients_are_rounded_from_the_same_numbers(device):
    x = normal(5, 33, dtype=torch.float16, device=device)
    residual = normal(5, 33, device=device)
    weight, _ = affine(33, torch.float32, device)
    total, y, mean, rstd = layer_norm.layer_norm_forward(x, residual, weight, None, EPS)
    assert total.dtype == y.dtype == torch.float32
    backward = layer_norm.layer_norm_backward
    grads = backward(y, total, total, weight, mean, rstd, False, torch.float16)
    assert grads.total.dtype == torch.float32
    assert torch.equal(grads.x, grads.total.half())
    assert backward(y, total, total, weight, mean, rstd, False, torch.float32).x is None
    assert grads.bias is None


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_the_forward(with_bias, device):
    class AddLayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, residual, weight, bias):
            total, y, mean, rstd = layer_norm.layer_norm_forward(x, residual, weight, bias, EPS)
            ctx.save_for_backward(total, weight, mean, rstd)
            return total, y

        @staticmethod
        def backward(ctx, grad_total, grad_y):
            grads = layer_norm.layer_norm_backward(
                grad_y, grad_total, *ctx.saved_tensors, has_bias=with_bias
            )
            return grads.total, grads.total, grads.weight, grads.bias

    double = {"dtype": torch.float64, "device": device}
    x, residual = (normal(2, 3, **double).requires_grad_() for _ in range(2))
    weight, bias = (normal(3, **double).requires_grad_() for _ in range(2))
    inputs = (x, residual, weight, bias if with_bias else None)
    assert torch.autograd.gradcheck(AddLayerNorm.apply, inputs)


def test_float64(device):
    double = {"dtype": torch.float64, "device": device}
    x, residual, grad = (normal(7, 100, **double) for _ in range(3))
    arguments = (x, residual, *affine(100, torch.float64, device), grad, grad)
    for mine, true in zip(ours(*arguments), formula(*arguments), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-11)


def test_same_bits_twice(device):
    x, residual, grad = (normal(100, 50, device=device) for _ in range(3))
    arguments = (x, residual, *affine(50, torch.float32, device), grad, grad)
    for first, second in zip(ours(*arguments), ours(*arguments), strict=True):
        assert torch.equal(first, second)


def test_no_rows(device):
    for shape in ((0, 12), (3, 0, 12)):
        x = torch.empty(shape, device=device)
        weight, bias = affine(12, torch.float32, device)
        total, y, *_, grad_weight, grad_bias = ours(x, x, weight, bias, x, x)
        assert total.shape == y.shape == shape
        assert torch.equal(grad_weight, torch.zeros(12, device=device))
        assert torch.equal(grad_bias, torch.zeros(12, device=device))


def test_nan_stays_in_its_row(device):
    x = normal(5, 30, device=device)
    x[2, 7] = torch.nan
    weight, bias = affine(30, torch.float32, device)
    _, y, mean, rstd = layer_norm.layer_norm_forward(x, None, weight, bias, EPS)
    grads = layer_norm.layer_norm_backward(x, None, x, weight, mean, rstd, True)
    for result in (y, grads.total):
        assert result[2].isnan().all()
        assert result[[0, 1, 3, 4]].isfinite().all()


def test_refuses_what_it_does_not_support(device):
    x, vector = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    forward = layer_norm.layer_norm_forward
    with pytest.raises(ValueError, match=r"layer_norm: x must be one of .*not torch\.int64"):
        forward(x.long(), None, vector, vector, EPS)
    with pytest.raises(ValueError, match=r"layer_norm: results must be .*not torch\.int32"):
        forward(x, None, vector, vector, EPS, torch.int32)
    with pytest.raises(ValueError, match=r"float64 cannot be mixed with torch\.float32; cast"):
        forward(x, None, vector.double(), None, EPS)
    with pytest.raises(ValueError, match=r"float64 cannot be mixed with torch\.float32; cast"):
        forward(x.double(), None, vector.double(), None, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), .* not \(3,\)"):
        forward(x, None, vector[:3], None, EPS)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), .* not \(1, 4\)"):
        forward(x, None, vector, vector[None], EPS)
    with pytest.raises(ValueError, match=r"add_layer_norm: residual .* x, \(2, 4\), not \(1, 4\)"):
        forward(x, x[:1], vector, None, EPS)
    for shape, limit in (((2, 8193), 8192), ((2, 0), 8192), ((), 8192)):
        wide = torch.ones(shape, device=device)
        with pytest.raises(ValueError, match=rf"1 to {limit} elements in torch\.float32"):
            forward(wide, None, wide.flatten()[: wide.numel() // 2], None, EPS)
    wide = torch.ones(1, 2049, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"1 to 2048 elements in torch\.float64"):
        forward(wide, None, wide[0], None, EPS)


def test_backward_refuses_what_does_not_belong_together(device):
    x, vector = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    kept = torch.ones(2, device=device)
    backward = layer_norm.layer_norm_backward
    with pytest.raises(ValueError, match=r"grad_y must have .* total, \(2, 4\), not \(2, 3\)"):
        backward(x[:, :3], None, x, vector, kept, kept, True)
    with pytest.raises(ValueError, match=r"grad_total must have .* not \(4,\)"):
        backward(x, vector, x, vector, kept, kept, True)
    with pytest.raises(ValueError, match=r"mean must be .* \(2,\) torch\.float32, not \(1,\)"):
        backward(x, None, x, vector, kept[:1], kept, True)
    with pytest.raises(ValueError, match=r"rstd must be .* not \(2,\) torch\.float16"):
        backward(x, None, x, vector, kept, kept.half(), True)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\)"):
        backward(x, None, x, vector[:2], kept, kept, True)


def test_more_elements_than_int32_counts():
    require_gpu_memory(18)
    x = torch.zeros(2**31 // 1024 + 3, 1024, dtype=torch.float16, device="cuda")
    x[-3:, ::2] = 1.0
    weight = torch.ones(1024, device="cuda")
    _, y, mean, rstd = layer_norm.layer_norm_forward(x, None, weight, None, EPS)
    assert y.count_nonzero() == 3 * 1024
    grads = layer_norm.layer_norm_backward(y, x, x, weight, mean, rstd, False)
    assert grads.total.count_nonzero() >= 3 * 512
    assert grads.total[:-3].count_nonzero() == 0
