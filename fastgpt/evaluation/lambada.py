"""LAMBADA (Paperno et al. 2016, arXiv:1606.06031): the last word of a passage.

A person finds the word from the whole passage, not from its last sentence alone. The passages are
those of ``lambada_test.jsonl``, OpenAI's (``{"text": ...}`` a line; the hub's
``EleutherAI/lambada_openai``), or the authors' plain text, a passage a line. They are scored as
EleutherAI's lm-evaluation-harness does (tasks ``lambada_openai`` and ``lambada_standard``, version
1.0), so that the figures are the same: the word is what follows the last space, and is scored with
that space. ``acc`` is how often the greedy choice makes the whole word, ``perplexity`` is
per word: `exp` of the mean of -ln p(word).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgpt.evaluation.log_likelihood import LogLikelihood
from fastgpt.evaluation.task_files import read_items, read_lines, standard_error, text_of
from fastgpt.utils.errors import UsageError


class Passage(NamedTuple):
    """A text without its last word, and that."""

    context: str
    word: str


def read(path: Path, limit: int | None = None) -> list[Passage]:
    """Read a file's passages, or the first ones; UsageError that names file and line."""
    if path.name.removesuffix(".gz").endswith(".txt"):
        return [_passage(place, line) for place, line in read_lines(path, limit)]
    items = read_items(path, limit)
    return [_passage(place, text_of(item, "text", place)) for place, item in items]


def pairs(passage: Passage) -> list[tuple[str, str]]:
    """Return the context with its last word, to be scored."""
    return [(passage.context, f" {passage.word}")]


def figures(passages: Sequence[Passage], found: Iterator[LogLikelihood]) -> dict[str, float]:
    """Return ``acc``, a fraction of 1, with its standard error, and ``perplexity``.

    found: what `pairs` of the passages, one after the other, came to.
    """
    answers = [next(found) for _ in passages]
    loss = -float(np.mean([answer.total for answer in answers]))
    right = [answer.greedy for answer in answers]
    return {
        "acc": float(np.mean(right)),
        "acc_stderr": standard_error(right),
        "perplexity": math.exp(loss) if loss < 709 else math.inf,
    }


def _passage(place: str, text: str) -> Passage:
    context, space, word = text.rpartition(" ")
    if not space or not context.strip() or not word:
        raise UsageError(f"{place}: {text!r:.40} does not end in a space and a word after a text")
    return Passage(context, word)
