"""Rows of token ids in files: mapped, looked through before training, cut into windows."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt.utils.errors import UsageError
from fastgpt.utils.threads import map_in_order

Ids = NDArray[np.unsignedinteger[Any]]
Advance = Callable[[int], None]  # is told how many more bytes were looked through

LONG = 1 << 30  # bytes that take seconds: worth a progress bar
_PIECE = 1 << 21  # ids looked at at once: they stay in the processor's cache for the hash
_BLOCK = 1 << 23  # ids hashed on their own; another number would make all hashes other ones


@dataclass(frozen=True)
class IdFile:
    """Where in a file ids are: `n_ids` of `id_bytes` each, little-endian, from `offset` on."""

    path: Path
    offset: int  # in bytes
    n_ids: int
    id_bytes: int
    vocab_size: int  # what the ids must be below

    def ids(self) -> Ids:
        """Return the ids `[n_ids]`, which are read from disk when they are looked at."""
        dtype = f"<u{self.id_bytes}"
        if not self.n_ids:  # a file of no ids cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.path, dtype, "r", self.offset, (self.n_ids,))

    @property
    def n_bytes(self) -> int:
        """How many bytes the ids take."""
        return self.n_ids * self.id_bytes


def check_ids(file: IdFile, first: int = 0, last: int | None = None, sha256: Any = None) -> None:
    """Read ids `first` to `last` (exclusive) once; UsageError for one beyond the vocabulary.

    sha256: a hash of hashlib, which is fed with their bytes. The check itself goes at the speed
    of memory, about ten times that of the hash.
    """
    ids = np.asarray(file.ids())
    last = file.n_ids if last is None else last
    for start in range(first, last, _PIECE):
        piece = ids[start : min(last, start + _PIECE)]
        if int(piece.max()) >= file.vocab_size:
            at = start + int((piece >= file.vocab_size).argmax())
            raise UsageError(
                f"{file.path}: id {ids[at]} at offset {file.offset + at * file.id_bytes:,} is not "
                f"of its vocabulary of {file.vocab_size:,}: the file is damaged, or was made with "
                "another tokenizer; make it again"
            )
        if sha256 is not None:
            sha256.update(piece)


def check_and_hash(files: Sequence[IdFile], advance: Advance = lambda n: None) -> str:
    """Check the ids of all the files, and return a SHA-256 (hexadecimal) that tells them apart.

    It is the SHA-256 of the files' sizes and of the SHA-256 of each block of them, so that blocks
    can be hashed in one thread for each CPU.
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
    """The ids of several files as one row ``[n]``, read from disk where it is indexed."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = [np.asarray(part) for part in parts]
        self._firsts = [0, *accumulate(len(part) for part in parts)]
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, where: slice | NDArray[np.integer[Any]]) -> Ids:
        """Return the ids of a slice, or those at the positions of an array of any shape."""
        if isinstance(where, slice):
            start, stop, step = where.indices(len(self))
            if step == 1:
                return self.cut(np.array([start]), max(0, stop - start)).reshape(-1)
            where = np.arange(start, stop, step)
        return cut_windows(self, where.reshape(-1), 1).reshape(where.shape)

    def cut(self, starts: NDArray[np.integer[Any]], size: int) -> Ids:
        """Do what :func:`cut_windows` says."""
        windows: Ids = np.empty((len(starts), size), self.dtype)
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._fill(window, start)
        return windows

    def _fill(self, window: Ids, start: int) -> None:
        """Copy the ids from `start` on, out of as many parts as they are in."""
        filled = 0
        while filled < len(window):
            i = bisect_right(self._firsts, start + filled) - 1
            at = start + filled - self._firsts[i]
            piece = self._parts[i][at : at + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)


def joined(parts: Sequence[Ids]) -> Ids | ShardedIds:
    """Return the ids of all the files as one row."""
    return np.asarray(parts[0]) if len(parts) == 1 else ShardedIds(parts)


def cut_windows(ids: Ids | ShardedIds, starts: NDArray[np.integer[Any]], size: int) -> Ids:
    """Return the `size` ids from each start on, ``[len(starts), size]``.

    Raises: IndexError where that is outside the row.
    """
    last = len(ids) - size
    if len(starts) and not 0 <= starts.min() <= starts.max() <= last:
        raise IndexError(f"positions must be from 0 to {last} for {size} ids, of {len(ids)}")
    if isinstance(ids, ShardedIds):
        return ids.cut(starts, size)
    # Row i of this view is ids[i : i + size]; no row of it is copied but those asked for.
    (step,) = ids.strides
    rows = np.lib.stride_tricks.as_strided(ids, (last + 1, size), (step, step), writeable=False)
    windows: Ids = rows[starts]
    return windows
