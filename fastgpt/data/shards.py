"""Read and write token shards: self-describing files of token ids.

    header      256 bytes: magic, version, sizes, tokenizer fingerprint, SHA-256 of the rest
    ids         n_tokens ids of 2 or 4 bytes (uint16 or uint32, little-endian)
    padding     zeros up to a multiple of 8 bytes
    starts      n_documents numbers of 8 bytes (uint64): position in the ids of each document start

A sequence of ids that exceeds the size of one file is split into ``NAME-00000.bin``,
``NAME-00001.bin`` and so on. All shards except the last have the same number of ids, so a shard can
end within a document. The files are written under temporary names and renamed when all of them are
on disk, so that existing shards are always complete.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from fastgpt.data.token_files import IdFile, Ids, check_ids
from fastgpt.utils.errors import UsageError

if TYPE_CHECKING:
    from fastgpt.tokenizer import BaseTokenizer

MAGIC = b"fGPTshrd"
VERSION = 1
HEADER_BYTES = 256
TOKENS_PER_SHARD = 100_000_000

# The header, little-endian and without gaps; the offsets are in bytes:
#     0 magic   8 version   12 bytes per id   16 vocab_size   24 n_tokens   32 n_documents
#    40 index of the shard   44 number of shards   48 tokenizer fingerprint   80 SHA-256 of the rest
#   112 zeros   252 CRC-32 of bytes 0 to 251
_FIELDS = struct.Struct("<8sII QQQ II 32s32s")
_CHECKSUM = struct.Struct("<I")


class ShardError(UsageError):
    """Raised for a shard that is missing, damaged or of another format; names file and position."""


@dataclass(frozen=True)
class Header:
    """The contents of a shard's header."""

    id_bytes: int  # 2 or 4
    vocab_size: int
    n_tokens: int
    n_documents: int  # that start in this shard
    index: int  # of this shard, from 0
    count: int  # number of shards of the sequence
    fingerprint: str  # of the tokenizer, hexadecimal
    sha256: str  # of everything after the header, hexadecimal

    def pack(self) -> bytes:
        """Return the header as 256 bytes."""
        *numbers, fingerprint, sha256 = asdict(self).values()
        hashes = bytes.fromhex(fingerprint), bytes.fromhex(sha256)
        packed = _FIELDS.pack(MAGIC, VERSION, *numbers, *hashes)
        packed = packed.ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
        return packed + _CHECKSUM.pack(zlib.crc32(packed))


@dataclass(frozen=True)
class Shard:
    """A shard on disk; `ids` (uint16 or uint32) and `document_starts` (uint64) are memory maps."""

    path: Path
    header: Header
    id_file: IdFile
    ids: Ids
    document_starts: NDArray[np.uint64]


