"""Results and gradients of each backend compared to the reference in float64."""

import math
from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastgpt import _C, ops
from fastgpt.ops import native, products, reference
from tests.backends import BACKENDS
from tests.opcheck import opcheck

TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return ops.get(request.param)


def assert_like_float64(name: str, backend: ModuleType, *args: object) -> None:
    """Compare an operation's result and gradients in fp32 to the reference's in fp64."""
    narrow = [_leaf(a, torch.float32) for a in args]
    wide = [_leaf(a, torch.float64) for a in args]
    ours, truth = getattr(backend, name)(*narrow), getattr(reference, name)(*wide)
    ours, truth = (r if isinstance(r, tuple) else (r,) for r in (ours, truth))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **TOLERANCE)
    weights = [torch.randn_like(b) for b in truth]
    sum((a * w.float()).sum() for a, w in zip(ours, weights, strict=True)).backward()
    sum((b * w).sum() for b, w in zip(truth, weights, strict=True)).backward()
    for a, b in zip(narrow, wide, strict=True):
        if isinstance(a, Tensor) and a.requires_grad:
            assert_close_of_size(a.grad.double(), b.grad)


def assert_close_of_size(ours: Tensor, truth: Tensor) -> None:
    """Compare relative to the tensor's largest values, as sums over many rows may nearly cancel."""
    size = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
    torch.testing.assert_close(ours, truth, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] * size)


def _leaf(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype, copy=True).requires_grad_()
    return value


@pytest.mark.parametrize("shape", [(1, 3), (5, 7), (2, 3, 48), (4, 1, 129), (1, 1000)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(backend: ModuleType, shape: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.randn(shape) * 3 + 1, torch.randn(shape[-1])
    assert_like_float64("layer_norm", backend, x, weight, weight * 0.5 if bias else None, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_add_layer_norm(backend: ModuleType, bias: bool) -> None:
    x, residual, weight = torch.randn(2, 5, 33), torch.randn(2, 5, 33), torch.randn(33)
    assert_like_float64("add_layer_norm", backend, x, residual, weight, weight if bias else None)


def test_layer_norm_is_pytorchs() -> None:
    x, weight, bias = torch.randn(4, 9).double(), torch.randn(9).double(), torch.randn(9).double()
    truth = F.layer_norm(x, (9,), weight, bias, 1e-3)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-3), truth)


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 127])
@pytest.mark.parametrize(("n_head", "width"), [(1, 16), (3, 48), (4, 128)])
def test_causal_attention(backend: ModuleType, time: int, n_head: int, width: int) -> None:
    assert_like_float64("causal_attention", backend, torch.randn(2, time, 3 * width), n_head)


def test_causal_attention_is_the_formula_per_head_and_position() -> None:
    batch, time, n_head, width = 2, 5, 3, 12
    qkv = torch.randn(batch, time, 3 * width).double()
    ours = reference.causal_attention(qkv, n_head)
    size = width // n_head
    for b, t, h in [(0, 0, 0), (1, 3, 2), (1, 4, 1), (0, 2, 0)]:
        part = slice(h * size, (h + 1) * size)
        q, k, v = qkv[b].split(width, dim=-1)
        scores = [float(q[t, part] @ k[s, part]) / math.sqrt(size) for s in range(t + 1)]
        shares = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        truth = sum(p * v[s, part] for s, p in enumerate(shares))
        torch.testing.assert_close(ours[b, t, part], truth)


