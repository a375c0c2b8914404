"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): choose the ending of a text among four.

The questions are those of ``hellaswag_val.jsonl`` (https://github.com/rowanz/hellaswag, folder
``data``) or of the tables on the Hugging Face Hub (``Rowan/hellaswag``). Prompts are those of
EleutherAI's lm-evaluation-harness (task ``hellaswag``, version 1.0), so that the metrics are
comparable: the activity label precedes the context, artifacts of WikiHow pages are removed, and a
space precedes each scored ending. ``acc`` chooses the ending with the highest log-likelihood,
``acc_norm`` the one with the highest log-likelihood per character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.evaluation.log_likelihood import LogLikelihood
from fastgpt.evaluation.task_files import read_items, standard_error, text_of
from fastgpt.utils.errors import UsageError

_BRACKETS = re.compile(r"\[.*?\]")


@dataclass(frozen=True)
class Question:
    """A context, the endings to choose from, and the index of the correct one."""

    context: str
    endings: tuple[str, ...]
    label: int


def read(path: Path, limit: int | None = None) -> list[Question]:
    """Read all questions of a file, or the first `limit`.

    Raises: UsageError with the file and the line of an invalid question.
    """
    return [_question(place, item) for place, item in read_items(path, limit)]


def pairs(question: Question) -> list[tuple[str, str]]:
    """Return the pairs of context and ending to be scored."""
    return [(question.context, f" {ending}") for ending in question.endings]


def compute_metrics(
    questions: Sequence[Question], found: Iterator[LogLikelihood]
) -> dict[str, float]:
    """Return ``acc`` and ``acc_norm``, fractions of 1, each with its standard error.

    found: the log-likelihoods of the `pairs` of all questions, in order.
    """
    right, right_norm = [], []
    for question in questions:
        totals = np.array([next(found).total for _ in question.endings])
        lengths = np.array([len(ending) for ending in question.endings])
        right.append(int(totals.argmax()) == question.label)
        right_norm.append(int((totals / lengths).argmax()) == question.label)
    return {
        "acc": float(np.mean(right)),
        "acc_stderr": standard_error(right),
        "acc_norm": float(np.mean(right_norm)),
        "acc_norm_stderr": standard_error(right_norm),
    }


def _question(place: str, item: Any) -> Question:
    first, second = text_of(item, "ctx_a", place), text_of(item, "ctx_b", place)
    context = f"{text_of(item, 'activity_label', place)}: {first} {second.capitalize()}"
    endings = item.get("endings")
    texts = isinstance(endings, list) and all(isinstance(ending, str) for ending in endings)
    if not texts or not endings:
        raise UsageError(f"{place}: 'endings' must be a list of texts, not {endings!r:.40}")
    cleaned = tuple(map(_clean, endings))
    if not all(cleaned):
        raise UsageError(f"{place}: an ending has only white space and text in brackets")
    return Question(_clean(context), cleaned, _label(place, item.get("label"), len(endings)))


def _label(place: str, label: Any, n_endings: int) -> int:
    """Return the index of the correct ending; the tables of the Hub store it as a string."""
    if label in (None, ""):
        raise UsageError(
            f"{place}: has no label; use the validation part, as test labels are not published"
        )
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < n_endings:
        raise UsageError(f"{place}: label {label!r:.40} is not in 0 to {n_endings - 1}")
    return label


def _clean(text: str) -> str:
    """Remove artifacts of WikiHow pages, in the same order as the harness."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
