"""Reader of TensorFlow checkpoints (format V2, "tensor bundle") that does not need TensorFlow.

    model.ckpt.index                 a table (`leveldb_table`) of a BundleEntryProto per name
    model.ckpt.data-00000-of-00001   the tensors' elements, little-endian; several such files
                                     ("shards") if several devices held the variables

The entry with the empty name is a BundleHeaderProto. Both messages are described in
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto.
Checksums cover the whole index and each tensor.
"""

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fastgpt.checkpoint.load import CheckpointError
from fastgpt.checkpoint.tensor_file import host_memory
from fastgpt.interop.leveldb_table import masked_crc32c, read_table
from fastgpt.interop.wire import BYTES, FIXED32, VARINT, Message, UnsupportedError
from fastgpt.utils.extension import _C

VERSION = 1  # newest supported version of the format
LARGEST_RANK = 64  # PyTorch's limit
PIECE = 1 << 20  # bytes per read, small enough to be in cache when the checksum is computed

# Type numbers of tensorflow/core/framework/types.proto
_DTYPES = {
    **{1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16},
    **{3: torch.int32, 5: torch.int16, 6: torch.int8, 9: torch.int64},
    **{4: torch.uint8, 17: torch.uint16, 22: torch.uint32, 23: torch.uint64},
    **{8: torch.complex64, 10: torch.bool, 18: torch.complex128},
}
_OTHER_TYPES = {7: "string", 20: "resource", 21: "variant"}

_HEADER = {1: VARINT, 2: VARINT, 3: BYTES}  # num_shards, endianness, version
_VERSION = {1: VARINT, 2: VARINT}  # producer, min_consumer
_ENTRY = {  # dtype, shape, shard_id, offset, size, crc32c, slices
    **{1: VARINT, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: BYTES}
}
_SHAPE = {2: BYTES, 3: VARINT}  # dim, unknown_rank
_DIMENSION = {1: VARINT, 2: BYTES}  # size, name
_DAMAGED = "copy or download the checkpoint again"
_IN_SLICES = (
    "a variable is stored in slices (partitions), which is not supported: save the checkpoint "
    "again without a partitioner"
)


