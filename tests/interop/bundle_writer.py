"""Writer of valid and invalid tensor bundles, always with correct checksums."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastgpt import _C

HEADER = b"\x08\x01"  # num_shards = 1
FLOAT, INT32, INT64 = 1, 3, 9


def write_bundle(prefix: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint of fp32, int32 and int64 tensors as TensorFlow would."""
    numbers = {np.dtype(np.float32): FLOAT, np.dtype(np.int32): INT32, np.dtype(np.int64): INT64}
    data, entries = b"", {b"": HEADER}
    for name in sorted(tensors, key=str.encode):
        content = tensors[name].tobytes()
        entries[name.encode()] = entry(
            numbers[tensors[name].dtype],
            tensors[name].shape,
            offset=len(data),
            size=len(content),
            crc=masked(_C.crc32c(content)),
        )
        data += content
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(entries))
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


def entry(
    dtype: int,
    shape: Sequence[int],
    *,
    shard: int = 0,
    offset: int = 0,
    size: int = 0,
    crc: int = 0,
    more: bytes = b"",
) -> bytes:
    """Return a BundleEntryProto."""
    dimensions = b"".join(part(2, number(1, dimension)) for dimension in shape)
    fields = number(1, dtype) + part(2, dimensions) + number(3, shard) + number(4, offset)
    return fields + number(5, size) + b"\x35" + struct.pack("<I", crc) + more


def number(field: int, value: int) -> bytes:
    """Return an integer field."""
    return varint(8 * field) + varint(value)


def part(field: int, content: bytes) -> bytes:
    """Return a field of bytes."""
    return varint(8 * field + 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    low, value = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(value) if value else bytes([low])


def table(entries: Mapping[bytes, bytes], compression: int = 0) -> bytes:
    """Return a table of one data block, with keys in the given order."""
    return table_of_blocks(
        [block([(0, key, value) for key, value in entries.items()])], compression
    )


def block(entries: Sequence[tuple[int, bytes, bytes]]) -> bytes:
    """Return a block of entries: length of the shared prefix, rest of the key, value."""
    content = b"".join(
        varint(shared) + varint(len(rest)) + varint(len(value)) + rest + value
        for shared, rest, value in entries
    )
    return content + struct.pack("<II", 0, 1)


def table_of_blocks(blocks: Sequence[bytes], compression: int = 0) -> bytes:
    """Return a table of the given data blocks."""
    content, handles = b"", []
    for data in blocks:
        handles.append(varint(len(content)) + varint(len(data)))
        content += sealed(data, compression)
    return table_of_handles(content, handles)


def table_of_handles(content: bytes, handles: Sequence[bytes]) -> bytes:
    """Return a table whose index block has the given locations of data blocks in `content`."""
    index = block([(0, b"%08d" % i, handle) for i, handle in enumerate(handles)])
    places = varint(len(content)) + varint(8)
    content += sealed(block([]))
    places += varint(len(content)) + varint(len(index))
    content += sealed(index)
    return content + places.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def sealed(data: bytes, compression: int = 0) -> bytes:
    """Return a block followed by its compression type and checksum."""
    data += bytes([compression])
    return data + struct.pack("<I", masked(_C.crc32c(data)))


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)
