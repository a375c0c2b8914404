"""Tasks: questions that a model answers by how likely it finds a text to go on in this way or that.

Each has a module that reads its questions, defines what is scored for each, and computes metrics
from the scores: `fastgpt.evaluation.hellaswag` and `fastgpt.evaluation.lambada`. Prompts and
metrics are those of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fastgpt.evaluation import hellaswag, lambada
from fastgpt.evaluation.log_likelihood import LogLikelihood, log_likelihoods
from fastgpt.model import GPT
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils.progress import CountProgress


class Task(Protocol):
    """What a task's module has."""

    def read(self, path: Path, limit: int | None = None) -> list[Any]:
        """Return a file's questions, or the first ones; UsageError that names file and line."""

    def pairs(self, question: Any) -> list[tuple[str, str]]:
        """Return what is to be scored for a question: contexts and their continuations."""

    def figures(self, questions: Sequence[Any], found: Iterator[LogLikelihood]) -> dict[str, float]:
        """Return the figures by name; `found` is what the pairs came to, in order."""


TASKS: dict[str, Task] = {"hellaswag": hellaswag, "lambada": lambada}


def ask(
    name: str,
    questions: Sequence[Any],
    model: GPT,
    tokenizer: BaseTokenizer,
    *,
    batch_size: int = 8,
    skip_unknown: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Ask the questions that a task's `read` returned; return the task's figures.

    batch_size: answers scored at once; skip_unknown: leave out characters that the tokenizer does
    not have, instead of refusing; progress: show a bar on a terminal.

    Raises: ValueError for such a character, or an answer that has no others.
    """
    task = TASKS[name]
    errors: Literal["ignore", "strict"] = "ignore" if skip_unknown else "strict"
    encoded = [
        encode_pair(tokenizer, *pair, errors=errors)
        for question in questions
        for pair in task.pairs(question)
    ]
    with CountProgress("answers", len(encoded), progress) as bar:
        found = log_likelihoods(model, encoded, batch_size=batch_size, advance=bar.advance)
    return task.figures(questions, iter(found))


def encode_pair(
    tokenizer: BaseTokenizer,
    context: str,
    continuation: str,
    errors: Literal["strict", "ignore"] = "strict",
) -> tuple[list[int], list[int]]:
    """Return the ids of a context, and those that its continuation adds to it.

    The two are encoded together, and parted where the context's own ids end. So white space
    between them begins the continuation, as in the words of a text, wherever the caller put it (as
    in lm-evaluation-harness). Without a context, the tokenizer's start token is one.

    Raises: ValueError for characters that the tokenizer does not have.
    """
    before = context.rstrip()
    continuation = context[len(before) :] + continuation
    ids = tokenizer.encode(before, errors=errors)
    rest = tokenizer.encode(before + continuation, errors=errors)[len(ids) :]
    return ids or [tokenizer.start_token], rest