@dataclass(frozen=True)
class Entry:
    """The index entry of a tensor: its dtype, shape and location in a data file (shard).

    crc32c: the masked checksum of its bytes (`leveldb_table.masked_crc32c`).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc32c: int


class TensorBundle:
    """A TensorFlow checkpoint whose index has been read and checked; tensors are read lazily.

    prefix: the common prefix of its file names, such as ``124M/model.ckpt``.

    Raises: CheckpointError with the file and what in it is damaged or not supported (sliced
        variables, strings, compression, big-endian data).
    """

    def __init__(self, prefix: Path) -> None:
        self.index_path = prefix.with_name(f"{prefix.name}.index")
        self._prefix = prefix
        _require_file(self.index_path)
        try:
            self._n_shards, entries = _read_index(self.index_path)
        except UnsupportedError as error:
            raise CheckpointError(f"{self.index_path}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{self.index_path}: {error}; {_DAMAGED}") from None
        except OSError as error:
            raise CheckpointError(f"{self.index_path} cannot be read: {error.strerror}") from None
        self.entries: Mapping[str, Entry] = MappingProxyType(entries)
        self._require_data()

    def read(self, name: str) -> Tensor:
        """Return a tensor in its own memory; CheckpointError if its checksum does not match."""
        if name not in self.entries:
            raise CheckpointError(f"{self.index_path} has no tensor {name!r:.80}")
        entry = self.entries[name]
        path = self._shard_path(entry.shard)
        # Large tensors get their own pages. Callers often copy them to another tensor and free
        # them, which would otherwise leave holes in the heap.
        own_pages = entry.size >= PIECE
        elements = (
            host_memory(entry.size) if own_pages else torch.empty(entry.size, dtype=torch.uint8)
        )
        try:
            crc = _read_into(elements.numpy().data, path, entry.offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if crc is None or masked_crc32c(crc) != entry.crc32c:
            what = "is truncated in" if crc is None else "does not match the checksum of"
            raise CheckpointError(
                f"{path} {what} tensor {name!r:.80} ({entry.size:,} bytes at {entry.offset:,}): "
                f"{_DAMAGED}"
            )
        return elements.view(entry.dtype).view(entry.shape)

    def _require_data(self) -> None:
        """Check that all data files exist and are long enough for their tensors."""
        sizes: dict[int, int] = {}
        for name, entry in self.entries.items():
            path = self._shard_path(entry.shard)
            if entry.shard not in sizes:
                sizes[entry.shard] = _require_file(path)
            end = entry.offset + entry.size
            if end > sizes[entry.shard]:
                raise CheckpointError(
                    f"{path} has {sizes[entry.shard]:,} bytes, but tensor {name!r:.80} ends at "
                    f"{end:,}: it was truncated, or belongs to another index; {_DAMAGED}"
                )

    def _shard_path(self, shard: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.data-{shard:05}-of-{self._n_shards:05}")


def _read_index(path: Path) -> tuple[int, dict[str, Entry]]:
    """Return the number of data files, and the entries by name."""
    table = read_table(path)
    name, value = next(table, (b"", b""))
    if name:
        raise ValueError("its first entry is not a header, as in TensorFlow's index files")
    n_shards = _read_header(value)
    entries = {}
    for key, value in table:
        if key.startswith(b"\0"):  # the key of a slice
            raise UnsupportedError(_IN_SLICES)
        try:
            entries[key.decode()] = _read_entry(value, n_shards)
        except UnicodeDecodeError:
            raise ValueError(f"the name {key!r:.80} is not UTF-8") from None
        except ValueError as error:
            raise type(error)(f"tensor {key.decode()!r:.80}: {error}") from None
    return n_shards, entries


def _read_header(value: bytes) -> int:
    """Return the number of data files after checking byte order and version in the header."""
    header = Message(value, _HEADER)
    n_shards, endianness = header.signed(1), header.number(2)
    if n_shards < 1:
        raise ValueError(f"its header says {n_shards} data files")
    if endianness != 0:
        raise UnsupportedError(f"its data is not little-endian (byte order {endianness})")
    for version in header.parts(3):
        needed = Message(version, _VERSION).number(2)
        if needed > VERSION:
            raise UnsupportedError(f"it needs a reader of version {needed}; this one is {VERSION}")
    return n_shards


def _read_entry(value: bytes, n_shards: int) -> Entry:
    message = Message(value, _ENTRY)
    if message.parts(7):
        raise UnsupportedError(_IN_SLICES)
    number = message.number(1)
    if number not in _DTYPES:
        name = _OTHER_TYPES.get(number, "see TensorFlow's types.proto")
        raise UnsupportedError(f"its type {number} ({name}) is not supported")
    shape = _read_shape(message.parts(2))
    entry = Entry(
        _DTYPES[number],
        shape,
        shard=message.signed(3),
        offset=message.signed(4),
        size=message.signed(5),
        crc32c=message.number(6),
    )
    if not 0 <= entry.shard < n_shards:
        raise ValueError(f"it is in data file {entry.shard} of {n_shards}")
    if entry.offset < 0:
        raise ValueError(f"it begins at {entry.offset}")
    expected = entry.dtype.itemsize * math.prod(shape)
    if entry.size != expected:
        raise ValueError(
            f"{entry.dtype} of shape {list(shape)} takes {expected:,} bytes, not {entry.size:,}"
        )
    return entry


def _read_shape(parts: list[bytes]) -> tuple[int, ...]:
    """Return the shape of an entry; without a shape message, the tensor is a scalar."""
    if len(parts) > 1:
        raise ValueError("it has several shapes")
    shape = Message(b"".join(parts), _SHAPE)
    dimensions = [Message(dimension, _DIMENSION).signed(1) for dimension in shape.parts(2)]
    if len(dimensions) > LARGEST_RANK:
        raise ValueError(f"it has {len(dimensions):,} dimensions; the limit is {LARGEST_RANK}")
    # Strides are products of the nonzero sizes, and must fit PyTorch's 64-bit integers.
    if (
        shape.number(3)
        or min(dimensions, default=0) < 0
        or math.prod(filter(None, dimensions)) >= 1 << 60
    ):
        raise ValueError(f"its shape is unknown or impossible: {dimensions}")
    return tuple(dimensions)


def _require_file(path: Path) -> int:
    """Return the size of a regular file; CheckpointError if it does not exist."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path} is missing or cannot be read ({error.strerror}): put all files of the "
            "checkpoint into one folder"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a file")
    return status.st_size


def _read_into(to: memoryview, path: Path, offset: int) -> int | None:
    """Fill `to` from a file and return its CRC-32C, or None if the file ends before that."""
    crc, done = 0, 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset, os.SEEK_SET)
        while done < len(to):
            piece = to[done : done + PIECE]
            n_read = file.readinto(piece)
            if not n_read:
                return None
            crc = _C.crc32c(piece[:n_read], crc)
            done += n_read
    return crc
