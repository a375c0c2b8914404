"""Generation: sampling, the key/value cache and the sliding window."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.inference.generation import complete, generate, stream
from fastgpt.inference.kv_cache import KVCache, window_start


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(61, 16, 2, 2, 32))
    with torch.no_grad():  # far from uniform, so that a wrong context changes the chosen token
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def prompt(batch: int = 2, time: int = 5) -> torch.Tensor:
    return torch.randint(61, (batch, time), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["reference", "native"])  # Triton's interpreter is too slow
@pytest.mark.parametrize("time", [1, 5, 16, 17, 50])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing(model: GPT, backend: str, time: int, temperature: float) -> None:
    """From inside the context to far beyond it, compared to recomputing the whole window."""
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
    """The calls known from other GPT-2 projects work unchanged."""
    import fastgpt

    tokenizer = fastgpt.Tokenizer.gpt2()
    model = fastgpt.GPT(fastgpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    context = torch.tensor([tokenizer.encode("Once upon a time")])
    generated = model.generate(context, max_new_tokens=100, temperature=0.8)
    assert tokenizer.decode(generated[0]).startswith("Once upon a time")
    assert tokenizer.decode(generated[0].tolist()) == tokenizer.decode(generated[0])
    assert generated.shape == (1, 104)


def test_a_seed_gives_the_same_text_in_any_batch(model: GPT) -> None:
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
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], not 1.5"),
        ({"min_p": math.nan}, r"min_p must be in \[0, 1\], not nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-9 to 1e9, not 0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, not 2.5"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be from -2 to 2, not nan"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"seed": [1, 2, 3]}, "3 seeds for 2 rows"),
        ({"seed": -1}, r"a seed must be from 0 to 2\^63 - 1, not -1"),
    ],
)
def test_invalid_settings_are_rejected_before_any_computation(
    model: GPT, wrong: dict[str, float], message: str
) -> None:
    settings = {"max_new_tokens": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        stream(model, prompt(), **settings)  # raises without being iterated


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_write_nothing(temperature: float) -> None:
    model = GPT(GPTConfig(61, 16, 1, 2, 32))
    with torch.no_grad():
        model.ln_f.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite: its weights are damaged"):
        generate(model, prompt(), 3, temperature=temperature)


def test_writing_leaves_the_model_as_it_was(model: GPT) -> None:
    model.train()
    state = torch.get_rng_state()
    generate(model, prompt(), 3, seed=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    ids = generate(model, prompt(), 3)
    model(ids[:, :-1], ids[:, 1:]).backward()  # generated ids can be used for training
    model.zero_grad()
    model.eval()


def test_a_full_cache_says_so(model: GPT) -> None:
    cache = KVCache(model, 1, capacity=4)
    model.hidden(prompt(1, 3), cache)
    with pytest.raises(ValueError, match="holds 3 of 4 positions: 2 more do not fit"):
        model.hidden(prompt(1, 2), cache)


def test_tokens_come_one_by_one(model: GPT) -> None:
    whole = generate(model, prompt(), 9, seed=4)[:, 5:]
    steps = list(stream(model, prompt(), 9, seed=4))
    assert torch.equal(torch.stack(steps, 1), whole)


# --- prompts of different lengths, several texts of each ---------------------------------------


def prompts() -> list[torch.Tensor]:
    """Return prompts of one token to far beyond the context of 16, in no particular order."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(61, (n,), generator=generator) for n in (5, 1, 16, 17, 40, 2, 9)]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_different_lengths_generate_as_they_do_alone(
    model: GPT, backend: str, use_cache: bool, temperature: float
) -> None:
    """Their windows slide at different times."""
    model.use_ops(backend)
    sampling = {"temperature": temperature, "use_cache": use_cache}
    together = complete(model, prompts(), 30, seed=4, **sampling)
    for row, ids in enumerate(prompts()):
        alone = generate(model, ids[None], 30, seed=4 + row, **sampling)[0, len(ids) :]
        assert together[row][0].ids == alone.tolist()
        assert together[row][0].finish == "length"


def test_several_texts_of_one_prompt(model: GPT) -> None:
    ids = prompt(2, 5)
    found = generate(model, ids, 20, n=3, seed=8)
    assert torch.equal(found, generate(model, ids.repeat_interleave(3, 0), 20, seed=8))
    assert len({tuple(row.tolist()) for row in found[:3]}) == 3
    rows = complete(model, prompts(), 20, n=2, seed=list(range(14)))
    single = complete(model, [row for row in prompts() for _ in range(2)], 20, seed=0)
    assert [c.ids for of_prompt in rows for c in of_prompt] == [c[0].ids for c in single]


def test_a_prompt_is_read_once_for_all_its_texts(model: GPT, monkeypatch) -> None:
    read = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT,
        "hidden",
        lambda self, ids, cache=None: read.append(ids.shape) or hidden(self, ids, cache),
    )
    generate(model, prompt(2, 7), 3, n=4)
    assert read == [(2, 7), (8, 1), (8, 1)]


def test_logprobs_are_the_models_own(model: GPT) -> None:
    settings = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3, "seed": 3}
    for of_prompt, ids in zip(complete(model, prompts(), 9, **settings), prompts(), strict=True):
        text = ids.tolist()
        for token, logprob in zip(of_prompt[0].ids, of_prompt[0].logprobs, strict=True):
            window = torch.tensor([text[window_start(len(text), 16) :]])
            assert logprob == pytest.approx(
                model(window)[0, -1].log_softmax(-1)[token].item(), abs=1e-4
            )
            text.append(token)


def test_what_ends_a_completion(model: GPT) -> None:
    free = [of_prompt[0].ids for of_prompt in complete(model, prompts(), 30, seed=2)]
    ends = {free[0][4], free[3][7]}
    ended = complete(model, prompts(), 30, seed=2, stop_tokens=ends)
    for whole, (completion,) in zip(free, ended, strict=True):
        cut = next((at for at, token in enumerate(whole) if token in ends), 30)
        assert completion.ids == whole[:cut]
        assert len(completion.logprobs) == cut
        assert completion.finish == ("stop" if cut < 30 else "length")
    told: dict[int, list[int]] = {}

    def after_three(row: int, token: int) -> bool:
        told.setdefault(row, []).append(token)
        return len(told[row]) == 3

    three = complete(model, prompts(), 30, seed=2, stop=after_three)
    assert [c.ids for (c,) in three] == list(told.values()) == [ids[:3] for ids in free]


def test_nothing_asked_for_is_nothing_written(model: GPT) -> None:
    assert complete(model, [], 5) == []
    assert [c.ids for (c,) in complete(model, prompts(), 0)] == [[]] * 7
    with pytest.raises(ValueError, match="at least one token, not"):
        complete(model, [[1], []], 5)
    with pytest.raises(ValueError, match="token id 61 is outside"):
        complete(model, [[1], [61]], 5)
