"""Read documents from files of any size, with constant memory.

Documents are streamed as pieces ``(text, ends)``, where `ends` is True for the last piece of a
document. Documents are cut only at positions where GPT-2's pre-tokenization pattern also cuts, so
that encoding the pieces one by one gives the same ids as encoding the whole document.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT
from fastgpt.utils.errors import UsageError
from fastgpt.utils.text_files import COMPRESSION_SUFFIXES, Advance, open_counted, read_blocks

Piece: TypeAlias = tuple[str, bool]
Format: TypeAlias = Literal["text", "json", "json_lines", "parquet"]

FIELD = "text"  # the usual name of the JSON field or parquet column with the text
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
PARQUET_SUFFIXES = (".parquet", ".pq")
_PARQUET_MAGIC = b"PAR1"  # at the beginning and at the end
_LONG_LINE = 1 << 20  # bytes

# Matches up to the last position between a printable ASCII character and ASCII white space. Such
# white space always starts a new piece of GPT-2's pattern, and no match before it depends on what
# follows it. (">" is excluded, so that a line <|endoftext|> stays in one block with its newlines.)
_LAST_CUT = re.compile(rb".*[!-=?-~](?=[\t-\r ])", re.DOTALL)
# A line that holds only <|endoftext|>. The start of the line is checked last, by a look-behind over
# the marker: a pattern that begins with literal characters is found several times faster.
_MARKER = re.compile(rf"{re.escape(END_OF_TEXT)}(?<![^\n].{{{len(END_OF_TEXT)}}})(?![^\n])")


def file_format(path: Path) -> Format:
    """Return the format of a file, judging by its name and by its first line.

    Upper and lower case and the suffix of a compression do not matter. The first line distinguishes
    JSON lines from one JSON list in a ``.json`` file, and from text in a file without a suffix.

    Raises: UsageError if the file cannot be read.
    """
    suffix = uncompressed_suffix(path)
    if path.suffix.lower() in PARQUET_SUFFIXES or _is_parquet(path):
        return "parquet"  # which is compressed internally
    if suffix in JSON_LINES_SUFFIXES:
        return "json_lines"
    if suffix in (".json", "") and _begins_with_object(path):
        return "json_lines"
    return "json" if suffix == ".json" else "text"


def uncompressed_suffix(path: Path) -> str:
    """Return the suffix of a file name in lower case, ignoring that of a compression."""
    path = Path(path.name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix


def read_documents(
    path: Path,
    field: str = FIELD,
    advance: Advance = lambda n: None,
    on_invalid: Callable[[str], None] | None = None,
) -> Iterator[Piece]:
    """Yield the documents of one file as pieces, in the format that :func:`file_format` finds.

    - JSON lines: one object per line, with the text in its `field`;
    - JSON: a list of texts, or of such objects;
    - parquet: a table with the texts in the column `field`;
    - UTF-8 text. It is one document, unless lines that hold only ``<|endoftext|>`` separate it into
      several; these lines and the empty lines around them are dropped.

    All of them except parquet may be compressed. Empty documents are skipped.

    Args:
        path: the file.
        field: name of the JSON field or the parquet column with the text.
        advance: called with the number of bytes just read.
        on_invalid: called with a message for each row or object without a text, which is then
            skipped; by default it is an error.

    Raises: UsageError that names the file and the position of an error.
    """
    found = file_format(path)
    if found == "text":
        return _text(path, advance)
    return _texts_of(_records(path, found, field, advance), field, on_invalid)


def read_records(
    path: Path, field: str | None = None, advance: Advance = lambda n: None
) -> Iterator[tuple[str, Any]]:
    """Yield `(place, value)` for each row of a parquet table, line of JSON or item of a JSON list.

    `place` names the file and the line, row or item for error messages. JSON may be compressed;
    empty lines are skipped. field: the only column of a table that is read.

    Raises: UsageError that names the place of an error.
    """
    return _records(path, file_format(path), field, advance)


def split_documents(text: str) -> list[str]:
    """Split a text into documents, as :func:`read_documents` does.

    The last document is the text after the last separator, which may be empty.
    """
    *ended, last = _MARKER.split(text)
    if not ended:
        return [text]
    documents = [ended[0].rstrip("\n"), *(document.strip("\n") for document in ended[1:])]
    return [*filter(None, documents), last.lstrip("\n")]


def cut_at_pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Re-cut a text given in blocks, so that every cut is also a cut of GPT-2's pattern.

    Each block is cut at the last such position in it. The rest is joined with the next block.
    """
    held = [b""]  # parts since the last cut, which are not yielded yet
    for block in blocks:
        before = held[-1][-1:]  # the cut may be at the start of the block, after this character
        if cut := _last_cut(before + block if before else block):
            cut -= len(before)
            yield b"".join([*held, block[:cut]])
            held = [block[cut:]]
        else:
            held.append(block)
    if rest := b"".join(held):
        yield rest


