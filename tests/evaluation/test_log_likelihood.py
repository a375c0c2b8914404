"""Log-likelihoods: the sliding window, and sums compared to a naive loop."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastgpt.data.token_files import joined
from fastgpt.evaluation.log_likelihood import (
    Scores,
    check_window,
    log_likelihoods,
    perplexity,
    windows,
)
from fastgpt.model import GPT, GPTConfig

CONTEXT, VOCAB = 12, 29


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(1)
    config = GPTConfig(VOCAB, CONTEXT, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():  # distributions as peaked as a trained model's
            parameter.mul_(6).add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, 77).astype(np.uint16)


def truth(model: GPT, before: list[int], token: int) -> tuple[float, bool]:
    """Return ln p of a token in float64 by the reference formulas, and whether it is greedy."""
    reference = GPT(model.config, "reference").double().eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        log_probs = reference(torch.tensor([before]))[0, -1].log_softmax(-1)
    return log_probs[token].item(), int(log_probs.argmax()) == token


def naive(model: GPT, row: list[int], context: int, stride: int) -> float:
    """Return the sum of -ln p, computed per token from the documented context."""
    nats = 0.0
    for i in range(1, len(row)):
        # The first window that reaches the token: the model sees its tokens before it.
        k = 0 if i <= context else math.ceil((i - context) / stride)
        nats -= truth(model, row[k * stride : i], row[i])[0]
    return nats


@pytest.mark.parametrize(("context", "stride"), [(12, 6), (12, 12), (12, 1), (7, 3), (1, 1)])
@pytest.mark.parametrize("start_token", [None, 5])
def test_the_sum_is_that_of_a_naive_loop(
    model: GPT, tokens: np.ndarray, context: int, stride: int, start_token: int | None
) -> None:
    scores = perplexity(model, tokens, context=context, stride=stride, start_token=start_token)
    row = [*([] if start_token is None else [start_token]), *tokens.tolist()]
    assert scores.n_tokens == len(row) - 1
    assert_close(scores.nats, naive(model, row, context, stride), rtol=1e-5, atol=0)
    assert_close(scores.loss, scores.nats / scores.n_tokens)
    assert_close(scores.perplexity, math.exp(scores.loss))


def test_the_defaults_are_the_models_context_and_half_of_it(model: GPT, tokens: np.ndarray) -> None:
    assert check_window(model, None, None) == (12, 6)
    assert check_window(model, 7, None) == (7, 4)
    assert perplexity(model, tokens).nats == perplexity(model, tokens, context=12, stride=6).nats


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_each_token_is_scored_once_from_what_is_promised(
    n_tokens: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored = []
    for number, (start, first, stop) in enumerate(windows(n_tokens, context, stride)):
        assert start == number * stride
        assert 0 <= start <= first < stop <= start + context
        for position in range(first, stop):  # the token after it is scored
            seen = position - start + 1
            assert seen == position + 1 if number == 0 else context - stride < seen <= context
        scored += range(first + 1, stop + 1)
    assert scored == list(range(1, n_tokens))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_changes_nothing(model: GPT, tokens: np.ndarray, batch_size: int) -> None:
    one = perplexity(model, tokens, batch_size=7)
    assert_close(perplexity(model, tokens, batch_size=batch_size).nats, one.nats, rtol=1e-6, atol=0)


def test_lists_tensors_arrays_and_shards_are_the_same(model: GPT, tokens: np.ndarray) -> None:
    kinds = [tokens.tolist(), torch.from_numpy(tokens.astype(np.int64)), tokens]
    kinds.append(joined([tokens[:5], tokens[5:31], tokens[31:]]))
    results = {perplexity(model, kind, start_token=3).nats for kind in kinds}
    assert len(results) == 1


def test_logits_of_transformers_give_the_same_loss(
    model: GPT, tokens: np.ndarray, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    row = torch.from_numpy(tokens.astype(np.int64))
    nats = 0.0
    for start in range(0, len(row) - 1, CONTEXT):
        piece = row[start : start + CONTEXT + 1]
        with torch.no_grad():
            logits = peer(piece[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
    assert_close(perplexity(model, tokens, stride=CONTEXT).nats, nats, rtol=1e-5, atol=0)


def test_a_text_shorter_than_the_context(model: GPT) -> None:
    scores = perplexity(model, [4, 5, 6])
    assert scores.n_tokens == 2
    assert_close(scores.nats, naive(model, [4, 5, 6], CONTEXT, 6), rtol=1e-5, atol=0)


def test_one_token_is_scored_only_from_a_start_token(model: GPT) -> None:
    scores = perplexity(model, [4], start_token=2)
    assert_close(-scores.nats, truth(model, [2], 4)[0], rtol=1e-5, atol=0)
    assert scores.n_tokens == 1
    with pytest.raises(ValueError, match="1 tokens leave nothing to score"):
        perplexity(model, [4])
    with pytest.raises(ValueError, match="0 tokens leave nothing"):
        perplexity(model, [], start_token=2)


def test_a_model_that_knows_nothing_has_the_logarithm_of_the_vocabulary() -> None:
    model = GPT(GPTConfig(100, 16, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.ln_f.weight.zero_()  # all logits are 0
    assert_close(perplexity(model, list(range(100))).loss, math.log(100))
    assert_close(perplexity(model, list(range(100))).perplexity, 100.0, rtol=1e-6, atol=0)


def test_dropout_is_off_and_the_model_is_left_as_it_was(model: GPT, tokens: np.ndarray) -> None:
    model.train()
    assert perplexity(model, tokens).nats == perplexity(model, tokens).nats
    assert model.training
    model.eval()
    log_likelihoods(model, [([1], [2])])
    assert not model.training


def test_no_more_logits_are_held_than_the_scored_positions_need(
    model: GPT, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    plain = GPT.loss

    def counted(self: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape)
        return plain(self, hidden, targets)

    monkeypatch.setattr(GPT, "loss", counted)
    monkeypatch.setattr(GPT, "logits", None)  # all logits are never computed
    perplexity(model, tokens, batch_size=2, stride=3)
    assert sizes[0] == (12 + 3, 16)
    assert set(sizes[1:-1]) == {(6, 16)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_truth(
    model: GPT, tokens: np.ndarray, dtype: torch.dtype
) -> None:
    exact = naive(model, tokens.tolist(), CONTEXT, 6)
    with torch.autocast("cpu", dtype):
        assert_close(perplexity(model, tokens).nats, exact, rtol=0.02, atol=0)


def test_progress_is_told_of_every_token(model: GPT, tokens: np.ndarray) -> None:
    told: list[int] = []
    scores = perplexity(model, tokens, advance=told.append)
    assert sum(told) == scores.n_tokens
    assert scores.tokens_per_s > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 13}, "context must be from 1 to the model's 12, not 13"),
        ({"context": 0}, "context must be from 1 to the model's 12"),
        ({"stride": 13}, "stride must be from 1 to the context of 12, not 13"),
        ({"stride": 0}, "stride must be from 1"),
        ({"context": 4, "stride": 5}, "the context of 4, not 5"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"start_token": 29}, "token id 29 is outside the model's vocabulary of 29"),
    ],
)
def test_wrong_settings(model: GPT, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model, [1, 2, 3], **settings)


@pytest.mark.parametrize("wrong", [29, -1])
def test_wrong_ids(model: GPT, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
        perplexity(model, [1, wrong, 2])


def test_figures_that_are_too_large_or_unknown() -> None:
    assert Scores(1e6, 10).perplexity == math.inf
    assert math.isnan(Scores(1.0, 1).bits_per_byte)
    assert_close(Scores(math.log(256) * 3, 2, n_bytes=3).bits_per_byte, 8.0)


# --- continuations -----------------------------------------------------------------------------


def pairs_of(rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
    sizes = [(1, 1), (3, 4), (11, 1), (11, 2), (30, 12), (2, 12), (5, 5), (1, 11)]
    return [tuple(rng.integers(0, VOCAB, n).tolist() for n in size) for size in sizes]  # type: ignore[misc]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_continuations_are_scored_as_by_a_naive_loop(model: GPT, batch_size: int) -> None:
    pairs = pairs_of(np.random.default_rng(2))
    told: list[int] = []
    found = log_likelihoods(model, pairs, batch_size=batch_size, advance=told.append)
    assert sum(told) == len(pairs)
    for (context, continuation), answer in zip(pairs, found, strict=True):
        row = [*context, *continuation]
        begin = max(0, len(row) - 1 - CONTEXT)  # truncated on the left
        each = [truth(model, row[begin:i], row[i]) for i in range(len(context), len(row))]
        assert_close(answer.total, sum(total for total, _ in each), rtol=1e-5, atol=1e-5)
        assert answer.greedy == all(likeliest for _, likeliest in each)


def test_a_greedy_continuation_is_told_from_one_that_is_not(model: GPT) -> None:
    ids = model.eval().generate(torch.tensor([[3, 7]]), 5, temperature=0.0)[0].tolist()
    other = [*ids[2:-1], (ids[-1] + 1) % VOCAB]
    found = log_likelihoods(model, [(ids[:2], ids[2:]), (ids[:2], other)])
    assert [answer.greedy for answer in found] == [True, False]


def test_a_continuation_longer_than_the_context_is_scored_in_pieces(model: GPT) -> None:
    row = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
    (found,) = log_likelihoods(model, [(row[:2], row[2:])])
    total = 0.0
    for first in range(2, 40, 6):  # half a context at a time
        stop = min(first + 6, 40)
        begin = max(0, stop - 1 - CONTEXT)
        total += sum(truth(model, row[begin:i], row[i])[0] for i in range(first, stop))
    assert_close(found.total, total, rtol=1e-5, atol=0)


def test_chunks_of_the_head_change_nothing(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(np.random.default_rng(4))
    whole = log_likelihoods(model, pairs)
    monkeypatch.setattr("fastgpt.ops.MAX_LOGITS", 5 * VOCAB)
    for (a, greedy_a), (b, greedy_b) in zip(whole, log_likelihoods(model, pairs), strict=True):
        assert_close(a, b, rtol=1e-6, atol=0)
        assert greedy_a == greedy_b


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_nothing_before_and_nothing_after_are_refused(
    model: GPT, pair: tuple[list[int], list[int]]
) -> None:
    with pytest.raises(ValueError, match="can be empty"):
        log_likelihoods(model, [([1], [2]), pair])
