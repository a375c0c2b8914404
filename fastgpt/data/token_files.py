"""Token ids in files: memory mapping, checks before training, and cutting into windows."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastgpt.utils.errors import UsageError
from fastgpt.utils.text_files import Advance
from fastgpt.utils.threads import map_in_order

Ids = NDArray[np.unsignedinteger[Any]]

LONG = 1 << 30  # bytes; checking this many takes seconds, so a progress bar is shown
_PIECE = 1 << 21  # ids checked at once; they are still in the CPU cache when they are hashed
_BLOCK = 1 << 23  # ids per separately hashed block; changing it would change all hashes


@dataclass(frozen=True)
class IdFile:
    """The location of ids in a file: `n_ids` little-endian ids of `id_bytes` each at `offset`."""

    path: Path
    offset: int  # in bytes
    n_ids: int
    id_bytes: int
    vocab_size: int  # the ids must be smaller

    def ids(self) -> Ids:
        """Return the ids `[n_ids]` as a memory map, which is read from disk when accessed."""
        dtype = f"<u{self.id_bytes}"
        if not self.n_ids:  # an empty range cannot be memory mapped
            return np.zeros(0, dtype)
        return np.memmap(self.path, dtype, "r", self.offset, (self.n_ids,))

    @property
    def n_bytes(self) -> int:
        """Size of the ids in bytes."""
        return self.n_ids * self.id_bytes


def check_ids(file: IdFile, first: int = 0, last: int | None = None, sha256: Any = None) -> None:
    """Check that the ids `first` to `last` (exclusive) are in the vocabulary.

    sha256: a hashlib hash object that is updated with the bytes of the ids. The check alone is
    bound by memory bandwidth and about ten times as fast as hashing.

    Raises: UsageError that names the first id outside the vocabulary and its position.
    """
    ids = np.asarray(file.ids())
    last = file.n_ids if last is None else last
    for start in range(first, last, _PIECE):
        piece = ids[start : min(last, start + _PIECE)]
        if int(piece.max()) >= file.vocab_size:
            at = start + int((piece >= file.vocab_size).argmax())
            raise UsageError(
                f"{file.path}: id {ids[at]} at offset {file.offset + at * file.id_bytes:,} is not "
                f"in its vocabulary of {file.vocab_size:,}: the file is damaged, or was made with "
                "another tokenizer; recreate it"
            )
        if sha256 is not None:
            sha256.update(piece)


def check_and_hash(files: Sequence[IdFile], advance: Advance = lambda n: None) -> str:
    """Check the ids of all files, and return a hexadecimal SHA-256 that identifies their contents.

    It is the SHA-256 of the sizes of the files and of the SHA-256 of each block of ids, so that
    blocks can be hashed in parallel, with one thread per CPU.

    Args:
        files: the ids to check.
        advance: called with the number of bytes of each block when it has been checked.
    """
    whole = hashlib.sha256(repr([(file.n_ids, file.id_bytes) for file in files]).encode())
    blocks = [
        (file, first, min(file.n_ids, first + _BLOCK))
        for file in files
        for first in range(0, file.n_ids, _BLOCK)
    ]
    for (file, first, last), digest in zip(
        blocks, map_in_order(_check_block, blocks, None), strict=True
    ):
        whole.update(digest)
        advance((last - first) * file.id_bytes)
    return whole.hexdigest()


def _check_block(block: tuple[IdFile, int, int]) -> bytes:
    sha256 = hashlib.sha256()
    check_ids(*block, sha256)
    return sha256.digest()


class ShardedIds:
    """The ids of several files as one array ``[n]``, which is read from disk when indexed."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = [np.asarray(part) for part in parts]
        self._firsts = [0, *accumulate(len(part) for part in parts)]  # positions of the parts
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, where: slice | NDArray[np.integer[Any]]) -> Ids:
        """Return the ids of a slice, or those at the positions given by an array of any shape."""
        if isinstance(where, slice):
            start, stop, step = where.indices(len(self))
            if step == 1:
                return self.cut(np.array([start]), max(0, stop - start)).reshape(-1)
            where = np.arange(start, stop, step)
        return cut_windows(self, where.reshape(-1), 1).reshape(where.shape)

    def cut(self, starts: NDArray[np.integer[Any]], size: int) -> Ids:
        """Return the windows at `starts`; see :func:`cut_windows`."""
        windows: Ids = np.empty((len(starts), size), self.dtype)
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._fill(window, start)
        return windows

    def _fill(self, window: Ids, start: int) -> None:
        """Fill `window` with the ids from `start` on, which can span several parts."""
        filled = 0
        while filled < len(window):
            i = bisect_right(self._firsts, start + filled) - 1
            at = start + filled - self._firsts[i]
            piece = self._parts[i][at : at + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)


Tokens: TypeAlias = Ids | ShardedIds


def joined(parts: Sequence[Ids]) -> Tokens:
    """Return the ids of all files as one array."""
    return np.asarray(parts[0]) if len(parts) == 1 else ShardedIds(parts)


def cut_windows(ids: Tokens, starts: NDArray[np.integer[Any]], size: int) -> Ids:
    """Return windows of `size` ids, beginning at `starts`, as an array ``[len(starts), size]``.

    Raises: IndexError if a window is not within the ids.
    """
    last = len(ids) - size
    if len(starts) and not 0 <= starts.min() <= starts.max() <= last:
        raise IndexError(f"positions must be from 0 to {last} for {size} ids, of {len(ids)}")
    if isinstance(ids, ShardedIds):
        return ids.cut(starts, size)
    # Row i of this view is ids[i : i + size]. The rows overlap in memory, and indexing copies only
    # the selected ones.
    (step,) = ids.strides
    rows = np.lib.stride_tricks.as_strided(ids, (last + 1, size), (step, step), writeable=False)
    windows: Ids = rows[starts]
    return windows
