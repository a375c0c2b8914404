"""`python -m fastgpt.generate RUN --prompt "..."`: write text with a model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

if TYPE_CHECKING:
    from fastgpt.inference.engine import Engine
    from fastgpt.inference.text import Written
    from fastgpt.model import GPT
    from fastgpt.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Options:
    """Write text with a trained model, printing it as it comes."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder that fastgpt.train made (runs/latest is the newest one), another project's model,
    or a name on the Hugging Face hub."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, one or several; none: start from nothing."""
    prompts: str | None = None
    """File with a prompt in each line, or - for standard input."""
    max_new_tokens: int = 500
    """Tokens to write."""
    n: int = 1
    """Texts to write for each prompt."""
    temperature: float = 0.8
    """Below 1 plays safe, above 1 takes risks; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together hold this much probability."""
    min_p: float | None = None
    """Choose among the tokens that are at least this share as likely as the likeliest one."""
    repetition_penalty: float = 1.0
    """Above 1: avoid tokens that stand in the prompt or were written."""
    presence_penalty: float = 0.0
    """Above 0: avoid tokens that were written."""
    frequency_penalty: float = 0.0
    """Above 0: avoid tokens the more, the more often they were written."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, which ends before them."""
    seed: int | None = None
    """The same seed writes the same text."""
    skip_unknown: bool = False
    """Leave out characters of the prompt that the model has never seen, instead of refusing."""
    json: bool = False
    """Print a line of JSON for each text: prompt, text, finish, tokens, logprob."""
    batch_size: int = 8
    """Prompts that are continued together."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint of the run to use."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """What computes: this package's loop for CPUs (native), or PyTorch; auto: native on a CPU."""
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Of the weights: fewer bits are faster, and less exact. int8, int4: native engine alone."""
    threads: int | None = None
    """How many the native engine takes; by default as many as PyTorch."""


def main(args: Sequence[str]) -> None:
    """Print each prompt with its continuation, and at the end how fast it was."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.generate")
    prompts = read_prompts(options)
    try:
        model, tokenizer = _load(options)
        if options.skip_unknown:
            prompts = [tokenizer.decode(tokenizer.encode(p, errors="ignore")) for p in prompts]
        if len(prompts) == options.n == 1 and not options.json:
            _stream(model, tokenizer, prompts[0], options)
        else:
            _write(model, tokenizer, prompts, options)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read_prompts(options: Options) -> list[str]:
    """Return the prompts of the command line and those of a file, or an empty one."""
    if options.batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {options.batch_size}")
    prompts = list(options.prompt)
    if options.prompts is not None:
        prompts += _lines(options.prompts)
        if not prompts:
            raise UsageError(f"{options.prompts} holds no prompt")
    return prompts or [""]


def _lines(source: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
        return lines.split("\n") if lines else []
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8: byte {error.start}") from None


def _load(options: Options) -> tuple[GPT | Engine, BaseTokenizer]:
    """Load the model; torch is imported here, after every mistake in the arguments was answered."""
    import torch

    from fastgpt.inference.engine import Engine
    from fastgpt.interop import load
    from fastgpt.utils.device import find_device

    device = find_device(options.device)
    native = options.engine == "native" or (options.engine == "auto" and device.type == "cpu")
    if not native and options.dtype in ("int8", "int4"):
        raise UsageError(f"dtype {options.dtype} is for --engine native, on a CPU")
    if not native and options.threads is not None:
        raise UsageError("threads is for --engine native; PyTorch takes OMP_NUM_THREADS")
    if native and options.device != "auto" and device.type != "cpu":
        raise UsageError(f"engine native computes on a CPU: leave out device {options.device}")
    if native:
        return Engine.from_pretrained(
            options.run, options.dtype, options.threads, checkpoint=options.checkpoint
        )
    model, tokenizer = load(options.run, device, checkpoint=options.checkpoint)
    return model.to(getattr(torch, options.dtype)), tokenizer


def _stream(model: GPT | Engine, tokenizer: BaseTokenizer, prompt: str, options: Options) -> None:
    """Print one text as it comes."""
    from fastgpt.inference.text import stream_text

    began = time.perf_counter()
    text = stream_text(
        model, tokenizer, prompt, options.max_new_tokens, seed=options.seed, **_settings(options)
    )
    print(prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print()
    _tell_speed(text.n_tokens, time.perf_counter() - began)


def _write(
    model: GPT | Engine, tokenizer: BaseTokenizer, prompts: list[str], options: Options
) -> None:
    """Print all texts, a batch of prompts at a time."""
    from fastgpt.inference.text import write

    began, n_tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        seed = None if options.seed is None else options.seed + first * options.n
        settings: dict[str, Any] = {"n": options.n, "seed": seed, **_settings(options)}
        for texts in write(model, tokenizer, batch, options.max_new_tokens, **settings):
            for text in texts:
                n_tokens += len(text.completion.ids)
                print(_as_json(text) if options.json else f"{text.prompt}{text.text}\n", flush=True)
    _tell_speed(n_tokens, time.perf_counter() - began)


def _settings(options: Options) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    settings = {name: getattr(options, name) for name in names + penalties}
    return {**settings, "stop": options.stop}


def _as_json(written: Written) -> str:
    completion = written.completion
    return json.dumps(
        {
            "prompt": written.prompt,
            "text": written.text,
            "finish": completion.finish,
            "tokens": len(completion.ids),
            "logprob": sum(completion.logprobs),
        },
        ensure_ascii=False,
    )


def _tell_speed(n_tokens: int, seconds: float) -> None:
    """Say on standard error, where it is in no one's way, how fast it was."""
    print(f"{n_tokens:,} tokens, {n_tokens / max(seconds, 1e-9):,.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
