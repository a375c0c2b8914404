"""Read UTF-8 text files of any size in blocks; files ending with ``.gz`` are decompressed."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from fastgpt.utils.errors import UsageError
from fastgpt.utils.extension import _C

Advance: TypeAlias = Callable[[int], None]  # called with the number of bytes just read

BLOCK_BYTES = 1 << 21  # large enough that the overhead per block is negligible


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
        raise not_utf8(path, error.object[error.start], read - len(block) + size) from None
    return block[:size], block[size:]


@contextmanager
def open_counted(path: Path, advance: Advance) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if its name ends with ``.gz``.

    `advance` is called with the number of bytes just read from disk. Errors of opening, reading and
    decompressing become UsageError.
    """
    try:
        with io.BufferedReader(_Counted(io.FileIO(path), advance), 1 << 20) as file:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is not a complete gzip file: {error}") from None
    except OSError as error:
        raise UsageError(f"data file {path} cannot be read: {error.strerror}") from None


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


def not_utf8(path: Path, byte: int, at: int) -> UsageError:
    """Return the error for a text file with an invalid byte at an offset."""
    return UsageError(
        f"data file {path} is not UTF-8: byte 0x{byte:02x} at offset {at:,}; convert it "
        f"from its encoding, for example with: iconv -f latin1 -t utf-8"
    )
