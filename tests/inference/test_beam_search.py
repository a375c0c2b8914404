"""Beam search compared to transformers and to exhaustive search."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastgpt import GPT, GPTConfig
from fastgpt.inference.beam_search import beam_search


def make(vocab_size: int = 37, seed: int = 1) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, 32, 2, 2, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25)
    return model.eval()


@pytest.mark.parametrize("n_beams", [1, 2, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7, 2.0])
@pytest.mark.parametrize("stop_token", [None, 3])
def test_as_transformers_do(tmp_path, n_beams, length_penalty, stop_token) -> None:
    for seed in range(4):
        model = make(seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed)).eval()
        prompt = torch.randint(4, 37, (1, 5))
        found = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            num_beams=n_beams,
            num_return_sequences=n_beams,
            do_sample=False,
            length_penalty=length_penalty,
            eos_token_id=stop_token,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        settings = {"n_beams": n_beams, "length_penalty": length_penalty}
        ours = beam_search(model, prompt, 12, n=n_beams, stop_token=stop_token, **settings)
        assert len(ours) == n_beams
        for row, beam in enumerate(ours):
            expected = found.sequences[row, 5:].tolist()
            if stop_token in expected:
                expected = expected[: expected.index(stop_token) + 1]
            assert beam.ids == expected
            if n_beams > 1:
                assert beam.score == pytest.approx(found.sequences_scores[row].item(), abs=1e-4)


@torch.no_grad()
def test_enough_beams_find_the_likeliest_text() -> None:
    model, prompt = make(5), torch.tensor([1, 2])
    texts = torch.tensor(list(itertools.product(range(5), repeat=3)))
    whole = torch.cat([prompt.expand(len(texts), 2), texts], 1)
    logprobs = model(whole[:, :-1]).log_softmax(-1).gather(2, whole[:, 1:, None])[:, 1:, 0].sum(1)
    order = logprobs.argsort(descending=True)
    found = beam_search(model, prompt, 3, n_beams=25, n=4, length_penalty=0.0)
    assert [beam.ids for beam in found] == texts[order[:4]].tolist()
    for beam, truth in zip(found, logprobs[order], strict=False):
        assert beam.score == pytest.approx(truth.item(), abs=1e-4)


@pytest.mark.parametrize("vocab_size", [1, 2, 3])
def test_no_text_is_impossible_where_beams_outnumber_tokens(vocab_size: int) -> None:
    prompt = torch.tensor([0])
    found = beam_search(make(vocab_size), prompt, 1, n_beams=4, n=4, stop_token=0)
    assert sorted(beam.ids for beam in found) == [[token] for token in range(vocab_size)]
    assert all(math.isfinite(beam.score) for beam in found)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7])
def test_no_new_tokens_are_one_empty_text(length_penalty: float) -> None:
    found = beam_search(make(), torch.arange(5), 0, length_penalty=length_penalty)
    assert [(beam.ids, beam.score) for beam in found] == [([], 0.0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 28}, "5 prompt tokens and 28 new tokens exceed"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"n_beams": 0}, r"n must be from 1 to n_beams \(0\), not 1"),
        ({"n": 5}, r"n must be from 1 to n_beams \(4\), not 5"),
        ({"ids": torch.tensor([37])}, "token id 37 is outside"),
        ({"ids": torch.tensor([], dtype=torch.int64)}, "at least one token"),
        ({"ids": torch.tensor([0.5])}, "token ids must be integers, not torch.float32"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, "takes one prompt, not 2"),
    ],
)
def test_wrong_values(settings, message: str) -> None:
    settings = {"ids": torch.arange(5), "max_new_tokens": 3, **settings}
    with pytest.raises(ValueError, match=message):
        beam_search(make(), **settings)


@pytest.mark.parametrize("name", ["max_new_tokens", "n_beams", "n"])
def test_numbers_that_are_not_integers_are_rejected(name: str) -> None:
    settings = {"max_new_tokens": 3, name: 1.5}
    with pytest.raises(TypeError, match=f"{name} must be an integer, not 1.5"):
        beam_search(make(), [1, 2, 3], **settings)
