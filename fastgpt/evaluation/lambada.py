"""LAMBADA (Paperno et al. 2016, arXiv:1606.06031): predict the last word of a passage.

People can guess the word from the whole passage, but not from its last sentence alone. The passages
are those of OpenAI's ``lambada_test.jsonl`` (one ``{"text": ...}`` per line;
``EleutherAI/lambada_openai`` on the Hugging Face Hub), or the authors' plain text with one passage
per line. Scoring follows EleutherAI's lm-evaluation-harness (tasks ``lambada_openai`` and
``lambada_standard``, version 1.0), so that the metrics are comparable: the word is everything after
the last space, and is scored together with that space. ``acc`` is the fraction of words that greedy
decoding generates completely. ``perplexity`` is per word: `exp` of the mean of -ln p(word).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgpt.data.documents import uncompressed_suffix
from fastgpt.evaluation.log_likelihood import LogLikelihood
from fastgpt.evaluation.task_files import read_items, read_lines, standard_error, text_of
from fastgpt.utils.errors import UsageError


class Passage(NamedTuple):
    """A passage, split into its context and its last word."""

    context: str
    word: str


def read(path: Path, limit: int | None = None) -> list[Passage]:
    """Read all passages of a file, or the first `limit`.

    Raises: UsageError with the file and the line of an invalid passage.
    """
    if uncompressed_suffix(path) == ".txt":
        return [_passage(place, line) for place, line in read_lines(path, limit)]
    items = read_items(path, limit)
    return [_passage(place, text_of(item, "text", place)) for place, item in items]


def pairs(passage: Passage) -> list[tuple[str, str]]:
    """Return the pair of context and last word to be scored."""
    return [(passage.context, f" {passage.word}")]


def compute_metrics(
    passages: Sequence[Passage], found: Iterator[LogLikelihood]
) -> dict[str, float]:
    """Return ``acc``, a fraction of 1, with its standard error, and ``perplexity``.

    found: the log-likelihoods of the `pairs` of all passages, in order.
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
        raise UsageError(f"{place}: {text!r:.40} does not end with a text, a space and a word")
    return Passage(context, word)
