"""Open files, decompressed if necessary, and read UTF-8 text of any size from them in blocks.

Compression is recognized by the first bytes of a file, whatever its name is.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from fastgpt.utils.errors import UsageError
from fastgpt.utils.extension import _C

Advance: TypeAlias = Callable[[int], None]  # called with the number of bytes just read

BLOCK_BYTES = 1 << 21  # large enough that the overhead per block is negligible
STANDARD_INPUT = Path("-")

COMPRESSION_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4")
_COMPRESSIONS = {  # the first bytes of a file -> the name of its compression
    b"\x1f\x8b": "gzip",
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_READERS: dict[str, Callable[[IO[bytes]], Any]] = {  # pyarrow decompresses the others
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "lzma": lzma.LZMAFile,
}
_NOT_TEXT = {  # the first bytes of a file -> what it is, and what to do with it
    codecs.BOM_UTF32_LE: "UTF-32 text: convert it with: iconv -f utf-32 -t utf-8",
    codecs.BOM_UTF32_BE: "UTF-32 text: convert it with: iconv -f utf-32 -t utf-8",
    codecs.BOM_UTF16_LE: "UTF-16 text: convert it with: iconv -f utf-16 -t utf-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: convert it with: iconv -f utf-16 -t utf-8",
    b"PK\x03\x04": "a zip archive, or a document in one (docx, epub): extract its texts first",
    b"7z\xbc\xaf": "a 7z archive: extract its texts first",
    b"%PDF-": "a PDF document: extract its text first, for example with: pdftotext",
    b"PAR1": "a parquet file that is compressed once more: decompress it first",
    b"ARROW1\x00\x00": "an Arrow file: convert it to parquet, for example with Dataset.to_parquet",
    b"SQLite format 3\x00": "a SQLite database: export its texts first",
    b"\x80\x04": "a pickle: write its texts to a text file first",
    b"\x93NUMPY": "a NumPy array: token ids are read from folders of .bin files",
}
_BEGINNING = 4096  # bytes that are examined


def read_blocks(
    path: Path, block_bytes: int | None = None, advance: Advance = lambda n: None
) -> Iterator[bytes]:
    """Yield the contents of a UTF-8 file in blocks that end at character boundaries.

    A byte order mark is removed, and Windows line endings become newlines.

    Args:
        path: the file.
        block_bytes: approximate size of the blocks; by default `BLOCK_BYTES`.
        advance: called with the number of bytes just read from disk.

    Raises: UsageError if the file cannot be read or is not valid UTF-8.
    """
    n_bytes, started, held = 0, False, b""  # held: bytes that are yielded with the next block
    with open_counted(path, advance) as file:
        while True:
            read = file.read(block_bytes or BLOCK_BYTES)
            n_bytes += len(read)
            block, held = _whole_characters(path, held + read, n_bytes, final=not read)
            if block and not started:
                block, started = block.removeprefix(codecs.BOM_UTF8), True
            if read and block.endswith(b"\r"):  # the next block may begin with a newline
                block, held = block[:-1], b"\r" + held
            if b"\r" in block:
                block = _C.unix_newlines(block)
            if block:
                yield block
            if not read:
                return


def _whole_characters(path: Path, block: bytes, read: int, final: bool) -> tuple[bytes, bytes]:
    """Split a block, which ends at byte `read` of the file, after its last complete character."""
    size = _C.valid_utf8(block)
    if size == len(block):
        return block, b""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(block[size:], final)
    except UnicodeDecodeError as error:
        at = read - len(block) + size
        raise UsageError(
            f"data file {path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{at:,}; it is damaged, or in another encoding, from which it can be converted, for "
            "example with: iconv -f cp1252 -t utf-8"
        ) from None
    return block[:size], block[size:]


@contextmanager
def open_counted(path: Path, advance: Advance = lambda n: None) -> Iterator[IO[bytes]]:
    """Open a file of text or JSON for reading, decompressed.

    `advance` is called with the number of bytes just read from disk.

    Raises: UsageError if the file cannot be opened, read or decompressed, or if its first bytes are
        not those of a text. It names the format if it is known.
    """
    compression = None
    try:
        with io.BufferedReader(_Counted(io.FileIO(path), advance), 1 << 20) as file:
            compression = _match(_COMPRESSIONS, file.peek(_BEGINNING))
            text: io.BufferedReader[Any] = file
            if compression is not None:
                text = _decompressed(path, file, compression)
            if problem := _not_text(text.peek(_BEGINNING)[:_BEGINNING]):
                raise UsageError(f"data file {path} is {problem}")
            yield cast(IO[bytes], text)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise UsageError(f"{path} is not a complete {compression} file: {error}") from None
    except OSError as error:
        if error.strerror is None:  # bz2 and pyarrow raise this for invalid data
            raise UsageError(f"{path} is not a complete {compression} file: {error}") from None
        raise UsageError(f"data file {path} cannot be read: {error.strerror}") from None


@contextmanager
def regular_file(path: Path) -> Iterator[Path]:
    """Yield a path that can be opened several times: `path`, or a copy of what a pipe contains.

    ``-`` is the standard input. A copy is a temporary file, which is deleted at the end. If the
    block raises a UsageError that names the copy, it names `path` instead.

    Raises: UsageError if the pipe cannot be read.
    """
    if path != STANDARD_INPUT and not _is_pipe(path):
        yield path
        return
    name = "stdin" if path == STANDARD_INPUT else path.name
    with tempfile.TemporaryDirectory(prefix="fastgpt-") as folder:
        copy = Path(folder) / name
        try:
            with copy.open("wb") as file:
                if path == STANDARD_INPUT:
                    shutil.copyfileobj(sys.stdin.buffer, file)
                else:
                    with path.open("rb") as pipe:
                        shutil.copyfileobj(pipe, file)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be copied to {folder}: {error.strerror}; TMPDIR sets another folder"
            ) from None
        try:
            yield copy
        except UsageError as error:
            given = "standard input" if path == STANDARD_INPUT else str(path)
            raise UsageError(str(error).replace(str(copy), given)) from None


def _is_pipe(path: Path) -> bool:
    """Return whether a path is a pipe, a socket or a device, which can be read only once."""
    try:
        mode = path.stat().st_mode
    except OSError:  # reported when the file is opened
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _decompressed(
    path: Path, file: io.BufferedReader[Any], compression: str
) -> io.BufferedReader[Any]:
    if compression in _READERS:
        stream = _READERS[compression](file)
    else:
        stream = _pyarrow(path).CompressedInputStream(file, compression)
    return io.BufferedReader(stream, 1 << 20)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UsageError(f"{path}: reading this file requires: pip install pyarrow") from None
    return pyarrow


def _not_text(beginning: bytes) -> str | None:
    """Return what a file is if its first bytes are not those of UTF-8 text, and what to do."""
    if known := _match(_NOT_TEXT, beginning):
        return known
    if beginning[257:262] == b"ustar":
        return "a tar archive: extract its texts first"
    odd, even = beginning[1::2].count(0), beginning[::2].count(0)
    if odd + even < max(4, len(beginning) // 50):  # some may be part of a text
        return None
    if odd and even:
        zeros = f"{odd + even} of its first {len(beginning)} bytes are 0"
        return f"not UTF-8 text: {zeros}; it is a binary file, or text in UTF-16"
    encoding = "utf-16le" if odd else "utf-16be"  # ASCII characters have a zero byte each
    return f"UTF-16 text: convert it with: iconv -f {encoding} -t utf-8"


def _match(table: dict[bytes, str], beginning: bytes) -> str | None:
    return next((value for magic, value in table.items() if beginning.startswith(magic)), None)


class _Counted(io.RawIOBase):
    """A raw file that calls `advance` with the number of bytes of each read."""

    def __init__(self, file: io.FileIO, advance: Advance) -> None:
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        n_bytes = self._file.readinto(buffer)
        self._advance(n_bytes or 0)
        return n_bytes

    def close(self) -> None:
        self._file.close()
        super().close()