def test_gradients_with_stride_zero(backend: ModuleType) -> None:
    """`.sum().backward()` gives every operation a gradient whose strides are all 0."""
    qkv = torch.randn(2, 9, 48, requires_grad=True)
    backend.causal_attention(qkv, 2).sum().backward()
    wide = qkv.detach().double().requires_grad_()
    reference.causal_attention(wide, 2).sum().backward()
    torch.testing.assert_close(qkv.grad.double(), wide.grad, **TOLERANCE)
    x = torch.randn(2, 9, 16, requires_grad=True)
    backend.gelu(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_inputs_of_any_stride(backend: ModuleType) -> None:
    qkv = torch.randn(48, 2, 10).permute(1, 2, 0)
    assert_like_float64("causal_attention", backend, qkv, 2)
    torch.testing.assert_close(
        backend.gelu(qkv).double(), reference.gelu(qkv.double()), **TOLERANCE
    )
    strided = torch.randn(6, 40)[:, ::2]
    ours = backend.layer_norm(strided, torch.ones(20), None)
    truth = reference.layer_norm(strided.double(), torch.ones(20).double(), None)
    torch.testing.assert_close(ours.double(), truth, **TOLERANCE)


def test_attention_dropout_is_a_function_of_its_seed(backend: ModuleType) -> None:
    qkv = torch.randn(2, 40, 3 * 32)
    state = torch.get_rng_state()
    first, second = (backend.causal_attention(qkv, 4, 0.5, seed=7) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, backend.causal_attention(qkv, 4, 0.5, seed=8))
    assert not torch.equal(first, backend.causal_attention(qkv, 4))


def test_attention_dropout_keeps_the_mean(backend: ModuleType) -> None:
    qkv = torch.randn(1, 6, 3 * 8).double()
    # The interpreter takes 40 ms for each; the mask itself is tested in tests/kernels.
    n_runs = 3000 if backend in (reference, native) else 300
    runs = torch.stack([backend.causal_attention(qkv, 2, 0.3, seed=s) for s in range(n_runs)])
    expected = reference.causal_attention(qkv, 2)
    error = (runs.mean(0) - expected).abs() / (runs.std(0) / math.sqrt(len(runs)) + 1e-9)
    assert error.max() < 5  # standard errors


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4], [3, 12], [1, 1]])
@pytest.mark.parametrize("n_new", [1, 3])
def test_cached_attention(backend: ModuleType, lengths: list[int], n_new: int) -> None:
    """Rows of any length; positions beyond a row's length are ignored, even if they are NaN."""
    lengths = [max(length, n_new) for length in lengths]
    k, v = torch.randn(2, 2, 3, 12, 8).double()
    q = torch.randn(2, 3, n_new, 8).double()
    k_cache, v_cache = k.float(), v.float()
    for row, length in enumerate(lengths):
        k_cache[row, :, length:] = v_cache[row, :, length:] = math.nan
    ours = backend.cached_attention(q.float(), k_cache, v_cache, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        scores = q[row] @ k[row, :, :length].mT / math.sqrt(8)
        hidden = torch.ones(n_new, length, dtype=torch.bool).triu(length - n_new + 1)
        truth = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[row, :, :length]
        torch.testing.assert_close(ours[row].double(), truth, **TOLERANCE)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gelu(backend: ModuleType, bias: bool) -> None:
    x, weight = torch.randn(2, 5, 24), torch.randn(40, 24)
    assert_like_float64("linear_gelu", backend, x, weight, torch.randn(40) if bias else None)


def mlp_arguments(shape: tuple[int, ...], bias: bool, residual: bool) -> list[Tensor | None]:
    """Return the arguments of `norm_mlp` except eps: an MLP from C to 3C + 1 and back."""
    width = shape[-1]
    hidden = 3 * width + 1
    biases = (torch.randn(width), torch.randn(hidden), torch.randn(width)) if bias else (None,) * 3
    return [
        torch.randn(shape),
        torch.randn(shape) if residual else None,
        *(torch.randn(width), biases[0]),
        *(torch.randn(hidden, width) / width, biases[1]),
        *(torch.randn(width, hidden) / hidden, biases[2]),
    ]


SHAPES_OF_ROWS = [(1, 8), (2, 5, 24), (3, 40, 33), (300, 65)]  # products have a path for few rows


@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(backend: ModuleType, shape: tuple[int, ...], bias: bool) -> None:
    weight = torch.randn(19, shape[-1]) / shape[-1]
    bias_or_none = torch.randn(19) if bias else None
    assert_like_float64("linear", backend, torch.randn(shape), weight, bias_or_none)


@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_linear(
    backend: ModuleType, shape: tuple[int, ...], bias: bool, residual: bool
) -> None:
    assert_like_float64("norm_linear", backend, *mlp_arguments(shape, bias, residual)[:6])


@pytest.mark.parametrize("shape", SHAPES_OF_ROWS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_mlp(backend: ModuleType, shape: tuple[int, ...], bias: bool, residual: bool) -> None:
    assert_like_float64("norm_mlp", backend, *mlp_arguments(shape, bias, residual))


@pytest.mark.parametrize("name", ["norm_linear", "norm_mlp", "add_layer_norm"])
def test_only_what_is_used_has_a_gradient(backend: ModuleType, name: str) -> None:
    """The sum alone, the other result alone, and frozen weights."""
    n_arguments = {"norm_linear": 6, "norm_mlp": 8, "add_layer_norm": 4}[name]
    arguments = mlp_arguments((4, 5, 24), True, True)[:n_arguments]
    for used in (0, 1):
        for frozen in range(2, n_arguments):
            narrow = [_leaf(a, torch.float32) for a in arguments]
            wide = [_leaf(a, torch.float64) for a in arguments]
            for leaves, module in ((narrow, backend), (wide, reference)):
                leaves[frozen].requires_grad_(False)
                getattr(module, name)(*leaves)[used].square().sum().backward()
            for a, b in zip(narrow, wide, strict=True):
                if b.grad is None:
                    assert a.grad is None or not a.grad.any()
                else:
                    assert_close_of_size(a.grad.double(), b.grad)


def test_layers_with_gradients_of_stride_zero(backend: ModuleType) -> None:
    narrow = [_leaf(a, torch.float32) for a in mlp_arguments((2, 9, 24), True, True)]
    wide = [_leaf(a.detach(), torch.float64) for a in narrow]
    for leaves, module in ((narrow, backend), (wide, reference)):
        total, y = module.norm_mlp(*leaves)
        (total.sum() + y.sum()).backward()
    for a, b in zip(narrow, wide, strict=True):
        assert_close_of_size(a.grad.double(), b.grad)


def test_layers_of_any_stride(backend: ModuleType) -> None:
    """Inputs and weights that are views: transposed, strided, or expanded over the batch."""
    x, residual = torch.randn(24, 9, 2).permute(2, 1, 0), torch.randn(9, 24).expand(2, 9, 24)
    weight, bias = torch.randn(24, 30).T, torch.randn(60)[::2]
    norm = torch.randn(48)[::2]
    arguments = (x, residual, norm, norm, weight, bias)
    ours = backend.norm_linear(*arguments)
    truth = reference.norm_linear(*(a.double() for a in arguments))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **TOLERANCE)
    ours, truth = (
        module.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        for module, dtype in ((backend, torch.float32), (reference, torch.float64))
    )
    torch.testing.assert_close(ours.double(), truth, **TOLERANCE)


def test_the_threads_change_no_bit() -> None:
    """Results and gradients do not depend on the thread count, so resumed runs are reproducible."""
    arguments = mlp_arguments((3, 70, 96), True, True)
    head, targets = torch.randn(501, 96), torch.randint(501, (3, 70))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [_leaf(a, torch.float32) for a in (*arguments, head)]
            total, y = native.norm_mlp(*leaves[:-1])
            _, normed = native.add_layer_norm(y, total, leaves[2], leaves[3])
            loss = native.linear_cross_entropy(normed, leaves[-1], targets)
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    if _C.gemm_is_faster(bf16=False):  # MKL's products need not have this property
        for some in results[1:]:
            assert all(map(torch.equal, results[0], some))


def trace(function: Callable[..., object], *args: object) -> Callable[..., Any]:
    return make_fx(lambda *tensors: function(*tensors))(*args)


def test_layers_can_be_traced() -> None:
    arguments = mlp_arguments((2, 3, 8), True, True)
    for function, some in ((native.norm_linear, arguments[:6]), (native.norm_mlp, arguments)):
        traced = trace(function, *some)
        others = [a + 1 for a in some]
        for a, b in zip(traced(*others), function(*others), strict=True):
            torch.testing.assert_close(a, b)
    x, head, targets = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
    traced = trace(native.linear_cross_entropy, x, head, targets)
    torch.testing.assert_close(
        traced(x + 1, head, targets), native.linear_cross_entropy(x + 1, head, targets)
    )


def test_layers_under_autocast_are_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "own_in_bf16", lambda: False)  # the residual stream stays fp32
    arguments = mlp_arguments((2, 6, 16), True, True)
    exact = reference.norm_mlp(*(a.double() for a in arguments))
    with torch.autocast("cpu", torch.bfloat16):
        total, y = native.norm_mlp(*arguments)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(total.double(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y.double(), exact[1], rtol=5e-2, atol=5e-2)


def test_a_norms_row_of_nan_stays_in_its_row(backend: ModuleType) -> None:
    x, weight = torch.randn(3, 40), torch.randn(40)
    x[1, 7] = math.nan
    y = backend.layer_norm(x, weight, None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 65), (2, 5, 129)])
