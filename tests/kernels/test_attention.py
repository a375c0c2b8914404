"""The attention kernels against softmax(Q Kᵀ) V in float64, dropout included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from fastgpt.kernels import attention
from fastgpt.ops import reference
from tests.kernels.truth import DTYPES, HAS_GPU, assert_as_good_as_plain, error

BOTH = pytest.mark.parametrize("deterministic", [True, False], ids=["two-kernels", "one-pass"])


def formula(qkv, n_head, kept=None, dropout_p=0.0):
    """Return attention in plain PyTorch in the dtype of `qkv`, with a given dropout mask."""
    q, k, v = reference.split_heads(qkv, n_head)
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf)
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * kept / (1.0 - dropout_p)
    return reference.merge_heads(weights @ v)


def by_autograd(grad_out, qkv, n_head, *dropout):
    """Return the result and gradient of the formula."""
    qkv = qkv.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    out = formula(qkv, n_head, *dropout)
    out.backward(grad_out)
    return out.detach(), qkv.grad


def by_kernels(grad_out, qkv, n_head, dropout_p=0.0, seed=None, deterministic=True):
    out, lse = attention.causal_attention_forward(qkv, n_head, dropout_p, seed)
    grad_qkv = attention.causal_attention_backward(
        grad_out, qkv, out, lse, n_head, dropout_p, seed, deterministic
    )
    return out, grad_qkv


def check(grad_out, qkv, n_head, deterministic=True):
    """Compare forward and backward with float64, by the criterion of `truth`."""
    results = by_kernels(grad_out, qkv, n_head, deterministic=deterministic)
    plain = by_autograd(grad_out, qkv, n_head)
    true = by_autograd(grad_out.double(), qkv.double(), n_head)
    for what, ours, theirs, exact in zip(("out", "grad"), results, plain, true, strict=True):
        assert ours.is_contiguous()
        assert_as_good_as_plain(ours, theirs, exact, what)


def normal(*shape, dtype, device):
    return torch.randn(*shape).to(device, dtype)


def problem(n_batch, n_time, n_head, head_dim, dtype, device):
    width = n_head * head_dim
    qkv = normal(n_batch, n_time, 3 * width, dtype=dtype, device=device)
    return normal(n_batch, n_time, width, dtype=dtype, device=device), qkv, n_head


def seed_of(number, device):
    return torch.tensor([number], dtype=torch.int64, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_time", [1, 63, 64, 65, 127])
def test_lengths_around_the_block_size(n_time, dtype, device):
    check(*problem(1, n_time, 1, 16, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass(dtype, device):
    for n_time in (1, 40 if dtype == torch.float32 else 130):  # blocks of 16 and of 32 × 128
        # Several heads: with few numbers, plain PyTorch may be exact by chance.
        check(*problem(2, n_time, 2, 16, dtype, device), deterministic=False)


@BOTH
@pytest.mark.parametrize("head_dim", [1, 4, 16, 24, 31, 64, 80, 128])
def test_head_dims(head_dim, deterministic, device):
    for dtype in DTYPES:
        check(*problem(1, 20, 2, head_dim, dtype, device), deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_heads_of_many_rows(dtype, device):
    check(*problem(3, 5, 4, 16, dtype, device))


def test_every_program_of_a_grid_has_a_block_of_its_own(device, monkeypatch):
    # Heads are processed in groups, here of 2, with one in the last group.
    monkeypatch.setattr(attention.launch, "SHARED_BYTES", 2 * 2 * 70 * 16 * 2)
    check(*problem(1, 70, 3, 16, torch.float16, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
def test_a_thousand_positions(dtype, deterministic, device):
    check(*problem(1, 1000, 1, 64, dtype, device), deterministic=deterministic)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    n_batch=st.integers(0, 3),
    n_time=st.integers(1, 200),
    n_head=st.integers(1, 3),
    head_dim=st.integers(16, 128),
    deterministic=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(n_batch, n_time, n_head, head_dim, deterministic, dtype):
    device = "cuda" if HAS_GPU else "cpu"
    check(*problem(n_batch, n_time, n_head, head_dim, dtype, device), deterministic)


@BOTH
def test_any_strides(deterministic, device):
    big = normal(2, 36, 2 * 96, dtype=torch.float32, device=device)
    grad = normal(2, 36, 64, dtype=torch.float32, device=device)
    for qkv, grad_out in (
        (big[:, 3:20, 50:146], grad[:, 3:20, 7:39]),  # a slice at an unaligned address
        (big[..., :96].transpose(0, 1)[:5], grad[..., :32].transpose(0, 1)[:5]),  # time first
        (big[:, ::4, ::2], grad[:, ::4, ::2]),
        (big[:1, :, :96].expand(2, 36, 96), grad[:1, :, :32].expand(2, 36, 32)),
        (big[:, :1, :96].expand(2, 9, 96), grad[:, :1, :32].expand(2, 9, 32)),
    ):
        check(grad_out, qkv, 2, deterministic)


@BOTH
def test_gradient_of_a_sum_has_stride_0(deterministic, device):
    for dtype in DTYPES:
        grad_out, qkv, n_head = problem(2, 30, 2, 16, dtype, device)
        grad_out = torch.ones((), dtype=dtype, device=device).expand(grad_out.shape)
        check(grad_out, qkv, n_head, deterministic)


@BOTH
@pytest.mark.parametrize("shape", [(0, 7, 48), (2, 0, 48)])
def test_nothing_in_nothing_out(shape, deterministic, device):
    qkv = torch.ones(shape, device=device)
    out, grad_qkv = by_kernels(qkv[..., :16], qkv, 1, deterministic=deterministic)
    assert (out.shape, grad_qkv.shape) == ((*shape[:2], 16), shape)


def test_lse(device):
    _, qkv, n_head = problem(1, 70, 2, 24, torch.float32, device)
    _, lse = attention.causal_attention_forward(qkv, n_head)
    q, k, _ = reference.split_heads(qkv.double(), n_head)
    scores = q @ k.mT / math.sqrt(24)
    scores += torch.full((70, 70), -math.inf, device=device).triu(1)
    assert lse.dtype == torch.float32
    assert error(lse * math.log(2.0), scores.logsumexp(-1)) < 1e-5


@BOTH
def test_float64(deterministic, device):  # used by gradcheck
    if HAS_GPU:
        pytest.skip("float64 is refused there")
    grad_out, qkv, n_head = problem(1, 66, 2, 24, torch.float64, device)
    results = by_kernels(grad_out, qkv, n_head, deterministic=deterministic)
    for ours, true in zip(results, by_autograd(grad_out, qkv, n_head), strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-13)


@pytest.mark.skipif(HAS_GPU, reason="float64 is refused there")
@BOTH
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradient_is_that_of_the_forward(dropout_p, deterministic, device):
    seed = seed_of(3, device)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv):
            out, lse = attention.causal_attention_forward(qkv, 1, dropout_p, seed)
            ctx.save_for_backward(qkv, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            return attention.causal_attention_backward(
                grad_out, *ctx.saved_tensors, 1, dropout_p, seed, deterministic
            )

    qkv = normal(1, 5, 48, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(Attention.apply, qkv, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype, device):
    given = *problem(1, 70, 1, 16, dtype, device), 0.2, seed_of(7, device)
    for once, again in zip(by_kernels(*given), by_kernels(*given), strict=True):
        assert torch.equal(once, again)


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")  # from NumPy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("now", [1, 40, 64, 90])
def test_the_future_changes_no_bit_of_the_past(now, dtype, device):
    _, qkv, n_head = problem(1, 100, 1, 16, dtype, device)
    changed = qkv.clone()
    changed[:, now:] = 100 * torch.randn_like(changed[:, now:])
    changed[:, now:, :32] = math.nan  # of queries and keys; with values, 0 × NaN is NaN
    out, lse = attention.causal_attention_forward(qkv, n_head)
    other_out, other_lse = attention.causal_attention_forward(changed, n_head)
    assert torch.equal(out[:, :now], other_out[:, :now])
    assert torch.equal(lse[..., :now], other_lse[..., :now])
    # Memory past the end is never read.
    changed[:, now:] = math.nan
    out, lse = attention.causal_attention_forward(qkv[:, :now], n_head)
    other_out, other_lse = attention.causal_attention_forward(changed[:, :now], n_head)
    assert torch.equal(out, other_out)
    grads = [
        attention.causal_attention_backward(out, view[:, :now], out, lse, n_head)
        for view in (qkv, changed)
    ]
    assert torch.equal(*grads)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite(dtype, deterministic, device):
    grad_out, qkv, n_head = problem(1, 80, 1, 64, dtype, device)
    qkv[..., :128] *= 1e4
    out, grad_qkv = by_kernels(grad_out, qkv, n_head, deterministic=deterministic)
    assert out.isfinite().all()
    assert grad_qkv.isfinite().all()
    if dtype != torch.bfloat16:  # each query attends to one key: the result is exact
        true, _ = by_autograd(grad_out.double(), qkv.double(), n_head)
        assert error(out, true) < 1e-3


@BOTH
def test_scores_of_a_trained_model_at_their_largest(deterministic, device):
    for dtype in DTYPES:
        grad_out, qkv, n_head = problem(1, 70, 1, 64, dtype, device)
        qkv[..., :128] *= 8
        check(grad_out, qkv, n_head, deterministic)


# ---- dropout -------------------------------------------------------------------------------------


def kept_probabilities(n_batch, n_time, n_head, dropout_p, seed, device):
    """Return the dropout mask of the kernel, [B, H, T, T], from attention with V = I.

    128 columns of the identity are processed at a time. The queries are zero, so all probabilities
    are equal and positive, and a dropped one is a zero in the output.
    """
    masks = []
    for first in range(0, n_time, 128):
        identity = torch.eye(n_time, dtype=torch.float16, device=device)[:, first : first + 128]
        identity = torch.nn.functional.pad(identity, (0, 128 - identity.size(1)))
        qkv = identity.new_zeros(n_batch, n_time, 3, n_head, 128)
        qkv[:, :, 2] = identity[None, :, None]
        out, _ = attention.causal_attention_forward(qkv.flatten(2), n_head, dropout_p, seed)
        masks.append(out.unflatten(2, (n_head, 128)).transpose(1, 2) != 0)
    return torch.cat(masks, -1)[..., :n_time]


@BOTH
@pytest.mark.parametrize("n_time", [30, 70])
def test_dropout_is_plain_attention_with_the_same_mask(n_time, deterministic, device):
    dropout_p, seed = 0.3, seed_of(-12345678901, device)
    kept = kept_probabilities(1, n_time, 2, dropout_p, seed, device)
    for dtype in DTYPES:
        grad_out, qkv, n_head = problem(1, n_time, 2, 16, dtype, device)
        results = by_kernels(grad_out, qkv, n_head, dropout_p, seed, deterministic)
        plain = by_autograd(grad_out, qkv, n_head, kept.to(dtype), dropout_p)
        true = by_autograd(grad_out.double(), qkv.double(), n_head, kept.double(), dropout_p)
        for ours, theirs, exact in zip(results, plain, true, strict=True):
            assert_as_good_as_plain(ours, theirs, exact)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_should(dropout_p, device):
    n_time = 128
    kept = kept_probabilities(2, n_time, 2, dropout_p, seed_of(1, device), device).double()
    past = torch.ones(n_time, n_time, dtype=torch.bool, device=device).tril()
    for sample in kept[..., past].flatten(0, 1):  # of each head
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / sample.numel())
        assert abs(sample.mean().item() - (1 - dropout_p)) < 4.5 * deviation
    assert not kept[..., ~past].any()
    # Neighboring probabilities, heads and batch rows are uncorrelated.
    flat = kept[..., past].flatten(0, 1) - (1 - dropout_p)  # [4, N]
    pairs = [(flat[0], flat[1]), (flat[0], flat[2]), (flat[1], flat[2])]
    pairs += [(flat[:, lag:], flat[:, :-lag]) for lag in (1, 2, 3, 4, 5, 64, 128)]
    for one, other in pairs:
        correlation = (one * other).mean().item() / (dropout_p * (1 - dropout_p))
        assert abs(correlation) < 4.5 / math.sqrt(one.numel())


def test_seeds_decide(device):
    _, qkv, n_head = problem(1, 20, 1, 16, torch.float32, device)

    def out(seed):
        return attention.causal_attention_forward(qkv, n_head, 0.5, seed_of(seed, device))[0]

    assert torch.equal(out(1), out(1))
    for other in (2, 1 + 2**32, -1):  # both halves of the seed have an effect
        assert not torch.equal(out(1), out(other))


def test_no_dropout_needs_no_seed_and_ignores_one(device):
    _, qkv, n_head = problem(1, 20, 1, 16, torch.float32, device)
    once, _ = attention.causal_attention_forward(qkv, n_head)
    again, _ = attention.causal_attention_forward(qkv, n_head, 0.0, seed_of(1, device))
    assert torch.equal(once, again)


# ---- rejected inputs -----------------------------------------------------------------------------


def test_refuses_what_it_does_not_support(device):
    forward = attention.causal_attention_forward
    qkv = torch.ones(2, 4, 96, device=device)
    for head_dim in (129, 256):
        with pytest.raises(ValueError, match=rf"from 1 to 128 are supported, not {head_dim};"):
            forward(torch.ones(1, 1, 3 * head_dim, device=device), 1)
    with pytest.raises(ValueError, match=r"n_head must divide the width, 32; 3 does not"):
        forward(qkv, 3)
    with pytest.raises(ValueError, match=r"n_head must divide the width, 32; 0 does not"):
        forward(qkv, 0)
    with pytest.raises(ValueError, match=r"must be \[B, T, 3C\], not \[4, 96\]"):
        forward(qkv[0], 2)
    with pytest.raises(ValueError, match=r"must be \[B, T, 3C\], not \[2, 4, 95\]"):
        forward(qkv[..., :95], 2)
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*not torch\.int64"):
        forward(qkv.long(), 2)
    for dropout_p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"dropout_p must be at least 0 and below 1"):
            forward(qkv, 2, dropout_p, seed_of(1, device))
    with pytest.raises(ValueError, match=r"dropout needs a seed"):
        forward(qkv, 2, 0.1)
    with pytest.raises(ValueError, match=r"int64 tensor with one element, not 2 of torch\.int64"):
        forward(qkv, 2, 0.1, seed_of(1, device).repeat(2))
    with pytest.raises(ValueError, match=r"not 1 of torch\.int32"):
        forward(qkv, 2, 0.1, seed_of(1, device).int())


def test_backward_refuses_what_does_not_belong_together(device):
    qkv = torch.ones(2, 4, 96, device=device)
    out, lse = attention.causal_attention_forward(qkv, 2)
    backward = attention.causal_attention_backward
    with pytest.raises(ValueError, match=r"grad_out must be \[2, 4, 32\] torch\.float32, not \[2,"):
        backward(out[:, :3], qkv, out, lse, 2)
    with pytest.raises(ValueError, match=r"out must be .* torch\.float32, not .* torch\.float16"):
        backward(out, qkv, out.half(), lse, 2)
    with pytest.raises(ValueError, match=r"lse must be \[2, 2, 4\] torch\.float32, not \[2, 4\]"):
        backward(out, qkv, out, lse[0], 2)


@pytest.mark.skipif(not HAS_GPU, reason="the interpreter takes float64")
def test_refuses_float64_on_a_gpu():
    with pytest.raises(ValueError, match=r"float64 runs in Triton's interpreter only"):
        attention.causal_attention_forward(torch.ones(1, 1, 96, device="cuda").double(), 1)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU, and 4.3 GB of its memory")
def test_more_elements_than_int32_counts(device):
    grad_out, qkv, n_head = problem(3, 2, 1, 64, torch.float16, device)
    memory = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device)
    far = memory.as_strided(qkv.shape, (2**30, 192, 1)).copy_(qkv)  # the last row starts at 2^31
    far_grad = memory[512:].as_strided(grad_out.shape, (2**30, 64, 1)).copy_(grad_out)
    for once, again in zip(
        by_kernels(far_grad, far, n_head), by_kernels(grad_out, qkv, n_head), strict=True
    ):
        assert torch.equal(once, again)
