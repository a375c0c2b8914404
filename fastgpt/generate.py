"""`python -m fastgpt.generate RUN --prompt "..."`: generate text with a model.

The module can be called, too: `fastgpt.generate(...)` is `fastgpt.inference.text.generate`.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

if TYPE_CHECKING:
    from fastgpt.inference.engine import Engine
    from fastgpt.inference.text import GeneratedText
    from fastgpt.model import GPT
    from fastgpt.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Options:
    """Generate text with a trained model; a single text is printed while it is generated."""

    run: Annotated[str, tyro.conf.Positional]
    """A run folder of fastgpt.train (runs/latest is the newest one), another project's model, or a
    model name on the Hugging Face Hub."""
    prompt: tuple[str, ...] = ()
    """One or more texts to continue; by default, an empty prompt."""
    prompts: str | None = None
    """File with one prompt per line, or - for standard input."""
    max_new_tokens: int = 500
    """Maximum number of tokens to generate."""
    n: int = 1
    """Number of texts to generate for each prompt."""
    temperature: float = 0.8
    """Sampling temperature: below 1 is more conservative, above 1 more diverse; 0 always takes the
    most likely token."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens that holds this much probability."""
    min_p: float | None = None
    """Sample from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Above 1: penalize tokens that occur in the prompt or were generated."""
    presence_penalty: float = 0.0
    """Above 0: penalize tokens that were generated."""
    frequency_penalty: float = 0.0
    """Above 0: penalize tokens in proportion to how often they were generated."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are not part of it."""
    seed: int | None = None
    """Random seed; the same seed generates the same text."""
    skip_unknown: bool = False
    """Drop characters of the prompt that the tokenizer does not have, instead of raising an
    error."""
    json: bool = False
    """Print one JSON object per line for each text: prompt, text, finish, tokens, logprob."""
    batch_size: int = 8
    """Number of prompts per batch."""
    checkpoint: Literal["best", "newest"] = "best"
    """The checkpoint of the run to use."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1, mps."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """native: this package's CPU engine; torch: PyTorch; auto: native on a CPU, else torch."""
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Dtype of the weights; fewer bits are faster but less accurate. int8 and int4 need the native
    engine."""
    threads: int | None = None
    """Number of threads of the native engine; by default as many as PyTorch uses."""


def main(args: Sequence[str]) -> None:
    """Print each prompt with its continuation, and finally the speed."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.generate")
    _choose_encoding()
    prompts = read_prompts(options)
    try:
        model, tokenizer = _load(options)
        if options.skip_unknown:
            prompts = [tokenizer.decode(tokenizer.encode(p, errors="ignore")) for p in prompts]
        if len(prompts) == options.n == 1 and not options.json:
            _print_stream(model, tokenizer, prompts[0], options)
        else:
            _print_batches(model, tokenizer, prompts, options)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read_prompts(options: Options) -> list[str]:
    """Return the prompts of the command line and of the file; without any, one empty prompt."""
    if options.batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {options.batch_size}")
    prompts = list(options.prompt)
    if options.prompts is not None:
        prompts += _lines(options.prompts)
        if not prompts:
            raise UsageError(f"{options.prompts} contains no prompts")
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


def _choose_encoding() -> None:
    """Write UTF-8 to a file or pipe, whose default encoding may lack characters (on Windows).

    A terminal keeps its encoding, and PYTHONIOENCODING chooses another one, as usual.
    """
    stdout, is_chosen = sys.stdout, "PYTHONIOENCODING" in os.environ
    if isinstance(stdout, io.TextIOWrapper) and not stdout.isatty() and not is_chosen:
        stdout.reconfigure(encoding="utf-8")


def _load(options: Options) -> tuple[GPT | Engine, BaseTokenizer]:
    """Load the model or engine and the tokenizer.

    torch is imported here, after the other arguments have been checked.
    """
    import torch

    from fastgpt.inference.engine import Engine
    from fastgpt.interop import load
    from fastgpt.utils.device import find_device

    device = find_device(options.device)
    native = options.engine == "native" or (options.engine == "auto" and device.type == "cpu")
    if not native and options.dtype in ("int8", "int4"):
        raise UsageError(f"dtype {options.dtype} requires --engine native, on a CPU")
    if not native and options.threads is not None:
        raise UsageError("threads is for --engine native; for PyTorch, set OMP_NUM_THREADS")
    if native and options.device != "auto" and device.type != "cpu":
        raise UsageError(f"engine native runs on a CPU only: remove --device {options.device}")
    if native:
        return Engine.from_pretrained(
            options.run, options.dtype, options.threads, checkpoint=options.checkpoint
        )
    model, tokenizer = load(options.run, device, checkpoint=options.checkpoint)
    return model.to(getattr(torch, options.dtype)), tokenizer


