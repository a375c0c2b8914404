"""Attention over a key/value cache against the formula in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from fastgpt.kernels import cached_attention as kernels
from fastgpt.kernels.cached_attention import cached_attention
from fastgpt.ops import reference
from tests.kernels.truth import DTYPES, HAS_GPU, assert_as_good_as_plain, require_gpu_memory


def plain(q, k, v, lengths):
    """Return the formula in the dtype of the inputs: the kernels may have twice its error.

    On a CPU, fp16 products are accumulated in fp32, as on a GPU.
    """
    visible = reference.cache_mask(q.size(2), k.size(2), lengths)
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v.where(visible[:, :, -1, :, None], 0.0)


def check(q, k, v, lengths):
    y = cached_attention(q, k, v, lengths)
    true = reference.cached_attention(q.double(), k.double(), v.double(), lengths)
    assert_as_good_as_plain(y, plain(q, k, v, lengths), true)
    assert y.transpose(1, 2).is_contiguous()
    return y


def draw(batch, n_head, n_new, n_cache, head_dim, dtype, device):
    """Return queries and caches with scores so far apart that a few keys dominate."""
    shape = (batch, n_head, n_cache, head_dim)
    q = 2 * torch.randn(batch, n_head, n_new, head_dim)
    return [x.to(device, dtype) for x in (q, torch.randn(shape), torch.randn(shape))]


def full(q, k):
    return torch.full((q.size(0),), k.size(2), device=q.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cache", [1, 15, 16, 17, 31, 32, 33, 97])
def test_one_query(n_cache, dtype, device):
    q, k, v = draw(2, 2, 1, n_cache, 64, dtype, device)
    check(q, k, v, full(q, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_new", [2, 16, 17, 64, 65])
def test_several_queries(n_new, dtype, device):
    q, k, v = draw(2, 3, n_new, 66, 64, dtype, device)
    check(q, k, v, torch.tensor([n_new, 66], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 20, 63, 65, 80, 127, 128])
def test_head_dims(head_dim, dtype, device):
    for n_new in (1, 2, 18):
        q, k, v = draw(1, n_new // 6 or 1, n_new, 40, head_dim, dtype, device)
        check(q, k, v, torch.tensor([39], device=device))


@pytest.mark.parametrize("n_new", [1, 2, 17])
@pytest.mark.parametrize("n_head", [1, 3])  # with and without a split between programs
def test_what_lies_past_a_length_counts_for_nothing(n_head, n_new, device):
    q, k, v = draw(4, n_head, n_new, 50, 16, torch.float32, device)
    lengths = torch.tensor([n_new, 50, 33, n_new + 1], device=device)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:], v[row, :, length:] = math.nan, math.inf
    y = check(q, k, v, lengths)
    zeros = [x.nan_to_num(0.0, 0.0, 0.0) for x in (k, v)]
    assert torch.equal(y, cached_attention(q, *zeros, lengths))


@pytest.mark.parametrize("n_new", [1, 2])
def test_splits_change_only_the_rounding(n_new, device, monkeypatch):
    q, k, v = draw(2, 1, n_new, 130, 64, torch.float32, device)
    lengths = torch.tensor([17, 130], device=device)  # most parts of the first row are empty
    for n_splits in (1, 3, 64):
        monkeypatch.setattr(kernels, "_n_splits", lambda *_, n=n_splits: n)
        check(q, k, v, lengths)


def test_splits_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "n_multiprocessors", lambda device: 132)  # an H200

    def n_splits(batch, n_head, n_cache, n_new=1):
        tile = kernels._select_config(torch.bfloat16, n_new, 64).constants
        blocks = batch * n_head * -(-n_new // tile["BLOCK_M"])
        return kernels._n_splits("cuda", n_new, blocks, -(-n_cache // tile["BLOCK_N"]))

    assert n_splits(1, 12, 1024) * 12 >= 2 * 132
    assert n_splits(1, 12, 2**20) * 12 >= 4 * 132
    assert n_splits(64, 12, 1024) == 1
    assert n_splits(1, 12, 1024, n_new=1024) == 2
    assert n_splits(4, 12, 1024, n_new=1024) == 1
    assert n_splits(1, 1, 20) == 1  # at most one part per tile of keys
    assert n_splits(1, 1, 2**20) == kernels.MAX_SPLITS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_new", [1, 3])
def test_views_of_packed_queries_and_of_larger_buffers(n_new, dtype, device):
    qkv = torch.randn(2, n_new, 3 * 2 * 32).to(device, dtype)
    q = reference.split_heads(qkv, 2)[0]
    buffers = torch.randn(2, 3, 2, 2, 50, 32).to(device, dtype)  # [k or v, layer, B, H, S, D]
    lengths = torch.tensor([[40, 1], [7, 1]], device=device)[:, 0]
    check(q, *buffers[:, 1], lengths)
    check(q.mT.contiguous().mT, *buffers[:, 1, :, :, 5:45], lengths)
    check(q, *buffers.transpose(3, 4).contiguous().transpose(3, 4)[:, 2], lengths)
    check(q, *buffers[:, 1, :1].expand(2, 2, 2, 50, 32), lengths)  # all rows share one prompt


@pytest.mark.parametrize("n_new", [1, 4])
def test_float64(n_new, device):
    q, k, v = draw(2, 2, n_new, 70, 24, torch.float64, device)
    lengths = torch.tensor([70, 5], device=device)
    true = reference.cached_attention(q, k, v, lengths)
    torch.testing.assert_close(cached_attention(q, k, v, lengths), true, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n_new", [1, 3])
def test_large_scores_do_not_overflow(n_new, device):
    q, k, v = draw(1, 2, n_new, 40, 16, torch.float16, device)
    check(20 * q, 20 * k, v, full(q, k))
    check(torch.zeros_like(q), k, v, full(q, k))


@pytest.mark.parametrize("n_new", [1, 5])
def test_same_inputs_same_bits(n_new, device):
    q, k, v = draw(1, 2, n_new, 100, 64, torch.float32, device)
    first = cached_attention(q, k, v, full(q, k))
    assert torch.equal(first, cached_attention(q, k, v, full(q, k)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from NumPy
@pytest.mark.parametrize("n_head", [1, 6])
def test_lengths_that_break_the_promise_read_nothing_outside(n_head, device):
    q, k, v = draw(2, n_head, 1, 20, 16, torch.float32, device)
    y = cached_attention(q, k, v, torch.tensor([0, 10**6], device=device))
    assert y[0].isnan().all()  # sees no position: NaN, as in the reference
    torch.testing.assert_close(y[1], cached_attention(q, k, v, full(q, k))[1])
    q, k, v = draw(2, n_head, 4, 20, 16, torch.float32, device)
    y = cached_attention(q, k, v, torch.tensor([-(10**6), 2], device=device))
    assert y[0].isnan().all()
    assert y[1, :, :2].isnan().all()
    assert y[1, :, 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 16), (2, 0, 1, 5, 16), (2, 2, 0, 5, 16)])
def test_nothing_to_do(shape, device):
    q, k, v = draw(*shape, torch.float32, device)
    assert cached_attention(q, k, v, full(q, k)).shape == q.shape


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_shape(data):
    device = "cuda" if HAS_GPU else "cpu"
    n_cache = data.draw(st.integers(1, 80))
    n_new = data.draw(st.integers(1, min(n_cache, 20)))
    batch, n_head, head_dim = (data.draw(st.integers(1, most)) for most in (3, 3, 40))
    lengths = data.draw(st.lists(st.integers(n_new, n_cache), min_size=batch, max_size=batch))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = draw(batch, n_head, n_new, n_cache, head_dim, torch.float32, device)
    check(q, k, v, torch.tensor(lengths, device=device))


def test_follows_the_setting_of_tf32():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            tile = kernels._select_config(torch.float32, 8, 64).constants
            assert tile["PRECISION"] == setting
            tile = kernels._select_config(torch.bfloat16, 8, 64).constants
            assert tile["PRECISION"] == "ieee"
    finally:
        matmul.fp32_precision = before


def test_every_launch_is_listed():
    """Every configuration of the launcher is among the variants that are compiled ahead of time."""
    listed = {(v.kernel, *sorted(v.constants.items())) for v in kernels.variants(90)}
    for dtype in kernels.DTYPES:
        for n_new in (1, 2, 16, 17, 300):
            for head_dim in (1, 64, 65, 128):
                config = kernels._select_config(dtype, n_new, head_dim)
                for split in (True, False):
                    tile = config.constants | {"SPLIT": split}
                    assert (kernels._kernel(config).__name__, *sorted(tile.items())) in listed


def test_refuses_what_it_does_not_support(device):
    q, k, v = draw(2, 3, 1, 5, 16, torch.float32, device)
    lengths = full(q, k)
    for arguments, message in (
        ((q.half(), k, v, lengths), r"one dtype, not torch.float16, torch.float32 and"),
        ((q.int(), k, v, lengths), "q must be one of torch.float32.*not torch.int32"),
        ((q[0], k, v, lengths), r"q must be \[B, H, T, D\].*not \[3, 1, 16\]"),
        ((q, k, v[:, :, 1:], lengths), r"and \[2, 3, 4, 16\]"),
        ((q, k[..., 1:], v[..., 1:], lengths), r"\[2, 3, S, 16\].*not \[2, 3, 5, 15\]"),
        ((q[:1], k, v, lengths), r"\[1, 3, S, 16\].*not \[2, 3, 5, 16\]"),
        ((q.repeat(1, 1, 6, 1), k, v, lengths), "hold 5 positions, but the 6 new ones"),
        ((q, k.mT.contiguous().mT, v, lengths), "stride 1 .*not 5 and 1"),
        ((q, k, v, lengths.int()), r"int64 \[2\], not torch.int32"),
        ((q, k, v, lengths[:1]), r"int64 \[2\], not torch.int64 \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cached_attention(*arguments)
    wide = draw(1, 1, 1, 5, 129, torch.float32, device)
    with pytest.raises(ValueError, match="from 1 to 128 are supported, not 129"):
        cached_attention(*wide, torch.tensor([5], device=device))


def test_more_elements_than_int32_counts():
    require_gpu_memory(17)
    k = torch.zeros(3, 12, 2**20, 64, dtype=torch.bfloat16, device="cuda")
    k[2, 11, -1] = 1.0
    q = torch.full((3, 12, 1, 64), 100.0, dtype=torch.bfloat16, device="cuda")
    y = cached_attention(q, k, k, full(q, k))
    assert (y[2, 11] == 1.0).all()
    assert y.count_nonzero() == 64


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs")
@pytest.mark.parametrize("n_new", [1, 3])
def test_records_into_a_graph_and_follows_the_lengths(n_new):
    q, k, v = draw(2, 12, n_new, 200, 64, torch.bfloat16, "cuda")
    lengths = torch.tensor([20, 30], device="cuda")
    cached_attention(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cached_attention(q, k, v, lengths)
    lengths.copy_(torch.tensor([200, 3], device="cuda"))
    graph.replay()
    assert torch.equal(y, cached_attention(q, k, v, lengths))