def read_shard(path: Path, tokenizer: BaseTokenizer | None = None) -> Shard:
    """Open a shard. The ids are memory mapped, so they are read from disk when accessed.

    The ids are not checked; see :func:`verify_shard`.

    Args:
        path: the file.
        tokenizer: if given, the tokenizer that the ids must have been made with.

    Raises: ShardError that names the file, the problem and its position.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = _unpack(path, file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from None
    starts_at = HEADER_BYTES + _padded(header.n_tokens * header.id_bytes)
    expected = starts_at + 8 * header.n_documents
    if size != expected:
        raise ShardError(
            f"{path} has {size:,} bytes, but {header.n_tokens:,} tokens and {header.n_documents:,} "
            f"documents require {expected:,}: it was truncated or modified"
        )
    if tokenizer is not None and tokenizer.fingerprint != header.fingerprint:
        raise ShardError(
            f"{path} was made with another tokenizer: its fingerprint is "
            f"{header.fingerprint[:16]}, not {tokenizer.fingerprint[:16]}"
        )
    id_file = IdFile(path, HEADER_BYTES, header.n_tokens, header.id_bytes, header.vocab_size)
    starts = IdFile(path, starts_at, header.n_documents, 8, header.n_tokens)
    return Shard(path, header, id_file, id_file.ids(), starts.ids())


def read_shards(prefix: Path, tokenizer: BaseTokenizer | None = None) -> list[Shard]:
    """Open the shards ``PREFIX-00000.bin``, ``PREFIX-00001.bin`` and so on.

    Arguments and errors are those of :func:`read_shard`. ShardError is also raised if a shard is
    missing or belongs to another sequence.
    """
    shards = [read_shard(path, tokenizer) for path in _existing(Path(prefix))]
    if not shards:
        raise ShardError(f"{_name(Path(prefix), 0)} does not exist")
    count, fingerprint = shards[0].header.count, shards[0].header.fingerprint
    for index in range(max(count, len(shards))):  # also detects more files than `count`
        path = _name(Path(prefix), index)
        if index >= len(shards) or shards[index].path != path:
            raise ShardError(f"{path} is missing: there must be {count} shards")
        header = shards[index].header
        if (header.index, header.count, header.fingerprint) != (index, count, fingerprint):
            raise ShardError(
                f"{path} is shard {header.index} of {header.count} according to its header: it "
                f"does not belong to the {count} shards that begin with {shards[0].path.name}"
            )
    return shards


def verify_shard(shard: Shard) -> None:
    """Read a whole shard, check its ids, and check its SHA-256 against the header.

    Raises: ShardError if the SHA-256 differs, UsageError for an id outside the vocabulary.
    """
    sha256 = hashlib.sha256()
    check_ids(shard.id_file, sha256=sha256)
    with shard.path.open("rb") as file:
        file.seek(HEADER_BYTES + shard.id_file.n_bytes)
        while rest := file.read(1 << 20):
            sha256.update(rest)
    if sha256.hexdigest() != shard.header.sha256:
        raise ShardError(
            f"{shard.path} was modified after it was written: its SHA-256 differs from the header's"
        )


class ShardWriter:
    """Writes a sequence of ids into shards. Use it in a ``with`` block.

    The shards appear under their names at the end of the block, all together; if the block raises,
    no files are left.

    Args:
        prefix: path prefix of the files, which are named ``PREFIX-00000.bin`` and so on.
        tokenizer: the tokenizer of the ids.
        tokens_per_shard: maximum number of ids per file.

    Raises: FileExistsError if such files exist.
    """

    def __init__(
        self, prefix: str | Path, tokenizer: BaseTokenizer, tokens_per_shard: int = TOKENS_PER_SHARD
    ) -> None:
        if tokens_per_shard < 1:
            raise ValueError(f"tokens_per_shard must be at least 1, not {tokens_per_shard}")
        self._prefix, self._tokens_per_shard = Path(prefix), tokens_per_shard
        if existing := _existing(self._prefix):
            raise FileExistsError(f"{existing[0]} exists: delete it, or choose another name")
        self._vocab_size, self._fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        self._id_bytes = 2 if self._vocab_size <= 1 << 16 else 4
        self._done: list[Header] = []  # of the finished shards
        self._parts: list[Path] = []  # all files, under their temporary names
        self._file: IO[bytes] | None = None
        self._next_start = np.zeros(1, np.int64)  # [0] if the next id starts a document, else []
        self.n_tokens = self.n_documents = 0

    def append(
        self, ids: Ids, document_ends: Sequence[int] | NDArray[np.integer[Any]] = ()
    ) -> None:
        """Append ids ``[n]``; `document_ends` are the positions in them, 1 to n, after documents.

        The very first id, and the next one after each end, starts a document.

        Raises: ValueError for an id outside the vocabulary.
        """
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise ValueError(f"id {ids.max()} is not in this vocabulary of {self._vocab_size}")
        # A document starts where the previous one ends. After an end at n, that is the first id of
        # the next call: this start is kept until then, and dropped if there are no more ids.
        starts = np.append(self._next_start, np.asarray(document_ends, np.int64))
        here = starts < len(ids)
        starts, self._next_start = starts[here], starts[~here] - len(ids)
        at = 0
        while at < len(ids):
            if self._file is None or self._n_tokens == self._tokens_per_shard:
                self._begin()
            end = min(len(ids), at + self._tokens_per_shard - self._n_tokens)
            inside = starts[(starts >= at) & (starts < end)]
            self._starts.append((inside - at + self._n_tokens).astype("<u8"))
            self._write(ids[at:end].astype(f"<u{self._id_bytes}", copy=False).tobytes())
            self._n_tokens += end - at
            at = end
        self.n_tokens += len(ids)
        self.n_documents += len(starts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                self._file.close()
            for part in self._parts:
                part.unlink(missing_ok=True)

    @property
    def paths(self) -> list[Path]:
        """The paths of the finished shards."""
        return [_name(self._prefix, index) for index in range(len(self._done))]

    def _begin(self) -> None:
        """Open the next shard under a temporary name, with zeros in place of the header."""
        self._end()
        self._n_tokens, self._starts = 0, [np.zeros(0, "<u8")]
        self._sha256 = hashlib.sha256()
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        path = _name(self._prefix, len(self._done))
        self._parts.append(path.with_name(f".{path.name}.part"))
        self._file = self._parts[-1].open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def _end(self) -> None:
        """Finish the open shard, if there is one, except for its header."""
        if self._file is None:
            return
        size = self._n_tokens * self._id_bytes
        starts = np.concatenate(self._starts)
        self._write(bytes(_padded(size) - size) + starts.tobytes())
        self._file.close()
        self._file = None
        self._done.append(
            Header(
                id_bytes=self._id_bytes,
                vocab_size=self._vocab_size,
                n_tokens=self._n_tokens,
                n_documents=len(starts),
                index=len(self._done),
                count=0,  # set by _finish, when it is known
                fingerprint=self._fingerprint,
                sha256=self._sha256.hexdigest(),
            )
        )

    def _finish(self) -> None:
        """Write all headers, sync the files to disk, and then rename them."""
        if self._file is None:  # no ids were appended: write one empty shard
            self._begin()
        self._end()
        self._done = [replace(header, count=len(self._done)) for header in self._done]
        for header, part in zip(self._done, self._parts, strict=True):
            with part.open("r+b") as file:
                file.write(header.pack())
                file.flush()
                os.fsync(file.fileno())
        for part, path in zip(self._parts, self.paths, strict=True):
            part.rename(path)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._sha256.update(data)


def _unpack(path: Path, data: bytes) -> Header:
    if not data.startswith(MAGIC):
        raise ShardError(f"{path} is not a token shard: it does not begin with {MAGIC.decode()}")
    if len(data) < HEADER_BYTES:
        raise ShardError(f"{path} is truncated at byte {len(data)}, within its header")
    _, version, *numbers, fingerprint, sha256 = _FIELDS.unpack_from(data)
    if version != VERSION:
        raise ShardError(
            f"{path} is of version {version} (at offset {len(MAGIC)}); this fastgpt reads version "
            f"{VERSION}: prepare the data again, or use the fastgpt version that created it"
        )
    at = HEADER_BYTES - _CHECKSUM.size
    values: list[Any] = [*numbers, fingerprint.hex(), sha256.hex()]
    header = Header(*values)
    if zlib.crc32(data[:at]) != _CHECKSUM.unpack_from(data, at)[0] or header.id_bytes not in (2, 4):
        raise ShardError(f"{path} is damaged: its header (bytes 0 to {at}) fails its checksum")
    return header


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _name(prefix: Path, index: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{index:05d}.bin")


def _existing(prefix: Path) -> list[Path]:
    return sorted(prefix.parent.glob(f"{escape(prefix.name)}-{'[0-9]' * 5}.bin"))
