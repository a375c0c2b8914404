"""Sampling, the cache and the sliding window."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.generation import KVCache, Sampler, generate, stream, window_start


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(61, 16, 2, 2, 32))
    with torch.no_grad():  # far from uniform, so that a wrong context shows in the choice
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def prompt(batch: int = 2, time: int = 5) -> torch.Tensor:
    return torch.randint(61, (batch, time), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["reference", "native"])  # Triton's interpreter is too slow
@pytest.mark.parametrize("time", [1, 5, 16, 17, 50])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing(model: GPT, backend: str, time: int, temperature: float) -> None:
    """From inside the context to far past it, against reading everything anew (fault 62)."""
    model.use_ops(backend)
    sampling = {"temperature": temperature, "seed": 5}
    cached = generate(model, prompt(time=time), 40, **sampling)
    plain = generate(model, prompt(time=time), 40, use_cache=False, **sampling)
    assert cached.shape == (2, time + 40)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :time], prompt(time=time))


def test_greedy_takes_the_likeliest_of_the_documented_window(model: GPT) -> None:
    ids = generate(model, prompt(1, 3), 60, temperature=0)[0]
    for length in range(3, 63):
        window = ids[window_start(length, 16) : length]
        assert len(window) == length if length <= 16 else 8 <= len(window) <= 16
        assert ids[length] == model(window[None])[0, -1].argmax()


@given(st.integers(1, 500), st.integers(1, 40))
def test_the_window_slides_by_half_a_context(length: int, block_size: int) -> None:
    start = window_start(length, block_size)
    assert block_size // 2 <= length - start <= block_size or start == 0
    assert length - start >= 1
    assert start % ((block_size + 1) // 2) == 0
    assert window_start(length + 1, block_size) >= start


def test_three_lines_of_a_familiar_program() -> None:
    """The calls that a reader of other GPT-2 projects knows, as they stand there."""
    import fastgpt

    tokenizer = fastgpt.Tokenizer.gpt2()
    model = fastgpt.GPT(fastgpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    context = torch.tensor([tokenizer.encode("Once upon a time")])
    generated = model.generate(context, max_new_tokens=100, temperature=0.8)
    assert tokenizer.decode(generated[0]).startswith("Once upon a time")
    assert tokenizer.decode(generated[0].tolist()) == tokenizer.decode(generated[0])
    assert generated.shape == (1, 104)


def test_fault_63_a_seed_gives_the_same_text_in_any_batch(model: GPT) -> None:
    ids = prompt(4)
    whole = generate(model, ids, 12, seed=[7, 8, 9, 10])
    assert torch.equal(whole, generate(model, ids, 12, seed=7))
    for row in range(4):
        alone = generate(model, ids[row : row + 1], 12, seed=7 + row)
        assert torch.equal(alone[0], whole[row])
    assert not torch.equal(whole, generate(model, ids, 12, seed=100))
    assert not torch.equal(generate(model, ids, 12), generate(model, ids, 12))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, not nan"),
        ({"temperature": math.inf}, "temperature must be 0 or more, not inf"),
        ({"top_k": -1}, "top_k must be at least 1 .*not -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], not 1.5"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], not nan"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"seed": [1, 2, 3]}, "3 seeds for 2 rows"),
        ({"seed": -1}, r"a seed must be from 0 to 2\^63 - 1, not -1"),
    ],
)
def test_fault_60_wrong_settings_are_refused_before_anything_is_computed(
    model: GPT, wrong: dict[str, float], message: str
) -> None:
    settings = {"max_new_tokens": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        stream(model, prompt(), **settings)  # not even iterated


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[batch, tokens\].*not \[3\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"at least one token, not \[1, 0\]"),
        (torch.tensor([[3, 61]]), "token id 61 is outside the model's vocabulary of 61"),
        (torch.tensor([[-1, 3]]), "token id -1 is outside"),
    ],
)
def test_wrong_ids_are_refused(model: GPT, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, ids, 3)


def test_nothing_new_is_a_copy(model: GPT) -> None:
    assert torch.equal(generate(model, prompt(), 0), prompt())


def test_a_row_ends_at_the_stop_token(model: GPT) -> None:
    free = generate(model, prompt(3), 30, seed=2)
    stop = int(free[0, 9])
    ids = generate(model, prompt(3), 30, seed=2, stop_token=stop)
    for row, tokens in enumerate(ids):
        ends = (tokens[5:] == stop).nonzero()
        if len(ends):
            end = 5 + int(ends[0])
            assert torch.equal(tokens[:end], free[row, :end])
            assert (tokens[end:] == stop).all()
    alone = generate(model, prompt(3)[:1], 30, seed=2, stop_token=stop)
    assert alone.size(1) <= 10
    assert alone[0, -1] == stop


def test_writing_leaves_the_model_as_it_was(model: GPT) -> None:
    model.train()
    state = torch.get_rng_state()
    generate(model, prompt(), 3, seed=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    ids = generate(model, prompt(), 3)
    model(ids[:, :-1], ids[:, 1:]).backward()  # what was written can be trained on
    model.zero_grad()
    model.eval()


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, 0.5]]).expand(20_000, 5)
    generators = [torch.Generator().manual_seed(i) for i in range(len(logits))]
    sampler = Sampler(temperature=0.7)
    counts = torch.bincount(sampler.draw(logits, generators), minlength=5).double()
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


def test_a_full_cache_says_so(model: GPT) -> None:
    cache = KVCache(model, 1, capacity=4)
    model.hidden(prompt(1, 3), cache)
    with pytest.raises(ValueError, match="holds 3 of 4 positions: 2 more do not fit"):
        model.hidden(prompt(1, 2), cache)


def test_tokens_come_one_by_one(model: GPT) -> None:
    whole = generate(model, prompt(), 9, seed=4)[:, 5:]
    steps = list(stream(model, prompt(), 9, seed=4))
    assert torch.equal(torch.stack(steps, 1), whole)