def _print_stream(
    model: GPT | Engine, tokenizer: BaseTokenizer, prompt: str, options: Options
) -> None:
    """Print one text while it is generated."""
    from fastgpt.inference.text import stream_text

    began = time.perf_counter()
    text = stream_text(
        model, tokenizer, prompt, options.max_new_tokens, seed=options.seed, **_settings(options)
    )
    print(prompt, end="", flush=True)
    n_lost = _count_lost(prompt)
    for piece in text:
        print(piece, end="", flush=True)
        n_lost += _count_lost(piece)
    print()
    _print_summary(text.n_tokens, time.perf_counter() - began, n_lost)


def _print_batches(
    model: GPT | Engine, tokenizer: BaseTokenizer, prompts: list[str], options: Options
) -> None:
    """Generate and print all texts, one batch of prompts at a time."""
    from fastgpt.inference.text import generate_texts

    began, n_tokens, n_lost = time.perf_counter(), 0, 0
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        seed = None if options.seed is None else options.seed + first * options.n
        settings: dict[str, Any] = {"n": options.n, "seed": seed, **_settings(options)}
        found = generate_texts(model, tokenizer, batch, options.max_new_tokens, **settings)
        for row, text in enumerate(chain.from_iterable(found), first * options.n):
            line = _as_json(text) if options.json else _as_text(text, row, len(prompts), options.n)
            print(line, flush=True)
            n_tokens += len(text.completion.ids)
            n_lost += _count_lost(line)
    _print_summary(n_tokens, time.perf_counter() - began, n_lost)


def _settings(options: Options) -> dict[str, Any]:
    from fastgpt.inference.sampling import Sampling

    return {name: getattr(options, name) for name in (*Sampling.__annotations__, "stop")}


def _as_text(text: GeneratedText, row: int, n_prompts: int, n: int) -> str:
    """Return prompt and text, with a header if there are several texts of each prompt."""
    prompt, sample = divmod(row, n)
    of_prompt = f"prompt {prompt + 1} of {n_prompts}, " if n_prompts > 1 else ""
    header = f"=== {of_prompt}sample {sample + 1} of {n} ===\n" if n > 1 else ""
    return f"{header}{text.prompt}{text.text}\n"


def _as_json(text: GeneratedText) -> str:
    """Return a text as JSON; characters that standard output lacks make it ASCII, with escapes."""
    completion = text.completion
    content = {
        "prompt": text.prompt,
        "text": text.text,
        "finish": completion.finish,
        "tokens": len(completion.ids),
        "logprob": sum(completion.logprobs),
    }
    line = json.dumps(content, ensure_ascii=False)
    return json.dumps(content) if _count_lost(line) else line


def _count_lost(text: str) -> int:
    """Return the number of characters that standard output lacks, and prints as question marks."""
    return 0 if _can_print(text) else sum(not _can_print(character) for character in text)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _print_summary(n_tokens: int, seconds: float, n_lost: int) -> None:
    """Print speed and lost characters to standard error; standard output has the texts only."""
    print(f"{n_tokens:,} tokens, {n_tokens / max(seconds, 1e-9):,.1f} tokens/s", file=sys.stderr)
    if n_lost:
        print(
            f"warning: {n_lost:,} characters are printed as ?, because standard output is in "
            f"{sys.stdout.encoding}: use --json, or set PYTHONIOENCODING=utf-8",
            file=sys.stderr,
        )


class _CallableModule(ModuleType):
    """The type of this module, which makes it a function.

    The package cannot have a function of this name instead: importing the module, which the command
    line does, would replace it.
    """

    def __call__(self, *args: Any, **settings: Any) -> str:
        from fastgpt.inference.text import generate

        return generate(*args, **settings)


if __name__ == "__main__":
    cli.run(main)
else:
    sys.modules[__name__].__class__ = _CallableModule