def test_gelu(backend: ModuleType, shape: tuple[int, ...]) -> None:
    assert_like_float64("gelu", backend, torch.randn(shape) * 4)


def test_gelu_of_extremes(backend: ModuleType) -> None:
    x = torch.tensor([-1e10, -1e4, -50.0, -0.0, 0.0, 1e-40, 50.0, 1e4, 1e10], requires_grad=True)
    y = backend.gelu(x)
    y.sum().backward()
    torch.testing.assert_close(y, x.detach().clamp(min=0.0), rtol=0, atol=1e-38)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(x.grad, expected)


def test_gelu_is_an_operator_that_pytorch_can_trace() -> None:
    x = torch.randn(3, 70)[:, ::2].requires_grad_()
    opcheck(torch.ops.fastgpt.cpu_gelu.default, (x,))
    traced = make_fx(native.gelu)(torch.randn(5))
    y = torch.randn(5)
    torch.testing.assert_close(traced(y), reference.gelu(y))


def test_gelu_takes_nan_along(backend: ModuleType) -> None:
    x = torch.full((40,), math.nan, requires_grad=True)
    y = backend.gelu(x)
    y.sum().backward()
    assert y.isnan().all()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("size", [100, 32_768, 100_003])
def test_gelu_on_several_threads_is_the_same(size: int) -> None:
    """Also for sizes that do not divide evenly between the threads."""
    x, grad = torch.randn(2, size).numpy() * 3
    results = []
    for threads in (1, 2, 3, 7):
        y, grad_x = np.full_like(x, np.nan), np.full_like(x, np.nan)
        _C.gelu_forward(x, y, threads)
        _C.gelu_backward(grad, x, grad_x, threads)
        results.append((y, grad_x))
    for y, grad_x in results[1:]:
        np.testing.assert_array_max_ulp(y, results[0][0], 2)
        np.testing.assert_allclose(grad_x, results[0][1], rtol=1e-5, atol=1e-6)


