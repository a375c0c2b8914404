"""Documents out of files, in flat memory however large the files are.

A stream of documents is a stream of pieces ``(text, ends)``: `ends` says that the document ends
with this piece. Pieces of one document are cut where GPT-2's splitting cuts anyway, so that
encoding them one by one gives the same ids as encoding the whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT
from fastgpt.utils.errors import UsageError
from fastgpt.utils.text_files import Advance, open_counted, read_blocks

Piece: TypeAlias = tuple[str, bool]

IN_FOLDERS = (".txt", ".jsonl", ".parquet")  # .json, too, is often something else than texts

# The last place before ASCII white space that follows another ASCII character. White space after
# something else always starts a piece of its own, and what stands before it cannot see past it.
# (Not after ">", so that a line of <|endoftext|> stays in one block with its line ends.)
_LAST_CUT = re.compile(rb".*[!-=?-~](?=[\t-\r ])", re.DOTALL)
# A line of <|endoftext|>. What stands before it is looked at last: a pattern that begins with plain
# characters is found several times faster.
_MARKER = re.compile(rf"{re.escape(END_OF_TEXT)}(?<![^\n].{{{len(END_OF_TEXT)}}})(?![^\n])")


def find_sources(inputs: Iterable[str | Path]) -> list[Path]:
    """Return the files named, and the texts in the folders named, in order of their names."""
    sources: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _kind(p) in IN_FOLDERS and p.is_file())
            if not found:
                raise UsageError(f"folder {path} holds no file named *{', *'.join(IN_FOLDERS)}")
            sources += found
        elif path.exists():
            sources.append(path)
        else:
            raise UsageError(f"{path} does not exist")
    return sources


def read_documents(path: Path, field: str, advance: Advance = lambda n: None) -> Iterator[Piece]:
    """Read the documents of one file, in the format that its name says (also with ``.gz``).

    ``.jsonl``: an object a line, and in its `field` the text; ``.json``: a list of texts, or of
    such objects; ``.parquet``: a column `field`. Anything else is UTF-8 text, and one document,
    unless some lines of it are ``<|endoftext|>``: these, and the empty lines around them, part it
    into several. Empty documents are left out.

    Raises: UsageError that names the file and the place.
    """
    if _kind(path) == ".parquet":
        return _parquet(path, field, advance)
    if _kind(path) == ".jsonl":
        return _json_lines(path, field, advance)
    if _kind(path) == ".json":
        return _json_list(path, field, advance)
    return _text(path, advance)


def read_json_lines(path: Path, advance: Advance = lambda n: None) -> Iterator[tuple[str, Any]]:
    """Yield what each line of a ``.jsonl`` file holds (also with ``.gz``), and its place in words.

    Empty lines are left out. Raises: UsageError that names the place.
    """
    with open_counted(path, advance) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parse_json(line, place)


def split_documents(text: str) -> list[str]:
    """Return the documents of a text, as :func:`read_documents` parts it.

    The last one is what follows the last separator, and empty if nothing does.
    """
    *ended, last = _MARKER.split(text)
    if not ended:
        return [text]
    documents = [ended[0].rstrip("\n"), *(document.strip("\n") for document in ended[1:])]
    return [*filter(None, documents), last.lstrip("\n")]


def cut_at_pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut the text elsewhere, at the last place in each block where GPT-2's splitting cuts too."""
    held = [b""]
    for block in blocks:
        before = held[-1][-1:]
        if cut := _last_cut(before + block if before else block):
            cut -= len(before)
            yield b"".join([*held, block[:cut]])
            held = [block[cut:]]
        else:
            held.append(block)
    if rest := b"".join(held):
        yield rest


def _last_cut(text: bytes) -> int:
    """Return the last place to cut at, or 0 if there is none."""
    for window in (1 << 10, 1 << 16, len(text)):  # nearly always, it is near the end
        if match := _LAST_CUT.match(text, max(0, len(text) - window)):
            return match.end()
    return 0


def _text(path: Path, advance: Advance) -> Iterator[Piece]:
    within = False  # a document
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


def _json_lines(path: Path, field: str, advance: Advance) -> Iterator[Piece]:
    for place, item in read_json_lines(path, advance):
        if text := _field_of(item, field, place):
            yield text, True


def _json_list(path: Path, field: str, advance: Advance) -> Iterator[Piece]:
    with open_counted(path, advance) as file:
        items = _parse_json(file.read().removeprefix(codecs.BOM_UTF8), str(path))
    if not isinstance(items, list):
        raise UsageError(f"{path} holds no list of texts but a {type(items).__name__}")
    for number, item in enumerate(items):
        text = item if isinstance(item, str) else _field_of(item, field, f"{path}, item {number}")
        if text:
            yield text, True


def _parquet(path: Path, field: str, advance: Advance) -> Iterator[Piece]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(f"{path}: to read parquet files: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(str(path), field, file.schema_arrow.names)
            size, n_rows, row = path.stat().st_size, max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise _no_text(f"{path}, row {row}", field, text)
                    if text:
                        yield text, True
                    row += 1
                advance(size * row // n_rows - size * (row - batch.num_rows) // n_rows)
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a parquet file that can be read: {error}") from None


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
        raise UsageError(f"{place}: holds no object with a field {field!r}, but {item!r:.40}")
    if field not in item:
        raise _no_field(place, field, item)
    text = item[field]
    if not isinstance(text, str):
        raise _no_text(place, field, text)
    return text


def _no_field(place: str, field: str, fields: Iterable[str]) -> UsageError:
    found = ", ".join(fields) or "none"
    return UsageError(f"{place}: has no field {field!r}; name one with --field; there are: {found}")


def _no_text(place: str, field: str, value: Any) -> UsageError:
    return UsageError(f"{place}: field {field!r} holds no text but {value!r:.40}")


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix
