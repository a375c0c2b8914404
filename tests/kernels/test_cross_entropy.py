"""The loss of the output head and its gradients against the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from fastgpt.kernels import cross_entropy
from fastgpt.kernels.cross_entropy import linear_cross_entropy_forward
from fastgpt.ops import reference
from tests.kernels.truth import DTYPES, HAS_GPU, assert_as_good_as_plain, require_gpu_memory

VOCABULARIES = [1, 2, 65, 127, 128, 129, 1000, 1024]  # 1024: no partial block of columns


def by_autograd(x, weight, targets, ignore_index=-100):
    """Return the loss and gradients of the formula in the dtype of the inputs."""
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    loss = reference.linear_cross_entropy(x, weight, targets, ignore_index)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def ours(x, weight, targets, ignore_index=-100, **options):
    """Return the same from the launcher, whose gradients are those of the sum of the losses."""
    loss, n_counted, grad_x, grad_weight = linear_cross_entropy_forward(
        x, weight, targets, ignore_index, **options
    )
    assert n_counted.dtype == torch.int64
    assert n_counted == (targets != ignore_index).sum()
    wide = torch.promote_types(x.dtype, torch.float32)
    assert loss.dtype == grad_x.dtype == grad_weight.dtype == wide
    factor = 1 / n_counted
    return loss, (grad_x * factor).to(x.dtype), (grad_weight * factor).to(weight.dtype)


def check(x, weight, targets, ignore_index=-100, **options):
    actual = ours(x, weight, targets, ignore_index, **options)
    plain = by_autograd(x, weight, targets, ignore_index)
    truth = by_autograd(x.double(), weight.double(), targets, ignore_index)
    names = ("loss", "grad_x", "grad_weight")
    for name, mine, theirs, true in zip(names, actual, plain, truth, strict=True):
        assert_as_good_as_plain(mine, theirs, true, name)


def draw(n_rows, n_vocab, width=24, dtype=torch.float32, device="cpu"):
    """Return x, weight and targets such that logits differ by a few units."""
    x = torch.randn(n_rows, width).to(device, dtype)
    weight = (0.5 * torch.randn(n_vocab, width)).to(device, dtype)
    return x, weight, torch.randint(n_vocab, (n_rows,), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_vocab", VOCABULARIES)
def test_vocabularies(n_vocab, dtype, device):
    check(*draw(7, n_vocab, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabulary_of_gpt2(dtype, device):
    x, weight, targets = draw(3, 50257, width=16, dtype=dtype, device=device)
    targets[:2] = torch.tensor([0, 50256])  # the first column and the last before the padding
    check(x, weight, targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_beside_the_edges_of_blocks(dtype, device):
    edges = [0, 511, 512, 1023, 1024, 1088]
    x, weight, _ = draw(len(edges), 1089, dtype=dtype, device=device)
    check(x, weight, torch.tensor(edges, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "chunk"), [(1, 1), (7, 1), (7, 3), (7, 9), (24, 23)])
def test_chunks(n_rows, chunk, dtype, device):
    check(*draw(n_rows, 65, dtype=dtype, device=device), chunk=chunk)


def test_chunks_are_even_and_hold_no_more_logits_than_the_limit():
    at_gpt2 = 2 * 50304
    assert cross_entropy._rows(32 * 1024, at_gpt2) == 16 * 1024
    assert cross_entropy._rows(16 * 1024 + 1000, at_gpt2) == 8 * 1024 + 500
    assert cross_entropy._rows(100, at_gpt2) == 100
    assert cross_entropy._rows(0, at_gpt2) == 0
    assert cross_entropy._rows(100, 10 * cross_entropy.MAX_BYTES) == 1
    for n_rows in range(1, 70_000, 997):
        rows = cross_entropy._rows(n_rows, at_gpt2)
        assert rows * at_gpt2 <= cross_entropy.MAX_BYTES
        assert rows - n_rows % rows < rows * 0.01 or n_rows % rows == 0


@pytest.mark.parametrize("ignore_index", [-100, 3, -1, 64, 65, 2**40, -(2**62)])
@pytest.mark.parametrize("chunk", [None, 2])
def test_ignored_targets(ignore_index, chunk, device):
    x, weight, targets = draw(9, 65, device=device)
    targets[[0, 4, 5, 8]] = ignore_index
    check(x, weight, targets, ignore_index, chunk=chunk)
    _, _, grad_x, _ = linear_cross_entropy_forward(x, weight, targets, ignore_index)
    assert grad_x[targets == ignore_index].count_nonzero() == 0


def test_ignored_rows_may_hold_anything(device):  # for example uninitialized padding
    x, weight, targets = draw(5, 65, device=device)
    targets[2] = -100
    loss, _, grad_x, _ = linear_cross_entropy_forward(x, weight, targets)
    x[2] = 1e38
    again = linear_cross_entropy_forward(x, weight, targets)
    assert again[0] == loss
    assert torch.equal(again[2], grad_x)


def test_nothing_counted_is_as_in_pytorch(device):
    x, weight, targets = draw(4, 65, device=device)
    targets[:] = -100
    x.requires_grad_()
    expected = F.cross_entropy(x @ weight.T, targets)
    expected.backward()
    loss, n_counted, grad_x, grad_weight = linear_cross_entropy_forward(x, weight, targets)
    assert loss.isnan()
    assert expected.isnan()
    assert n_counted == 0
    assert torch.equal(grad_x * (1 / n_counted.clamp(min=1)), x.grad)
    assert not grad_weight.any()


def test_no_rows(device):
    x, weight, targets = draw(0, 65, device=device)
    loss, n_counted, grad_x, grad_weight = linear_cross_entropy_forward(x, weight, targets)
    assert loss.isnan()
    assert n_counted == 0
    assert grad_x.shape == x.shape
    assert grad_weight.shape == weight.shape
    assert not grad_weight.any()


@pytest.mark.parametrize("wrong", [-1, 65, 127, 128, 2**40, -(2**40)])
def test_target_outside_the_vocabulary_is_nan_and_stays_in_its_row(wrong, device):
    x, weight, targets = draw(5, 65, device=device)
    _, _, expected, _ = linear_cross_entropy_forward(x, weight, targets)
    targets[2] = wrong
    loss, _, grad_x, grad_weight = linear_cross_entropy_forward(x, weight, targets)
    assert loss.isnan()
    assert grad_x[2].isnan().all()
    assert grad_weight.isnan().all()
    kept = [0, 1, 3, 4]
    assert torch.equal(grad_x[kept], expected[kept])


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_needed(dtype, chunk, device):
    inputs = draw(7, 129, dtype=dtype, device=device)
    loss, n_counted, grad_x, grad_weight = linear_cross_entropy_forward(*inputs, chunk=chunk)
    for need_x in (True, False):
        for need_weight in (True, False):
            some = linear_cross_entropy_forward(
                *inputs, need_x=need_x, need_weight=need_weight, chunk=chunk
            )
            assert some[0] == loss
            assert some[1] == n_counted
            assert torch.equal(some[2], grad_x) if need_x else some[2] is None
            assert torch.equal(some[3], grad_weight) if need_weight else some[3] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, device):
    x, weight, targets = draw(8, 128, width=24, dtype=dtype, device=device)
    pairs = [
        (x[:, ::2], weight[:, 1::2]),
        (x.T.contiguous().T, weight.T.contiguous().T),
        (x[:1].expand(8, 24), weight[:1].expand(65, 24)),
        (x[:, 1:2].expand(8, 24), weight[5:70]),
        (x.flip(0)[:, 1:], weight[::2, 1:]),
    ]
    for some_x, some_weight in pairs:
        check(some_x, some_weight, targets % some_weight.size(0), chunk=5)
    for view in (targets.repeat_interleave(2)[::2], targets[:1].expand(8), targets.flip(0)):
        check(x, weight, view, chunk=5)


@pytest.mark.parametrize("n_vocab", [65, 128])
def test_weight_of_another_dtype_is_used_in_that_of_x(n_vocab, device):
    x, weight, targets = draw(7, n_vocab, dtype=torch.float16, device=device)
    expected = linear_cross_entropy_forward(x, weight, targets)
    actual = linear_cross_entropy_forward(x, weight.float(), targets)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(size, dtype, device):
    x, weight, targets = draw(7, 129, dtype=dtype, device=device)
    x[:, 0], weight[:, 0] = 100, size / 100  # all logits near ±10,000, a few units apart
    check(x, weight, targets)


@pytest.mark.filterwarnings("ignore:(invalid|divide):RuntimeWarning")  # from NumPy
def test_logits_of_minus_infinity(device):
    x, targets = torch.ones(1, 1, device=device), torch.tensor([0], device=device)
    weight = torch.full((9, 1), -math.inf, device=device)
    assert ours(x, weight, targets)[0].isnan()  # as in the reference
    weight[0] = 2.0
    assert ours(x, weight, targets)[0] == 0.0


def test_logits_far_apart(device):  # probabilities of 1 and 0
    x = torch.tensor([[1e4], [-1e4], [0.0]], device=device)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], device=device)
    check(x, weight, torch.tensor([0, 0, 2], device=device))


@pytest.mark.parametrize(("n_rows", "size"), [(20, 12000.0)] + [(6000, 40.0)] * HAS_GPU)
def test_fp16_gradients_may_add_up_to_more_than_fp16_holds(n_rows, size, device):
    """All rows have the same target, so that the gradient of its weight is a sum over all rows."""
    x = torch.full((n_rows, 2), size, dtype=torch.float16, device=device)
    weight = torch.zeros(3, 2, dtype=torch.float16, device=device)
    targets = torch.ones(n_rows, dtype=torch.int64, device=device)
    for chunk in (n_rows, n_rows // 2 - 1):
        _, _, grad_x, grad_weight = linear_cross_entropy_forward(x, weight, targets, chunk=chunk)
        a_third = size * n_rows / 3
        assert a_third > torch.finfo(torch.float16).max
        expected = torch.tensor([[a_third], [-2 * a_third], [a_third]], device=device).expand(3, 2)
        torch.testing.assert_close(grad_weight, expected, rtol=1e-3, atol=0)
        assert not grad_x.any()


def test_fp16_keeps_the_gradients_of_rare_tokens(device):
    """A token with a probability of about 1e-8 has a gradient, although fp16 ends at 6e-8."""
    x = torch.full((4, 1), 4.0, dtype=torch.float16, device=device)
    weight = torch.tensor([[0.0], [-4.5]], dtype=torch.float16, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    _, _, _, grad_weight = linear_cross_entropy_forward(x, weight, targets)
    assert grad_weight[1, 0].item() == pytest.approx(16 * math.exp(-18), rel=1e-2)


def test_fp16_gradient_of_x_does_not_overflow_on_its_way(device):  # it is scaled by 2^15
    x, weight, targets = draw(5, 65, dtype=torch.float16, device=device)
    check(0.01 * x, 100 * weight, targets)


@settings(max_examples=15, deadline=None)
@given(
    n_rows=st.integers(1, 8),
    n_vocab=st.integers(1, 300),
    width=st.integers(1, 40),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_any_sizes(n_rows, n_vocab, width, chunk, seed):
    torch.manual_seed(seed)
    x, weight, targets = draw(n_rows, n_vocab, width, device="cuda" if HAS_GPU else "cpu")
    targets[torch.rand(n_rows) < 0.2] = -100
    targets[0] = 0
    check(x, weight, targets, chunk=chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_give_the_same_bits(dtype, device):
    inputs = draw(12, 1000, dtype=dtype, device=device)
    first = linear_cross_entropy_forward(*inputs, chunk=5)
    for once, again in zip(first, linear_cross_entropy_forward(*inputs, chunk=5), strict=True):
        assert torch.equal(once, again)


def test_inputs_are_left_alone(device):
    for n_vocab in (65, 128):
        inputs = draw(7, n_vocab, device=device)
        before = [tensor.clone() for tensor in inputs]
        linear_cross_entropy_forward(*inputs)
        assert all(map(torch.equal, inputs, before))


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets):
        loss, n_counted, *gradients = linear_cross_entropy_forward(x, weight, targets, chunk=2)
        ctx.save_for_backward(n_counted, *gradients)
        return loss

    @staticmethod
    def backward(ctx, grad):
        n_counted, grad_x, grad_weight = ctx.saved_tensors
        factor = grad / n_counted.clamp(min=1)
        return factor * grad_x, factor * grad_weight, None


def test_gradients_are_those_of_the_loss(device):
    x, weight, targets = draw(3, 4, width=2, dtype=torch.float64, device=device)
    targets[1] = -100
    inputs = x.requires_grad_(), weight.requires_grad_(), targets
    assert torch.autograd.gradcheck(LinearCrossEntropy.apply, inputs)


def test_refuses_what_it_does_not_support(device):
    x, weight, targets = draw(4, 65, width=8, device=device)
    run = linear_cross_entropy_forward
    with pytest.raises(ValueError, match=r"weight must be one of .*float32.* not torch\.int64"):
        run(x, weight.long(), targets)
    with pytest.raises(ValueError, match=r"targets must be torch\.int64, not torch\.int32"):
        run(x, weight, targets.int())
    with pytest.raises(ValueError, match=r"same C.*not \[4, 8\] and \[65, 7\]"):
        run(x, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"\[N, C\].*not \[2, 2, 8\] and \[65, 8\]"):
        run(x.view(2, 2, 8), weight, targets)
    with pytest.raises(ValueError, match=r"neither V nor C 0.*not \[4, 8\] and \[0, 8\]"):
        run(x, weight[:0], targets)
    with pytest.raises(ValueError, match=r"one target for each row.* \[4\] .*not \[3\]"):
        run(x, weight, targets[:3])
    with pytest.raises(ValueError, match=r"one target .* not \[4, 1\]"):
        run(x, weight, targets[:, None])
    with pytest.raises(ValueError, match=r"chunk must be at least 1 row, not 0"):
        run(x, weight, targets, chunk=0)
    with pytest.raises(ValueError, match=r"one device.*targets on meta"):
        run(x, weight, targets.to("meta"))


def test_more_logits_than_int32_counts():
    require_gpu_memory(9)
    n_rows, n_vocab = 43_000, 50_257
    x, weight, targets = draw(n_rows, n_vocab, width=64, dtype=torch.float16, device="cuda")
    once = linear_cross_entropy_forward(x, weight, targets, chunk=n_rows)
    for mine, theirs in zip(once, linear_cross_entropy_forward(x, weight, targets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not HAS_GPU, reason="only CUDA has graphs")
def test_records_into_a_cuda_graph():
    inputs = draw(64, 1000, dtype=torch.bfloat16, device="cuda")
    expected = linear_cross_entropy_forward(*inputs, chunk=20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = linear_cross_entropy_forward(*inputs, chunk=20)
    graph.replay()
    assert all(map(torch.equal, actual, expected))
