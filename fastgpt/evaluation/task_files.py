"""Readers of question files, and other helpers shared by the tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data.documents import read_records
from fastgpt.utils.errors import UsageError
from fastgpt.utils.text_files import read_blocks


def read_items(path: Path, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a .jsonl file (also .jsonl.gz) or the rows of a .parquet table.

    Each item comes with a description of its location, for error messages. limit: yield only the
    first items.

    Raises: UsageError if the file cannot be read or is empty.
    """
    return _first(path, read_records(path), limit)


def read_lines(path: Path, limit: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield the non-empty lines of a text file, each with a description of its location."""
    text = b"".join(read_blocks(path)).decode()
    numbered = enumerate(text.split("\n"), 1)
    lines = ((f"{path}, line {number}", line) for number, line in numbered if line.strip())
    return _first(path, lines, limit)


def text_of(item: Any, field: str, place: str) -> str:
    """Return the text in a field of an object; raise UsageError if there is none."""
    if not isinstance(item, dict):
        raise UsageError(f"{place}: expected an object with a field {field!r}, not {item!r:.40}")
    text = item.get(field)
    if not isinstance(text, str):
        found = f"has no field {field!r}" if text is None else f"{field!r} holds {text!r:.40}"
        raise UsageError(f"{place}: {found}, expected a text; is this a file of this task?")
    return text


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; NaN for a single value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _first(path: Path, items: Iterator[Any], limit: int | None) -> Iterator[Any]:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    empty = True
    for item in islice(items, limit):
        empty = False
        yield item
    if empty:
        raise UsageError(f"{path} is empty: it contains no questions")
