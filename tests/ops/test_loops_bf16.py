"""The C++ CPU loops with bfloat16 products, compared to float64 and to PyTorch's autocast.

On a processor without bfloat16 units, these tests use the portable code.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastgpt import _C, GPT, GPTConfig, ops
from fastgpt.ops import cpu, native, products, reference

BF16 = torch.bfloat16
Step = Callable[..., Tensor | tuple[Tensor, ...]]


@contextmanager
def loops(wanted: bool) -> Iterator[None]:
    """Run native operations under autocast, with the C++ loops or with PyTorch's operators."""
    before = products._own_is_faster
    products._own_is_faster = lambda bf16: wanted if bf16 else before(False)
    try:
        with torch.autocast("cpu", BF16):
            yield
    finally:
        products._own_is_faster = before


def run(step: Step, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return results and gradients of ``(results · weights).sum()``."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = step(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))
    torch.autograd.backward(total)
    return [*(r.detach() for r in results), *(leaf.grad for leaf in leaves)]


def assert_at_most_twice_as_far(name: str, inputs: list[Tensor], *rest: object) -> None:
    """Assert that errors are at most twice PyTorch's bf16 errors (FlashAttention's criterion)."""
    of = lambda module: lambda *some: getattr(module, name)(*some, *rest)  # noqa: E731
    exact = of(reference)(*(x.double() for x in inputs))
    weights = [torch.randn_like(r) for r in (exact if isinstance(exact, tuple) else (exact,))]
    truth = run(of(reference), [x.double() for x in inputs], weights)
    with loops(True):
        ours = run(of(native), inputs, weights)
    with loops(False):
        theirs = run(of(native), inputs, weights)
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert a.shape == true.shape
        error, allowed = (a - true).norm(), 2 * (b - true).norm() + 1e-5 * true.norm()
        assert error <= allowed, f"{error / true.norm():.2e}, PyTorch {allowed / true.norm():.2e}"


SHAPES = [(1, 8), (2, 5, 24), (3, 40, 33), (300, 65), (2, 130, 96)]


def layer(width: int, out: int) -> list[Tensor]:
    return [torch.randn(out, width) / width**0.5, torch.randn(out)]


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_linear(shape: tuple[int, ...]) -> None:
    x, residual, norm = torch.randn(shape), torch.randn(shape), torch.randn(2, shape[-1])
    inputs = [x, residual, *norm, *layer(shape[-1], 3 * shape[-1] + 1)]
    assert_at_most_twice_as_far("norm_linear", inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_mlp(shape: tuple[int, ...]) -> None:
    width, hidden = shape[-1], 3 * shape[-1] + 1
    norm = torch.randn(2, width)
    inputs = [torch.randn(shape), torch.randn(shape), *norm, *layer(width, hidden)]
    assert_at_most_twice_as_far("norm_mlp", [*inputs, *layer(hidden, width)])


@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple[int, ...]) -> None:
    assert_at_most_twice_as_far("linear", [torch.randn(shape).to(BF16), *layer(shape[-1], 19)])


@pytest.mark.parametrize("time", [1, 2, 17, 95, 96, 97, 193, 300])
@pytest.mark.parametrize(("n_head", "size"), [(1, 16), (3, 11), (2, 64)])
def test_causal_attention(time: int, n_head: int, size: int) -> None:
    qkv = torch.randn(2, time, 3 * n_head * size).to(BF16)
    assert_at_most_twice_as_far("causal_attention", [qkv], n_head)


@pytest.mark.parametrize("max_logits", [2**25, 40, 65 * 30])
def test_the_loss(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MAX_LOGITS", max_logits)
    targets = torch.randint(65, (100,))
    targets[::7] = -1
    inputs = [torch.randn(100, 48), torch.randn(65, 48) / 7]
    assert_at_most_twice_as_far("linear_cross_entropy", inputs, targets, -1)


def test_a_later_position_changes_no_earlier_one() -> None:
    """Results are bitwise equal, and no gradient flows to a later position."""
    qkv = torch.randn(1, 200, 3 * 32).to(BF16)
    other = qkv.clone()
    other[:, 101:] = torch.randn(1, 99, 96)
    with loops(True):
        a, b = (native.causal_attention(x, 2) for x in (qkv, other))
        assert torch.equal(a[:, :101], b[:, :101])
        leaf = qkv.clone().requires_grad_()
        native.causal_attention(leaf, 2)[:, :101].sum().backward()
    assert not leaf.grad[:, 101:].any()


def test_what_goes_between_products_is_bf16_and_the_stream_fp32() -> None:
    x, norm = torch.randn(2, 9, 24), torch.randn(2, 24)
    with loops(True):
        total, qkv = native.norm_linear(x, x, *norm, *layer(24, 72))
        y = native.causal_attention(qkv, 2)
        out = native.linear(y, *layer(24, 24))
    assert (total.dtype, qkv.dtype, y.dtype, out.dtype) == (
        torch.float32,
        BF16,
        BF16,
        torch.float32,
    )


def gradients(model: GPT, ids: Tensor, targets: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(ids, targets)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_whole_model(bias: bool, threads: int) -> None:
    """As close to fp64 as autocast, and bitwise equal for any number of threads."""
    config = GPTConfig(97, 40, 2, 3, 48, bias=bias)
    model = GPT(config, "native")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    exact = copy.deepcopy(model).double().use_ops("reference")
    ids, targets = torch.randint(97, (2, 3, 40))
    truth = gradients(exact, ids, targets)
    before = torch.get_num_threads()
    with loops(False):
        theirs = gradients(model, ids, targets)
    with loops(True):
        ours = gradients(model, ids, targets)
        torch.set_num_threads(threads)
        try:
            again = gradients(model, ids, targets)
        finally:
            torch.set_num_threads(before)
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - true).norm() <= 2 * (b - true).norm() + 1e-3 * true.norm()
    assert all(map(torch.equal, ours, again))


def test_a_gradient_that_is_not_finite_is_seen() -> None:
    """NaN and infinity also propagate through the bf16 products of the backward pass."""
    x = torch.randn(20, 24).to(BF16).requires_grad_()
    weight, bias = layer(24, 19)
    with loops(True):
        y = native.linear(x, weight.requires_grad_(), bias)
    grad = torch.zeros_like(y)
    grad[3, 4] = torch.inf
    y.backward(grad)
    assert not weight.grad[4].isfinite().any()
    assert weight.grad[:4].eq(0).all()
    assert not x.grad[3].isfinite().any()
    assert x.grad[:3].eq(0).all()


@pytest.mark.parametrize("n_rows", [5, 40])
@pytest.mark.parametrize("own", [False, True])
def test_a_forward_in_fp32_has_its_backward_in_fp32(n_rows: int, own: bool) -> None:
    model = GPT(GPTConfig(97, 40, 2, 3, 48), "native")
    ids, targets = torch.randint(97, (2, 1, n_rows))
    truth = gradients(model, ids, targets)
    model.zero_grad()
    loss = model(ids, targets)
    with loops(own):
        loss.backward()
    for p, true in zip(model.parameters(), truth[1:], strict=True):
        torch.testing.assert_close(p.grad, true)


def test_empty_batches() -> None:
    model = GPT(GPTConfig(97, 40, 2, 3, 48), "native")
    weight, bias = layer(24, 19)
    x = torch.empty(0, 24, dtype=BF16, requires_grad=True)
    with loops(True):
        assert model(*torch.randint(97, (2, 0, 5))).isnan()
        native.linear(x, weight.requires_grad_(), bias).sum().backward()
    assert x.grad.shape == (0, 24)
    assert not weight.grad.any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_attention_to_nan_is_nan(sign: float, dtype: torch.dtype) -> None:
    """NaN of either sign must propagate to the result."""
    qkv = torch.randn(1, 8, 48).to(dtype)
    qkv[0, 3, 16] = torch.tensor(torch.nan).copysign(torch.tensor(sign))  # of one key
    y = cpu.causal_attention(qkv, 1)
    assert y[0, 3:].isnan().all()
    assert y[0, :3].isfinite().all()


def test_attention_wants_one_type() -> None:
    qkv, y, sums = torch.zeros(1, 4, 24), torch.zeros(1, 4, 8), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="y must have the dtype of qkv"):
        _C.attention_forward(qkv.to(BF16), 2, 4, y, sums, 1)
