"""`metrics.jsonl`: one JSON object a line, each with its step.

JSON has no NaN and no infinity: figures that are not finite are written as null, and read as NaN.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.utils.errors import UsageError


def metrics_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of strict JSON."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records, without what is no record (a line torn by a crash).

    UsageError if the file is missing or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path}: {reason}; a run that logged nothing has none") from None
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


def cut_metrics(path: Path, step: int) -> dict[str, Any]:
    """Drop the records behind `step`, which are about to be written again; return the last kept.

    The file is replaced in one go, so that a crash in between loses nothing. What comes back is
    empty without a record.
    """
    kept = (
        [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []
    )
    if path.exists():
        beside = path.with_name(f".{path.name}.new")
        beside.write_text("".join(map(metrics_line, kept)), encoding="utf-8")
        os.replace(beside, path)
    return kept[-1] if kept else {}
