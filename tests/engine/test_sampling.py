"""Penalties, min-p and random draws compared to a reference in plain Python."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.inference.engine import Engine
from fastgpt.inference.sampling import Sampler
from fastgpt.model import GPT
from tests.engine.models import prompt, small_model


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def engine(model: GPT) -> Engine:
    return Engine.from_model(model, "float32", 1)


def choose(logits: list[float], text: list[int], n_prompt: int, s: Sampler, u: float) -> int:
    """Return the token chosen by the documented steps, computed in float64."""
    logits = list(logits)
    for token in set(text):
        penalty = s.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(text[n_prompt:]):
        count = text[n_prompt:].count(token)
        logits[token] -= s.presence_penalty + s.frequency_penalty * count
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if s.temperature == 0:
        return order[0]
    weights = [math.exp((x - max(logits)) / s.temperature) for x in logits]
    kept = order[: s.top_k or len(order)]
    total, before, likely = sum(weights[i] for i in kept), 0.0, []
    for token in kept:
        if before < (s.top_p or 1.0) * total:
            likely.append(token)
        before += weights[token]
    kept = sorted(i for i in likely if weights[i] >= (s.min_p or 0.0))
    point, running = u * sum(weights[i] for i in kept), 0.0
    for token in kept:
        running += weights[token]
        if running > point:
            return token
    return kept[-1]


def follow(model: GPT, ids: torch.Tensor, new: int, sampling: Sampler, seed: int) -> list[int]:
    """Return the reference's tokens, recomputing the whole text for each token."""
    text, generator = ids.tolist(), torch.Generator().manual_seed(seed)
    for _ in range(new):
        logits = model(torch.tensor([text]))[0, -1].tolist()
        u = 0.0 if sampling.temperature == 0 else float(torch.rand((1,), generator=generator))
        text.append(choose(logits, text, len(ids), sampling, u))
    return text


CASES: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 2.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 0.7},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 1.5, "top_k": 9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 0.05, "top_p": 0.9, "temperature": 1.4},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "min_p": 0.01, "top_k": 20},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_is_that_of_the_reference(model: GPT, engine: Engine, case: dict[str, Any]) -> None:
    ids = prompt(3, 4)
    got = engine.generate(ids, 12, seed=8, **case)
    for row in range(3):
        assert got[row].tolist() == follow(model, ids[row], 12, Sampler(**case), 8 + row)


@settings(max_examples=40)
@given(
    st.floats(0.1, 3.0),
    st.integers(0, 70),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.5),
    st.floats(0.5, 2.0),
    st.floats(-1.0, 2.0),
    st.integers(0, 2**63 - 1),
)
def test_any_settings_lead_to_the_text_of_the_reference(
    t: float, k: int, p: float, min_p: float, repetition: float, presence: float, seed: int
) -> None:
    model = small_model()
    sampling = Sampler(t, k, p, min_p, repetition, presence, presence / 2)
    ids = prompt(1, 6)
    got = Engine.from_model(model, "float32", 1).generate(ids, 6, seed=seed, **vars(sampling))
    assert got[0].tolist() == follow(model, ids[0], 6, sampling, seed)


def test_draws_follow_the_probabilities(model: GPT, engine: Engine) -> None:
    ids = prompt(1, 5).expand(4000, 5)
    drawn = engine.generate(ids, 1, seed=0, temperature=0.7, top_k=12)[:, -1]
    logits = model(ids[:1])[0, -1].detach().double() / 0.7
    logits[logits.argsort(descending=True)[12:]] = -math.inf
    expected = logits.softmax(-1)
    counts = torch.bincount(drawn, minlength=61).double()
    assert (counts[expected == 0] == 0).all()
    spread = (expected * (1 - expected) * 4000).sqrt().clamp(min=1e-9)
    assert ((counts - expected * 4000).abs() / spread)[expected > 0].max() < 4.5


def test_equal_logits_are_broken_by_the_first() -> None:
    model = small_model()
    with torch.no_grad():
        model.wte.weight.copy_(model.wte.weight[:1].expand(61, 32))
    engine = Engine.from_model(model, "float32", 1)
    assert engine.generate(prompt(), 3, temperature=0)[:, 5:].eq(0).all()
    drawn = engine.generate(prompt(1).expand(200, 5), 1, seed=0, top_k=4)[:, -1]
    assert set(drawn.tolist()) == {0, 1, 2, 3}
