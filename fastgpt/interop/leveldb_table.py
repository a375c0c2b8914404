"""Reader of LevelDB's sorted tables: ordered keys and values in blocks with checksums.

The format: https://github.com/google/leveldb/blob/main/doc/table_format.md. TensorFlow stores the
index of a checkpoint in such a table, without compression and without LevelDB's filters.

    data block ...       entries; a key is stored as the length of the prefix that it shares with
                         the previous key, and the remaining bytes
    metaindex block      empty in TensorFlow's tables
    index block          for each data block: a key not less than its last one, and its location
    footer, 48 bytes     locations of the metaindex and index blocks, zeros, the magic number

Each block is followed by a byte for the compression type (0: none) and the checksum of both.
"""

from collections.abc import Iterator
from pathlib import Path

from fastgpt.interop.wire import Reader, UnsupportedError
from fastgpt.utils.extension import _C

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # compression type and checksum
# Far above real tables. Without a limit, entries that share long prefixes could expand a small file
# to a huge amount of data.
LARGEST_TABLE = 16 << 20
LONGEST_KEY = 1024


def read_table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table, in strictly increasing order of the keys.

    Raises: ValueError for a file that is damaged or of another kind (UnsupportedError if it uses
        features that are not supported), OSError if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_TABLE + 1)
    metaindex, index = _footer(content)
    if any(_entries(_block(content, *metaindex))):
        raise UnsupportedError("its metaindex block is not empty, as it is in TensorFlow's tables")
    last_key, last_end = None, 0
    for _, handle in _entries(_block(content, *index)):
        offset, size = _handle(Reader(handle))
        if offset < last_end:  # otherwise a damaged index could repeat blocks without end
            raise ValueError(f"its block at {offset:,} begins before the end of the one before it")
        last_end = offset + size
        for key, value in _entries(_block(content, offset, size)):
            if last_key is not None and key <= last_key:
                raise ValueError(f"its keys are not in order: {key!r:.80} after {last_key!r:.80}")
            last_key = key
            yield key, value


def masked_crc32c(crc: int) -> int:
    """Return a CRC-32C in the masked form stored in these files.

    The CRC is rotated by 15 bits and a constant is added, because the CRC of data that contains its
    own unmasked CRC would be a fixed number.
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _footer(content: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the locations (offset, size) of the metaindex block and the index block."""
    if len(content) > LARGEST_TABLE:
        raise ValueError(
            f"it has more than {LARGEST_TABLE:,} bytes, too many for the index of a checkpoint"
        )
    if len(content) < FOOTER_BYTES:
        raise ValueError(
            f"it has {len(content):,} bytes, fewer than the {FOOTER_BYTES} of a table's footer: it "
            "was truncated, or is of another kind"
        )
    magic = int.from_bytes(content[-8:], "little")
    if magic != MAGIC:
        raise ValueError(
            f"it ends with {magic:#018x}, not with {MAGIC:#018x} as TensorFlow's index files do: "
            "it was truncated, or is of another kind"
        )
    reader = Reader(content[-FOOTER_BYTES:-8])
    metaindex, index = _read_handle(reader), _read_handle(reader)
    while not reader.done:
        if reader.take(1) != b"\0":
            raise ValueError("its last 48 bytes are damaged")
    return metaindex, index


def _handle(reader: Reader) -> tuple[int, int]:
    """Return the location of a block from a value that consists of one handle."""
    handle = _read_handle(reader)
    if not reader.done:
        raise ValueError("its index block has more than the locations of blocks")
    return handle


def _read_handle(reader: Reader) -> tuple[int, int]:
    return reader.varint(), reader.varint()


def _block(content: bytes, offset: int, size: int) -> bytes:
    """Return the content of a block after verifying its checksum."""
    end = offset + size
    if end + TRAILER_BYTES + FOOTER_BYTES > len(content):
        raise ValueError(
            f"its block of {size:,} bytes at {offset:,} extends beyond the end of the file of "
            f"{len(content):,} bytes: it was truncated or changed"
        )
    compression = content[end]
    stored = int.from_bytes(content[end + 1 : end + TRAILER_BYTES], "little")
    if masked_crc32c(_C.crc32c(content[offset : end + 1])) != stored:
        raise ValueError(f"its block of {size:,} bytes at {offset:,} does not match its checksum")
    if compression != 0:
        raise UnsupportedError(
            f"its block at {offset:,} is compressed (type {compression}), which is not supported "
            "and not TensorFlow's default: save the checkpoint again without compression"
        )
    return content[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block.

    A block ends with the offsets of entries with full keys (restart points, for binary search) and
    the number of these offsets.
    """
    n_full = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * n_full
    if end < 0:
        raise ValueError(f"a block of {len(block):,} bytes has no room for {n_full:,} offsets")
    reader = Reader(block[:end])
    key = b""
    while not reader.done:
        shared, added, size = reader.varint(), reader.varint(), reader.varint()
        if shared > len(key):
            raise ValueError(f"a key shares {shared:,} bytes with a key of {len(key):,}")
        if shared + added > LONGEST_KEY:
            raise ValueError(f"a key has {shared + added:,} bytes, which is too long for a name")
        key = key[:shared] + reader.take(added)
        yield key, reader.take(size)
