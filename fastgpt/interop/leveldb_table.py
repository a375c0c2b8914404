"""LevelDB's sorted table: keys and values in order, in blocks that each have a checksum.

The format: https://github.com/google/leveldb/blob/main/doc/table_format.md. TensorFlow keeps the
index of a checkpoint in one, without compression and without LevelDB's filters.

    data block ...       entries; a key is given by how much of the one before it it shares
    metaindex block      empty here
    index block          of each data block: a key at or after its last one, and where it is
    footer, 48 bytes     where those two are, zeros, the magic number

After each block come a byte, 0 if it is not compressed, and the checksum of all that.
"""

from collections.abc import Iterator
from pathlib import Path

from fastgpt.interop.wire import Reader, UnsupportedError
from fastgpt.utils.extension import _C

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # the type of compression, and the checksum
# Real ones are far below. Entries that share long keys would turn few bytes into very many.
LARGEST_TABLE = 16 << 20
LONGEST_KEY = 1024


def read_table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table, in order; keys rise.

    Raises ValueError for a file that is damaged or of another kind (UnsupportedError: if it has
    what is not supported), OSError if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_TABLE + 1)
    metaindex, index = _footer(content)
    if any(_entries(_block(content, *metaindex))):
        raise UnsupportedError("its metaindex block is not empty, as it is in TensorFlow's tables")
    last_key, last_end = None, 0
    for _, handle in _entries(_block(content, *index)):
        offset, size = _handle(Reader(handle))
        if offset < last_end:  # else a few blocks could be read again and again
            raise ValueError(f"its block at {offset:,} begins before the end of the one before it")
        last_end = offset + size
        for key, value in _entries(_block(content, offset, size)):
            if last_key is not None and key <= last_key:
                raise ValueError(f"its keys are not in order: {key!r:.80} after {last_key!r:.80}")
            last_key = key
            yield key, value


def masked_crc32c(crc: int) -> int:
    """Return a CRC-32C as these files store it.

    Turned and shifted, so that the checksum of data with checksums in it is not a fixed number.
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _footer(content: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return where the metaindex block is, and the index block: each an offset and a size."""
    if len(content) > LARGEST_TABLE:
        raise ValueError(f"it has more than {LARGEST_TABLE:,} bytes: no index of a checkpoint")
    if len(content) < FOOTER_BYTES:
        raise ValueError(
            f"it has {len(content):,} bytes, and the end of such a table alone takes "
            f"{FOOTER_BYTES}: it was cut off, or is of another kind"
        )
    magic = int.from_bytes(content[-8:], "little")
    if magic != MAGIC:
        raise ValueError(
            f"it ends with {magic:#018x}, not with {MAGIC:#018x} as TensorFlow's index files do: "
            "it was cut off, or is of another kind"
        )
    reader = Reader(content[-FOOTER_BYTES:-8])
    metaindex, index = _read_handle(reader), _read_handle(reader)
    while not reader.done:
        if reader.take(1) != b"\0":
            raise ValueError("its last 48 bytes are damaged")
    return metaindex, index


def _handle(reader: Reader) -> tuple[int, int]:
    """Return where a block is, from a value that holds nothing else."""
    handle = _read_handle(reader)
    if not reader.done:
        raise ValueError("its index block holds more than the places of blocks")
    return handle


def _read_handle(reader: Reader) -> tuple[int, int]:
    return reader.varint(), reader.varint()


def _block(content: bytes, offset: int, size: int) -> bytes:
    """Return what a block holds, its checksum checked."""
    end = offset + size
    if end + TRAILER_BYTES + FOOTER_BYTES > len(content):
        raise ValueError(
            f"its block of {size:,} bytes at {offset:,} would reach beyond the end of the file's "
            f"{len(content):,}: it was cut off or changed"
        )
    compression = content[end]
    stored = int.from_bytes(content[end + 1 : end + TRAILER_BYTES], "little")
    if masked_crc32c(_C.crc32c(content[offset : end + 1])) != stored:
        raise ValueError(f"its block of {size:,} bytes at {offset:,} does not have its checksum")
    if compression != 0:
        raise UnsupportedError(
            f"its block at {offset:,} is compressed (type {compression}), which is not supported "
            "and not TensorFlow's default: save the checkpoint again without"
        )
    return content[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block.

    At its end: the offsets where keys are given in full, for a binary search, and their number.
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
            raise ValueError(f"a key shares {shared:,} bytes with one of {len(key):,}")
        if shared + added > LONGEST_KEY:
            raise ValueError(f"a key of {shared + added:,} bytes: no name is so long")
        key = key[:shared] + reader.take(added)
        yield key, reader.take(size)
