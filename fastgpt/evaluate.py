"""`python -m fastgpt.evaluate RUN --data my.txt`: measure a model on a text or on a task.

The Python interface is `fastgpt.evaluation`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

if TYPE_CHECKING:
    from fastgpt.evaluation.texts import ScoredText
    from fastgpt.interop.run import Run
    from fastgpt.model import GPT
    from fastgpt.tokenizer import BaseTokenizer
    from fastgpt.utils.precision import Precision

Evaluation: TypeAlias = "tuple[str, Precision, dict[str, Any]]"
TRIAL_TOKENS = 2048  # size of the trial that finds the fastest precision


@dataclass(frozen=True)
class Options:
    """Measure a model: its loss on a text, or its accuracy on the questions of a task."""

    model: Annotated[str, tyro.conf.Positional]
    """A run folder (runs/latest is the newest), another project's folder or file, or a model name
    on the Hugging Face Hub."""
    data: str | None = None
    """Data to evaluate on: a file of text, JSON or parquet (compressed or not), "-" (stdin), a
    folder of tokens (its validation part), "shakespeare" (its last tenth), or the questions of
    the task. By default, the validation part of the data that a run was trained on."""
    task: Literal["text", "hellaswag", "lambada"] = "text"
    """text: loss, perplexity and bits per byte; hellaswag: hellaswag_val.jsonl; lambada:
    lambada_test.jsonl or one passage per line."""
    part: Literal["train", "val"] | None = None
    """Part of a folder or a packaged text to use; of a file, the first nine tenths of the text
    (train) or the last tenth (val) instead of the whole file."""
    context: int | None = None
    """Tokens per window; by default the model's context."""
    stride: int | None = None
    """Tokens by which the window moves. Each token after the first window is scored with at least
    context - stride tokens before it; by default half the context."""
    batch_size: int = 8
    """Windows, or answers to questions, per batch."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of matrix products; auto: the one that training would choose on this device."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1, mps."""
    max_tokens: int | None = None
    """Score only the first tokens of the text, this many."""
    limit: int | None = None
    """Evaluate only the first questions of the task, this many."""
    skip_unknown: bool = False
    """Drop characters that the tokenizer does not have, instead of raising an error."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(args: Sequence[str]) -> None:
    """Evaluate the model and print the results."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.evaluate")
    _check_option_combinations(options)
    results = evaluate(options)
    print(json.dumps(_finite(results)) if options.json else describe(results))


def evaluate(options: Options) -> dict[str, Any]:
    """Evaluate a model according to the options; return the metrics by name.

    Raises: UsageError for errors in the user's arguments or files.
    """
    from fastgpt import interop  # loads torch: imported after the arguments have been checked
    from fastgpt.utils.device import find_device

    device = find_device(options.device)
    model, tokenizer = interop.load(options.model, device)
    run_evaluation = _evaluate_text if options.task == "text" else _evaluate_task
    try:
        data, precision, metrics = run_evaluation(options, model, tokenizer)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return {
        "task": options.task,
        "model": options.model,
        "data": data,
        **metrics,
        "batch_size": options.batch_size,
        "dtype": precision.name,
        "device": str(precision.device),
    }


def describe(results: dict[str, Any]) -> str:
    """Return the metrics of `evaluate` as text."""
    head = f"{results['model']} on {results['data']}"
    where = f"{results['dtype']} on {results['device']}"
    if results["task"] != "text":
        names = [name for name in results if name.startswith(("acc", "perplexity"))]
        rows = [f"{name:<16}{results[name]:.4f}" for name in names]
        seconds = f"{results['questions']:,} questions in {results['seconds']:.1f} s ({where})"
        return "\n".join([f"{results['task']}: {head}", *rows, seconds])
    context, stride = results["context"], results["stride"]
    overlap = f"; training measures without overlap: --stride {context}" if stride < context else ""
    return "\n".join(
        [
            head,
            f"loss            {results['loss']:.4f} nats per token",
            f"perplexity      {results['perplexity']:,.2f}",
            f"bits per byte   {results['bits_per_byte']:.4f}",
            f"scored          {results['tokens']:,} tokens, {results['bytes']:,} bytes of text",
            f"window          context {context:,}, stride {stride:,}{overlap}",
            f"speed           {results['tokens_per_s']:,.0f} tokens/s ({where})",
        ]
    )


# --- helpers ---------------------------------------------------------------------------------


