"""Text generation: stop strings, streaming, prompts of different lengths."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgpt
from fastgpt import GPT, CharTokenizer, GPTConfig, Tokenizer
from fastgpt.inference.text import TextStream, _Text, generate, generate_texts, stream_text

CHARS = CharTokenizer("abc\n")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(4, 16, 1, 2, 16)).eval()


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    # Of two overlapping stop strings, the one that is complete first ends the text.
    complete = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    seen = text[:complete]
    expected = text[: min(seen.find(s) for s in stop if s in seen)] if ends else text
    pieces = list(TextStream(_Text(CHARS, stop), iter(CHARS.encode(text)), ()))
    assert "".join(pieces) == expected
    assert "" not in pieces
    state = _Text(CHARS, stop)
    for token in CHARS.encode(text):
        if state.push(token):
            break
    assert state.finish() == expected


def test_pieces_come_as_soon_as_they_are_sure() -> None:
    pieces = list(TextStream(_Text(CHARS, ["cab"]), iter(CHARS.encode("abccacabb")), ()))
    assert pieces == ["a", "b", "c", "ca"]
    assert list(TextStream(_Text(CHARS, ["bb"]), iter(CHARS.encode("ab")), ())) == ["a", "b"]


def test_nothing_is_generated_after_the_stop_string() -> None:
    tokens = iter(CHARS.encode("abccab"))
    assert "".join(TextStream(_Text(CHARS, ["cc", "b\n"]), tokens, ())) == "ab"
    assert CHARS.decode(list(tokens)) == "ab"


def test_characters_come_whole() -> None:
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("é🙂x")
    assert len(ids) > 3
    assert list(TextStream(_Text(tokenizer, []), iter(ids), ())) == ["é", "🙂", "x"]
    assert list(TextStream(_Text(tokenizer, []), iter(ids[:-2]), ()))[-1] == "\ufffd"


def test_write_and_stream_are_the_same_text(model: GPT) -> None:
    prompts = ["a", "", "abcabcabcabcabcabcabcabc", "b\n"]
    whole = generate_texts(model, CHARS, prompts, 40, seed=5)
    for row, prompt in enumerate(prompts):
        streamed = "".join(stream_text(model, CHARS, prompt, 40, seed=5 + row))
        assert whole[row][0].text == streamed
        assert whole[row][0].prompt == prompt
        assert len(streamed) == 40
    stopped = generate_texts(model, CHARS, prompts, 40, seed=5, stop=["ab", "c\n"], n=2)
    for row, texts in enumerate(stopped):
        assert len(texts) == 2
        assert not any("ab" in text.text or "c\n" in text.text for text in texts)
        first = generate_texts(
            model, CHARS, [prompts[row]], 40, seed=5 + 2 * row, stop=["ab", "c\n"]
        )
        assert first[0][0].text == texts[0].text
        assert first[0][0].completion.ids == texts[0].completion.ids


def test_one_text_from_the_package(model: GPT) -> None:
    """`fastgpt.generate` is also a module, which is imported when it is used."""
    settings: dict[str, Any] = {"seed": 5, "stop": ["ab"], "top_k": 3}
    expected = generate_texts(model, CHARS, ["ca"], 40, **settings)[0][0].text
    assert fastgpt.generate(model, CHARS, "ca", 40, **settings) == expected
    assert generate(model, CHARS, "ca", 40, **settings) == expected
    for prompt in (CHARS.encode("ca"), b"ca"):
        assert "".join(stream_text(model, CHARS, prompt, 40, **settings)) == expected
    with pytest.raises(TypeError, match="heat"):
        fastgpt.generate(model, CHARS, "ca", 40, heat=1.0)


@pytest.mark.parametrize(
    "statement",
    ["import fastgpt", "import fastgpt.generate", "from fastgpt import *", "import fastgpt.train"],
)
def test_the_package_is_callable_however_it_is_imported(statement: str) -> None:
    code = f"""if True:
        {statement}
        import fastgpt
        from fastgpt import generate
        assert callable(fastgpt.generate) and generate is fastgpt.generate
        try:
            generate()
        except TypeError as error:
            print(error)
        assert callable(generate.main)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("generate() missing 4 required positional arguments")


def test_end_of_text_ends_it_and_begins_it() -> None:
    tokenizer = Tokenizer.train(["abc"], 258)
    model = GPT(GPTConfig(258, 8, 1, 1, 8, tie_weights=False))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[257] = 1.0  # always <|endoftext|>
    ((written,),) = generate_texts(model, tokenizer, [""], 9, temperature=0)
    assert (written.text, written.completion.ids, written.completion.finish) == ("", [], "stop")
    assert list(stream_text(model, tokenizer, "abc", 9, temperature=0)) == []


def test_unknown_characters_and_invalid_stops_are_rejected(model: GPT) -> None:
    with pytest.raises(ValueError, match="character 'x'"):
        generate_texts(model, CHARS, ["ax"], 3)
    assert generate_texts(model, CHARS, ["ax"], 3, errors="ignore")[0][0].prompt == "ax"
    for prompt in ("ab", b"ab"):
        with pytest.raises(TypeError, match=r"prompts must be a list of texts: pass \[prompt\]"):
            generate_texts(model, CHARS, prompt, 3)
    with pytest.raises(TypeError, match="n must be an integer"):
        generate_texts(model, CHARS, ["ab"], 3, n=1.5)
    for stop in ([""], "ab"):
        with pytest.raises(ValueError, match="stop must be a list of non-empty strings"):
            stream_text(model, CHARS, "a", 3, stop=stop)
