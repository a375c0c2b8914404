"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings a text goes on with.

The questions are those of ``hellaswag_val.jsonl`` (https://github.com/rowanz/hellaswag, folder
``data``) or of the tables on the Hugging Face hub (``Rowan/hellaswag``). They are asked as
EleutherAI's lm-evaluation-harness asks them (task ``hellaswag``, version 1.0), so that the figures
are the same: the activity's name stands before the context, artefacts of WikiHow's pages are taken
out, and an ending is scored behind a space. ``acc`` chooses the likeliest ending, ``acc_norm`` the
one that is likeliest per character.
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
    """A text, the endings to choose from, and the number of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


def read(path: Path, limit: int | None = None) -> list[Question]:
    """Read a file's questions, or the first ones; UsageError that names file and line."""
    return [_question(place, item) for place, item in read_items(path, limit)]


def pairs(question: Question) -> list[tuple[str, str]]:
    """Return the context with each ending, to be scored."""
    return [(question.context, f" {ending}") for ending in question.endings]


def figures(questions: Sequence[Question], found: Iterator[LogLikelihood]) -> dict[str, float]:
    """Return ``acc`` and ``acc_norm``, fractions of 1, each with its standard error.

    found: what `pairs` of the questions, one after the other, came to.
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
        raise UsageError(f"{place}: an ending is empty but for white space and brackets")
    return Question(_clean(context), cleaned, _label(place, item.get("label"), len(endings)))


def _label(place: str, label: Any, n_endings: int) -> int:
    """Return the number of the right ending; the hub's tables hold it as a text."""
    if label in (None, ""):
        raise UsageError(f"{place}: has no label; give the validation part: the test's is secret")
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < n_endings:
        raise UsageError(f"{place}: label {label!r:.40} is not one from 0 to {n_endings - 1}")
    return label


def _clean(text: str) -> str:
    """Take out what WikiHow's pages left behind, in the order in which the harness does."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
