"""Tasks: questions answered by comparing the log-likelihoods of continuations.

Each task has a module that reads its questions, defines the pairs to be scored for each, and
computes metrics from the scores: `fastgpt.evaluation.hellaswag` and `fastgpt.evaluation.lambada`.
Prompts and metrics are those of EleutherAI's lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness).
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
    """The interface of a task's module."""

    def read(self, path: Path, limit: int | None = None) -> list[Any]:
        """Return all questions of a file, or the first `limit`; UsageError if one is invalid."""

    def pairs(self, question: Any) -> list[tuple[str, str]]:
        """Return the pairs of context and continuation to be scored for a question."""

    def compute_metrics(
        self, questions: Sequence[Any], found: Iterator[LogLikelihood]
    ) -> dict[str, float]:
        """Return the metrics by name; `found` yields the scores of all pairs, in order."""


TASKS: dict[str, Task] = {"hellaswag": hellaswag, "lambada": lambada}


def evaluate_task(
    name: str,
    questions: Sequence[Any],
    model: GPT,
    tokenizer: BaseTokenizer,
    *,
    batch_size: int = 8,
    skip_unknown: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluate a model on the questions returned by a task's `read`; return the metrics.

    batch_size: continuations per batch; skip_unknown: drop characters that the tokenizer does not
    have, instead of raising; progress: show a progress bar on a terminal.

    Raises: ValueError for such a character, or for a continuation that is empty without them.
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
    return task.compute_metrics(questions, iter(found))


def encode_pair(
    tokenizer: BaseTokenizer,
    context: str,
    continuation: str,
    errors: Literal["strict", "ignore"] = "strict",
) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of its continuation.

    White space at the end of the context is moved to the beginning of the continuation, where
    tokens of running text have it. Both are then encoded together and split after the number of
    tokens that the context alone has (as in lm-evaluation-harness). An empty context is replaced by
    the tokenizer's start token.

    Raises: ValueError for characters that the tokenizer does not have, if `errors` is "strict".
    """
    before = context.rstrip()
    continuation = context[len(before) :] + continuation
    ids = tokenizer.encode(before, errors=errors)
    rest = tokenizer.encode(before + continuation, errors=errors)[len(ids) :]
    return ids or [tokenizer.start_token], rest