def _check_option_combinations(options: Options) -> None:
    """Raise UsageError for options that do not apply to the task or contradict each other."""
    names = ("limit",) if options.task == "text" else ("part", "context", "stride", "max_tokens")
    for name in names:
        if getattr(options, name) is not None:
            what = "questions" if name == "limit" else "texts"
            raise UsageError(
                f"--{name.replace('_', '-')} is for {what}, not for --task {options.task}"
            )
    if options.task != "text" and options.data is None:
        raise UsageError(f"--task {options.task} needs its questions: --data FILE")
    if options.batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {options.batch_size}")


def _evaluate_text(options: Options, model: GPT, tokenizer: BaseTokenizer) -> Evaluation:
    """Return the name of the text, the precision used, and the metrics."""
    from fastgpt.evaluation.log_likelihood import check_window
    from fastgpt.utils.progress import CountProgress

    text = _load_text(options, tokenizer)
    context, stride = check_window(model, options.context, options.stride)
    precision = _precision(options, model)
    with precision.autocast(), CountProgress("tokens", text.n_scored) as bar:
        window = {"context": context, "stride": stride, "batch_size": options.batch_size}
        scores = text.score(model, **window, advance=bar.advance)
    metrics = {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "tokens": scores.n_tokens,
        "bytes": scores.n_bytes,
        "context": context,
        "stride": stride,
        "tokens_per_s": scores.tokens_per_s,
        "seconds": scores.seconds,
    }
    return text.name, precision, metrics


def _load_text(options: Options, tokenizer: BaseTokenizer) -> ScoredText:
    """Return the text named by the options, or the validation part of the run's data."""
    from fastgpt.evaluation.texts import load_text
    from fastgpt.interop import run

    if options.data is not None:
        return load_text(
            options.data,
            tokenizer,
            options.part,
            skip_unknown=options.skip_unknown,
            max_tokens=options.max_tokens,
        )
    path = Path(options.model)
    if not run.recognizes(path):
        raise UsageError(f"{path} is not a run folder, so it has no default text: give --data")
    return _load_run_text(run.read(path), tokenizer, options)


def _load_run_text(run: Run, tokenizer: BaseTokenizer, options: Options) -> ScoredText:
    """Return the validation part of a run's data, or the part that the options name.

    Raises: UsageError if the data no longer exists or has changed.
    """
    from fastgpt.data.corpus import load_corpus
    from fastgpt.evaluation.texts import part_of
    from fastgpt.training.run_folder import find_data, read_run

    _, recipe = read_run(run.path)
    files = find_data(run.path, recipe)
    data, val_data = files["data"], files["val_data"]
    if not data:
        raise UsageError(f"{run.path} does not record its training data; name a text with --data")
    sha256 = run.checkpoint.data_sha256
    corpus = load_corpus(data, tokenizer, recipe.val_fraction, sha256, val_data=val_data)
    name = val_data if val_data and options.part != "train" else data
    text = part_of(corpus.train, corpus.val, options.part, tokenizer, name)
    return text.cut(options.max_tokens)


def _evaluate_task(options: Options, model: GPT, tokenizer: BaseTokenizer) -> Evaluation:
    """Return the name of the questions' file, the precision used, and the metrics."""
    from fastgpt.evaluation.tasks import TASKS, evaluate_task

    path = Path(options.data or "")
    questions = TASKS[options.task].read(path, options.limit)
    precision, began = _precision(options, model), time.perf_counter()
    with precision.autocast():
        metrics = evaluate_task(
            options.task,
            questions,
            model,
            tokenizer,
            batch_size=options.batch_size,
            skip_unknown=options.skip_unknown,
            progress=True,
        )
    seconds = time.perf_counter() - began
    return str(path), precision, {**metrics, "questions": len(questions), "seconds": seconds}


def _precision(options: Options, model: GPT) -> Precision:
    """Return the requested precision; for "auto" with several candidates, time a trial of each."""
    from fastgpt.evaluation.log_likelihood import perplexity
    from fastgpt.utils.precision import choose_precision, fastest

    size = model.config.block_size
    tokens = [0] * max(2, size * max(1, TRIAL_TOKENS // size))

    def trial(precision: Precision) -> None:
        with precision.autocast():
            perplexity(model, tokens, stride=size)

    return fastest(choose_precision(options.dtype, model.device), trial)


def _finite(results: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities by None, as JSON cannot represent them."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in results.items()
    }


if __name__ == "__main__":
    cli.run(main)