def test_compiled_gelu_refuses_what_it_would_misread() -> None:
    x, y = torch.randn(2, 8).numpy()
    with pytest.raises(ValueError, match="arrays must have the same size"):
        _C.gelu_forward(x, y[:7].copy(), 1)
    with pytest.raises(TypeError):
        _C.gelu_forward(x[::2], y[:4].copy(), 1)
    with pytest.raises(TypeError):
        _C.gelu_forward(x.astype("float64"), y, 1)


@pytest.mark.usefixtures("max_logits")
def test_no_gradient_is_computed_for_nobody() -> None:
    weight = torch.randn(65, 16, requires_grad=True)
    x, targets = torch.randn(8, 16), torch.randint(65, (8,))
    with torch.no_grad():
        quiet = native.linear_cross_entropy(x, weight, targets)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, native.linear_cross_entropy(x, weight, targets).detach())


def test_the_loss_is_fp32_whatever_the_inputs(backend: ModuleType) -> None:
    x, weight = torch.randn(6, 4).half(), torch.randn(9, 4).half()
    loss = backend.linear_cross_entropy(x, weight, torch.arange(6))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_most_twice_as_far_as_plain_pytorch(
    backend: ModuleType, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and backend.__name__.endswith("triton"):
        with pytest.raises(ValueError, match="interpreter computes wrong numbers"):
            backend.gelu(torch.ones(1, dtype=dtype))
        return
    x = torch.randn(8, 256).to(dtype)
    plain = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    truth = reference.gelu(x.double())
    assert (backend.gelu(x) - truth).abs().max() <= 2 * (plain - truth).abs().max()
    assert backend.gelu(x).dtype == dtype


@pytest.fixture(params=[2**25, 1, 40, 65 * 4])
def max_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the chunked loss in one chunk, one row at a time, and several rows at a time."""
    monkeypatch.setattr(ops, "MAX_LOGITS", request.param)


@pytest.mark.usefixtures("max_logits")
@pytest.mark.parametrize("ignored", [0, 3])
def test_linear_cross_entropy(backend: ModuleType, ignored: int) -> None:
    x, weight = torch.randn(2, 7, 16), torch.randn(65, 16)
    targets = torch.randint(65, (2, 7))
    targets.view(-1)[:ignored] = -1
    assert_like_float64("linear_cross_entropy", backend, x, weight, targets, -1)


def test_linear_cross_entropy_is_pytorchs() -> None:
    x, weight = torch.randn(6, 4).double(), torch.randn(9, 4).double()
    targets = torch.tensor([1, 2, -100, 8, 0, -100])
    truth = F.cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(reference.linear_cross_entropy(x, weight, targets), truth)


@pytest.mark.usefixtures("max_logits")
def test_linear_cross_entropy_with_nothing_to_count_is_nan(backend: ModuleType) -> None:
    nothing = torch.full((4,), -100)
    assert backend.linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), nothing).isnan()


@pytest.mark.usefixtures("max_logits")
def test_the_losss_gradient_can_be_asked_for_twice(backend: ModuleType) -> None:
    """Each is scaled by the gradient of the loss; gradients returned earlier do not change."""
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = backend.linear_cross_entropy(x, weight, torch.arange(6)) * 3.0
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    copies = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, (x, weight))
    truth = torch.autograd.grad(
        3.0 * reference.linear_cross_entropy(x, weight, torch.arange(6)), (x, weight)
    )
    for a, b, c, true in zip(first, copies, second, truth, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(a, true, **TOLERANCE)


def test_a_target_that_is_no_class_is_refused() -> None:
    for target in (9, -1):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            native.linear_cross_entropy(
                torch.randn(2, 8), torch.randn(9, 8), torch.tensor([0, target])
            )


def test_loss_of_extreme_logits(backend: ModuleType) -> None:
    """Logits far apart do not overflow; the largest has probability 1."""
    x = torch.tensor([[1e4], [-1e4], [300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    loss = backend.linear_cross_entropy(x, weight, torch.tensor([0, 1, 2]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(50.0))
    torch.testing.assert_close(x.grad, torch.tensor([[0.0], [0.0], [0.5 / 3]]))


@pytest.mark.usefixtures("max_logits")
def test_linear_cross_entropy_gradcheck(backend: ModuleType) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3, 3])
    assert torch.autograd.gradcheck(
        lambda x, w: backend.linear_cross_entropy(x, w, targets), (x, weight)
    )


def test_chunked_loss_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to PyTorch's own computation under autocast, which rounds at the same points."""
    x, weight = torch.randn(32, 16), torch.randn(65, 16)
    targets = torch.randint(65, (32,))
    results = []
    for limit in (2**25, 4 * 65):
        monkeypatch.setattr(ops, "MAX_LOGITS", limit)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = native.linear_cross_entropy(*leaves, targets)
        loss.backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    for whole, chunked in zip(*results, strict=True):
        assert whole.dtype == chunked.dtype
        torch.testing.assert_close(whole, chunked, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", BACKENDS[1:])
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.sampled_from([4, 16, 31]))
def test_backends_agree_on_any_shape(
    name: str, batch: int, time: int, n_head: int, size: int
) -> None:
    qkv = torch.randn(batch, time, 3 * n_head * size)
    truth = reference.causal_attention(qkv.double(), n_head)
    ours = ops.get(name).causal_attention(qkv, n_head)
    torch.testing.assert_close(ours.double(), truth, **TOLERANCE)


def test_every_backend_has_each_operation(backend: ModuleType) -> None:
    """With the arguments of the reference, which documents them."""
    names = ("layer_norm", "add_layer_norm", "causal_attention", "cached_attention")
    layers = ("linear", "linear_gelu", "norm_linear", "norm_mlp", "linear_cross_entropy")
    for name in (*names, "gelu", *layers):
        ours, theirs = (signature(getattr(b, name)) for b in (backend, reference))
        assert ours == theirs, name


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, reference, native, triton, not 'tritton'"):
        ops.get("tritton")


def test_auto_takes_the_kernels_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is new enough and with a working Triton; otherwise it warns with the reason."""
    has_kernels, gpu = ops._has_kernels.__wrapped__, torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(ops, "_triton_error", lambda: None)
    assert has_kernels(gpu)
    assert not has_kernels(torch.device("cpu"))
    monkeypatch.setattr(ops, "_triton_error", lambda: "there is a fault")
    with pytest.warns(UserWarning, match="instead of fastgpt's kernels: there is a fault"):
        assert not has_kernels(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has_kernels(gpu)


@pytest.mark.parametrize(
    ("width", "n_head", "dtype", "fits"),
    [
        (768, 12, torch.float32, True),
        (8192, 64, torch.bfloat16, True),
        (258, 2, torch.float32, False),
        (8256, 129, torch.float32, False),
        (768, 12, torch.float64, False),
    ],
)
def test_auto_takes_the_kernels_for_models_that_they_can_do(
    monkeypatch: pytest.MonkeyPatch, width: int, n_head: int, dtype: torch.dtype, fits: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "_has_kernels", lambda device: True)
    fit = ops.kernels_fit(width, n_head, dtype)
    chosen = ops.get("auto", torch.device("cuda", 0), fit)
    assert chosen.__name__ == f"fastgpt.ops.{'cuda' if fits else 'native'}"
    assert ops.get("auto", None, fit) is native


def test_faults_of_triton_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert "pip install triton" in str(ops._triton_error())
    monkeypatch.setattr(ops, "find_spec", lambda name: name)

    def fail(name: str) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(ops, "unsupported_version", lambda *names: "triton 3.5 is installed")
    assert ops._triton_error() == (
        "triton 3.5 is installed; pip install --upgrade torch installs the Triton that fits it"
    )
    monkeypatch.setattr(ops, "unsupported_version", lambda *names: None)
    monkeypatch.setattr(ops, "import_module", fail)
    assert "RuntimeError: Failed to find C compiler" in str(ops._triton_error())


def _inputs_of(name: str) -> list[Any]:
    """Return arguments of an operation, large enough for the fast products to be used."""
    x, residual, norm = torch.randn(4, 8, 16), torch.randn(4, 8, 16), torch.randn(2, 16)
    weight, bias, back = torch.randn(32, 16), torch.randn(32), torch.randn(16, 32)
    known: dict[str, list[Any]] = {
        "layer_norm": [x, norm[0], norm[1]],
        "add_layer_norm": [x, residual, norm[0], norm[1]],
        "linear": [x, weight, bias],
        "norm_linear": [x, residual, norm[0], norm[1], weight, bias],
        "norm_mlp": [x, residual, norm[0], norm[1], weight, bias, back, norm[0]],
        "linear_cross_entropy": [x, weight, torch.randint(32, (4, 8))],
        "tied_embedding": [torch.randint(32, (4, 8)), weight],
    }
    return known[name]


@pytest.mark.parametrize(
    "name",
    [
        *("layer_norm", "add_layer_norm", "linear", "norm_linear", "norm_mlp"),
        *("linear_cross_entropy", "tied_embedding"),
    ],
)
@given(st.data())
@settings(max_examples=15)
def test_what_is_frozen_has_no_gradient_and_changes_no_other(name: str, data: Any) -> None:
    inputs = _inputs_of(name)
    some = data.draw(st.lists(st.booleans(), min_size=len(inputs), max_size=len(inputs)))
    assert_same_gradients(getattr(native, name), inputs, some)


def assert_same_gradients(
    operation: Callable[..., Any], inputs: list[Any], wanted: list[bool]
) -> None:
    """Compare the gradients of some inputs to those computed when all inputs require them."""
    found = []
    for needs in ([True] * len(inputs), wanted):
        leaves = [
            t.clone().requires_grad_(need) if t.is_floating_point() else t
            for t, need in zip(inputs, needs, strict=True)
        ]
        results = operation(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        loss = sum(r.square().sum() for r in results)
        if loss.requires_grad:
            loss.backward()
        found.append([leaf.grad for leaf in leaves])
    for all_grad, grad, need, t in zip(*found, wanted, inputs, strict=True):
        if need and t.is_floating_point():
            assert torch.equal(grad, all_grad)
        else:
            assert grad is None