def _last_cut(text: bytes) -> int:
    """Return the last position to cut at, or 0 if there is none."""
    for window in (1 << 10, 1 << 16, len(text)):  # nearly always, it is near the end
        if match := _LAST_CUT.match(text, max(0, len(text) - window)):
            return match.end()
    return 0


def _text(path: Path, advance: Advance) -> Iterator[Piece]:
    within = False  # whether a part of the current document has been yielded
    for block in cut_at_pieces(read_blocks(path, advance=advance)):
        first, *others = _MARKER.split(block.decode())
        for text in others:
            first = first.rstrip("\n")
            if first or within:
                yield first, True
            first, within = text.lstrip("\n"), False
        if first:
            yield first, False
            within = True
    if within:
        yield "", True


def _records(
    path: Path, found: Format, field: str | None, advance: Advance
) -> Iterator[tuple[str, Any]]:
    """Read the records of a file in the format that was found; other files as JSON lines."""
    match found:
        case "parquet":
            return _parquet_rows(path, field, advance)
        case "json":
            return _json_items(path, advance)
        case _:
            return _json_lines(path, advance)


def _texts_of(
    records: Iterable[tuple[str, Any]], field: str, on_invalid: Callable[[str], None] | None
) -> Iterator[Piece]:
    for place, record in records:
        try:
            text = record if isinstance(record, str) else _field_of(record, field, place)
        except UsageError as error:
            if on_invalid is None:
                raise
            on_invalid(str(error))
            continue
        if text:
            yield text, True


def _json_lines(path: Path, advance: Advance) -> Iterator[tuple[str, Any]]:
    with open_counted(path, advance) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parse_json(line, place)


def _json_items(path: Path, advance: Advance) -> Iterator[tuple[str, Any]]:
    with open_counted(path, advance) as file:
        items = _parse_json(file.read().removeprefix(codecs.BOM_UTF8), str(path))
    if not isinstance(items, list):
        raise UsageError(f"{path} must contain a list of texts, not a {type(items).__name__}")
    for number, item in enumerate(items):
        yield f"{path}, item {number}", item


def _parquet_rows(path: Path, field: str | None, advance: Advance) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(f"{path}: reading parquet files requires: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            if field is not None and field not in file.schema_arrow.names:
                raise _no_field(str(path), field, file.schema_arrow.names)
            size, n_rows, number = path.stat().st_size, max(1, file.metadata.num_rows), 0
            columns = None if field is None else [field]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
                advance(size * number // n_rows - size * (number - batch.num_rows) // n_rows)
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as a parquet file: {error}") from None


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(4) != _PARQUET_MAGIC:
                return False
            file.seek(max(4, file.seek(0, os.SEEK_END) - 4))
            return file.read() == _PARQUET_MAGIC
    except OSError:  # reported when the file is read
        return False


def _begins_with_object(path: Path) -> bool:
    """Return whether the first line of a file is a whole JSON object."""
    with open_counted(path) as file:
        line = file.readline(_LONG_LINE)
    is_cut = len(line) == _LONG_LINE
    line = line.removeprefix(codecs.BOM_UTF8).lstrip()
    if not line.startswith(b"{"):
        return False
    try:
        return is_cut or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise UsageError(f"{place}: brackets nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UsageError(f"{place}, {line}column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise UsageError(f"{place}: is not JSON: {error}") from None


def _field_of(item: Any, field: str, place: str) -> str:
    if not isinstance(item, dict):
        raise UsageError(f"{place}: must be an object with a field {field!r}, not {item!r:.40}")
    if field not in item:
        raise _no_field(place, field, item)
    text = item[field]
    if not isinstance(text, str):
        raise _no_text(place, field, text)
    return text


def _no_field(place: str, field: str, fields: Iterable[str]) -> UsageError:
    found = ", ".join(fields) or "none"
    return UsageError(
        f"{place}: has no field {field!r}; it has: {found}; choose one with --field of "
        "fastgpt.prepare"
    )


def _no_text(place: str, field: str, value: Any) -> UsageError:
    return UsageError(f"{place}: field {field!r} must be a string, not {value!r:.40}")
