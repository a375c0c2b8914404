"""Text generation with a model and its tokenizer: `generate`, `generate_texts`, `stream_text`.

An empty prompt starts from the tokenizer's `start_token`: `<|endoftext|>`, if it has one. If the
model generates `<|endoftext|>`, the text ends before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import torch

from fastgpt.inference.engine import Engine
from fastgpt.inference.generation import Completion, complete, copy_to_host, stream
from fastgpt.inference.sampling import Sampling, as_integer
from fastgpt.model import GPT
from fastgpt.tokenizer import BaseTokenizer, StreamDecoder


@dataclass(frozen=True)
class GeneratedText:
    """The generated continuation of a prompt.

    text: the continuation without the prompt. completion: its tokens, which include those of a stop
    string that ended it.
    """

    prompt: str
    text: str
    completion: Completion


class TextSettings(Sampling, total=False):
    """The keyword arguments of `generate`, which are those of `stream_text`."""

    stop: Sequence[str]
    seed: int | None
    errors: Literal["strict", "ignore"]


def generate(
    model: GPT | Engine,
    tokenizer: BaseTokenizer,
    prompt: str,
    max_new_tokens: int,
    **settings: Unpack[TextSettings],
) -> str:
    """Return the continuation of a prompt, without the prompt; also called `fastgpt.generate`.

    settings: `stop`, `seed`, `errors` and the sampling settings, as for `generate_texts`.

    Raises: ValueError for invalid arguments.
    """
    return "".join(stream_text(model, tokenizer, prompt, max_new_tokens, **settings))


def generate_texts(
    model: GPT | Engine,
    tokenizer: BaseTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    n: int = 1,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] | None = None,
    errors: Literal["strict", "ignore"] = "strict",
    **sampling: Unpack[Sampling],
) -> list[list[GeneratedText]]:
    """Continue a batch of prompts; return n texts for each.

    stop: strings that end a text; they are not part of it. errors: "ignore" drops characters of a
    prompt that the tokenizer does not have. The other arguments are those of
    `fastgpt.inference.generation.complete`.

    Raises: ValueError for invalid arguments.
    """
    if isinstance(prompts, str | bytes):
        raise TypeError("prompts must be a list of texts: pass [prompt]")
    n = as_integer("n", n)
    ids = [_encode(tokenizer, prompt, errors) for prompt in prompts]
    texts = [_Text(tokenizer, stop) for _ in range(len(ids) * n)]
    completions = complete(
        model,
        ids,
        max_new_tokens,
        n=n,
        seed=seed,
        stop_tokens=_end(tokenizer),
        stop=lambda row, token: texts[row].push(token),
        **sampling,
    )
    found = (text.finish() for text in texts)
    return [
        [GeneratedText(prompt, next(found), completion) for completion in of_prompt]
        for prompt, of_prompt in zip(prompts, completions, strict=True)
    ]


def stream_text(
    model: GPT | Engine,
    tokenizer: BaseTokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    seed: int | None = None,
    errors: Literal["strict", "ignore"] = "strict",
    **sampling: Unpack[Sampling],
) -> "TextStream":
    """Return an iterator over the continuation of a prompt while it is generated.

    prompt: a text (str, or UTF-8 bytes) or its token ids. The other arguments are those of
    `generate_texts`. Invalid arguments raise ValueError immediately, not when iteration starts.
    """
    text = _Text(tokenizer, stop)
    # on the model's device, so that `copy_to_host` copies the tokens asynchronously
    ids = torch.tensor([_encode(tokenizer, prompt, errors)], device=model.device)
    steps = copy_to_host(stream(model, ids, max_new_tokens, seed=seed, **sampling))
    return TextStream(text, (token for _, (token,) in steps), _end(tokenizer))


class TextStream:
    """An iterator over pieces of a text during generation; `n_tokens` counts the tokens so far.

    Pieces consist of whole characters. Text that may be the beginning of a stop string is held back
    until this is decided.
    """

    def __init__(self, text: "_Text", tokens: Iterator[int], end: Sequence[int]) -> None:
        self.n_tokens = 0
        self._pieces = self._run(text, tokens, end)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self, text: "_Text", tokens: Iterator[int], end: Sequence[int]) -> Iterator[str]:
        for token in tokens:
            self.n_tokens += 1
            if token in end or text.push(token):
                break
            if piece := text.released():
                yield piece
        text.finish()
        if piece := text.released():
            yield piece


class _Text:
    """Incremental decoding of a text, with a search for stop strings."""

    def __init__(self, tokenizer: BaseTokenizer, stop: Sequence[str]) -> None:
        if "" in stop or isinstance(stop, str):
            raise ValueError(f"stop must be a list of non-empty strings, not {stop!r}")
        self._decoder = StreamDecoder(tokenizer)
        self._stop, self._longest = stop, max(map(len, stop), default=1)
        self._text, self._given, self._stopped = "", 0, False

    def push(self, token: int) -> bool:
        """Append a token; return whether a stop string has ended the text."""
        return self._add(self._decoder.push(token))

    def finish(self) -> str:
        """Return the whole text, with U+FFFD for an incomplete last character."""
        if not self._stopped:
            self._add(self._decoder.finish())
            self._stopped = True
        return self._text

    def released(self) -> str:
        """Return new text that can no longer be part of a stop string."""
        end = len(self._text)
        if not self._stopped:
            end = next((at for at in self._tail() if self._may_become_stop(at)), end)
        piece, self._given = self._text[self._given : end], end
        return piece

    def _add(self, piece: str) -> bool:
        # a new match can begin at most `longest - 1` characters before the new piece
        searched = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        if found and not self._stopped:
            self._text, self._stopped = self._text[: min(found)], True
        return self._stopped

    def _tail(self) -> range:
        return range(max(self._given, len(self._text) - self._longest + 1), len(self._text))

    def _may_become_stop(self, at: int) -> bool:
        return any(stop.startswith(self._text[at:]) for stop in self._stop)


def _encode(
    tokenizer: BaseTokenizer, prompt: str | Sequence[int], errors: Literal["strict", "ignore"]
) -> list[int]:
    if isinstance(prompt, str | bytes):
        prompt = tokenizer.encode(prompt, errors=errors)
    return list(prompt) or [tokenizer.start_token]


def _end(tokenizer: BaseTokenizer) -> tuple[int, ...]:
    return () if tokenizer.eot_token is None else (tokenizer.eot_token,)
