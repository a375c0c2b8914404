"""Sampling: filters of the distribution, random draws and penalties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgpt import GPT, GPTConfig
from fastgpt.inference.generation import generate
from fastgpt.inference.sampling import RandomStreams, Sampler, TokenCounts


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(61, 16, 2, 2, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def prompt() -> torch.Tensor:
    return torch.randint(61, (2, 5), generator=torch.Generator().manual_seed(3))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, 0.5]]).expand(20_000, 5)
    uniform = RandomStreams(range(len(logits)), logits.device).next()
    sampler = Sampler(temperature=0.7)
    counts = torch.bincount(sampler.draw(logits, uniform), minlength=5).double()
    expected = (logits[0].double() / 0.7).softmax(-1)
    assert counts[2] == 0
    spread = (expected * (1 - expected) * len(logits)).sqrt().clamp(min=1e-9)
    assert ((counts - expected * len(logits)).abs() / spread)[expected > 0].max() < 4.5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_top_k_and_top_p_keep_what_they_should(size: int, k: int, p: float, seed: int) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2
    kept_k = Sampler(top_k=k).probabilities(logits)[0] > 0
    assert kept_k.sum() == min(k, size)
    assert logits[0][kept_k].min() >= logits[0][~kept_k].max() if k < size else True
    kept_p = Sampler(top_p=p).probabilities(logits)[0] > 0
    full = logits[0].softmax(-1)
    order = full.argsort(descending=True)
    n_kept = int(kept_p.sum())
    assert kept_p[order[:n_kept]].all()
    assert full[order[: n_kept - 1]].sum() < p + 1e-6
    assert n_kept == size or full[order[:n_kept]].sum() >= p - 1e-6


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    probabilities = Sampler(temperature=1e-8).probabilities(logits)
    assert torch.equal(probabilities, torch.tensor([[1.0, 0.0, 0.0]]))


def test_top_k_one_is_greedy(model: GPT) -> None:
    greedy = generate(model, prompt(), 20, temperature=0)
    assert torch.equal(generate(model, prompt(), 20, top_k=1), greedy)
    assert torch.equal(generate(model, prompt(), 20, top_p=1e-9), greedy)


@given(
    st.integers(0, 10**6), st.floats(0.2, 2), st.integers(1, 30), st.floats(0.1, 1), st.floats(0, 1)
)
def test_all_together_as_transformers_do(
    seed: int, temperature: float, k: int, p: float, m: float
) -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = LogitsProcessorList(
        [
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(k),
            TopPLogitsWarper(p),
            MinPLogitsWarper(m),
        ]
    )
    expected = theirs(torch.zeros(3, 1, dtype=torch.int64), logits).softmax(-1)
    ours = Sampler(temperature, k, p, m).probabilities(logits)
    kept = (ours > 0) == (expected > 0)
    # a sum that equals top_p exactly may be rounded to either side of it
    assert kept.sum() >= kept.numel() - 1
    if kept.all():
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_repetition_penalty_as_transformers_do() -> None:
    logits, ids = torch.randn(2, 20), torch.tensor([[1, 4, 4], [7, 0, 19]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()).argmax(-1)
    counts = TokenCounts(list(ids[:, :2]), 20)
    counts.add(ids[:, 2])
    sampler = Sampler(temperature=0.0, repetition_penalty=1.7)
    assert torch.equal(
        sampler._penalized(logits, counts), RepetitionPenaltyLogitsProcessor(1.7)(ids, logits)
    )
    assert torch.equal(sampler.draw(logits, torch.zeros(2), counts), expected)


def test_presence_and_frequency_count_what_was_written_alone() -> None:
    counts = TokenCounts([torch.tensor([5, 5, 5])], 8)
    for token in (2, 2, 3):
        counts.add(torch.tensor([token]))
    penalized = Sampler(presence_penalty=0.5, frequency_penalty=0.25)._penalized(
        torch.zeros(1, 8), counts
    )
    assert penalized[0].tolist() == [0, 0, -1.0, -0.75, 0, 0, 0, 0]


def test_penalties_keep_a_text_from_repeating_itself(model: GPT) -> None:
    greedy = generate(model, prompt(), 50, temperature=0)
    assert len(set(greedy[0, 5:].tolist())) < 40
    for settings_ in ({"frequency_penalty": 2.0}, {"repetition_penalty": 1e6}):
        varied = generate(model, prompt(), 40, temperature=0, **settings_)
        assert len(set(varied[0, 5:].tolist())) > len(set(greedy[0, 5:45].tolist()))
    once = generate(model, prompt(), 40, temperature=0, repetition_penalty=1e6)
    assert not set(once[0, 5:25].tolist()) & set(prompt()[0].tolist())


def test_no_penalty_changes_nothing(model: GPT) -> None:
    off = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    assert torch.equal(
        generate(model, prompt(), 9, seed=1, **off), generate(model, prompt(), 9, seed=1)
    )


def test_the_coldest_temperature_is_greedy(model: GPT) -> None:
    greedy = generate(model, prompt(), 9, temperature=0)
    for temperature in (1e-20, 1e-46, 1e-300):
        assert torch.equal(generate(model, prompt(), 9, temperature=temperature), greedy)


def test_ids_and_seeds_of_other_kinds(model: GPT) -> None:
    expected = generate(model, prompt(), 9, seed=3)
    assert torch.equal(generate(model, prompt().int(), 9, seed=np.int64(3)), expected)
    with pytest.raises(ValueError, match=r"token ids must be integers, not torch\.float32"):
        generate(model, prompt().float(), 9)
