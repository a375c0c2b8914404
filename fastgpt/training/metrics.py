"""Read and write `metrics.jsonl`, with one JSON object per line, each with its step.

JSON has no NaN and no infinity: non-finite values are written as null, and read back as NaN.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_file


def metrics_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of strict JSON, including the newline."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, skipping invalid lines (such as one truncated by a crash).

    Raises:
        UsageError: If the file is missing or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path}: {reason}; a run that logged nothing has no such file") from None
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            known = {name: math.nan if v is None else v for name, v in record.items()}
            records.append(known)
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Remove the records after `step`, which a resumed run will write again.

    The file is replaced atomically, so that a crash loses nothing.
    """
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(map(metrics_line, kept)), encoding="utf-8")
