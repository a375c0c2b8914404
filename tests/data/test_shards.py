"""Tests of token shards: writing, reading, and the detection of damaged files."""

import struct
import tempfile
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.data.shards import (
    HEADER_BYTES,
    ShardError,
    ShardWriter,
    read_shard,
    read_shards,
    verify_shard,
)
from fastgpt.data.token_files import ShardedIds, joined
from fastgpt.tokenizer import CharTokenizer
from fastgpt.utils.errors import UsageError

LETTERS = CharTokenizer("abcdefghij")
MANY = CharTokenizer(map(chr, range(0x10000, 0x10000 + 70_000)))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Return a shard of eleven ids and two documents, to be damaged by the tests."""
    with ShardWriter(tmp_path / "x", LETTERS) as writer:
        writer.append(np.arange(11, dtype=np.uint16) % 10, [4])
    return tmp_path / "x-00000.bin"


def test_what_is_in_a_shard(shard: Path) -> None:
    read = read_shard(shard, LETTERS)
    verify_shard(read)
    assert read.ids.dtype == np.uint16
    assert isinstance(read.ids, np.memmap)
    assert read.ids.tolist() == [*range(10), 0]
    assert read.document_starts.tolist() == [0, 4]
    assert (read.header.vocab_size, read.header.index, read.header.count) == (10, 0, 1)
    assert read.header.fingerprint == LETTERS.fingerprint
    assert shard.stat().st_size == HEADER_BYTES + 24 + 16


def test_a_vocabulary_beyond_uint16_is_stored_as_uint32(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", MANY) as writer:
        writer.append(np.array([0, 69_999, 3], np.uint32))
    read = read_shard(writer.paths[0], MANY)
    verify_shard(read)
    assert read.ids.dtype == np.uint32
    assert read.ids.tolist() == [0, 69_999, 3]


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.integers(1, 30), max_size=8),
    limit=st.integers(8, 40),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    data=st.data(),
)
def test_shards_are_one_row(documents, limit, cuts, data) -> None:
    """Check a round trip for any division into files and into calls of `append`."""
    n = sum(documents)
    ids = (np.arange(n) * 7 % 10).astype(np.uint16)
    starts, ends = np.cumsum([0, *documents])[:-1], np.cumsum([*documents])
    cuts = sorted({0, n, *(min(cut, n) for cut in cuts)})
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "x"
        with ShardWriter(prefix, LETTERS, limit) as writer:
            for first, last in pairwise(cuts):
                inside = ends[(ends > first) & (ends <= last)]
                writer.append(ids[first:last], inside - first)
        shards = read_shards(prefix, LETTERS)
        for shard in shards:
            verify_shard(shard)
        row = joined([shard.ids for shard in shards])
        assert (
            (writer.n_tokens, writer.n_documents) == (len(row), len(documents)) == (n, len(starts))
        )
        assert row[:].tolist() == ids.tolist()
        assert [len(shard.ids) for shard in shards[:-1]] == [limit] * (len(shards) - 1)
        firsts = np.cumsum([0, *(len(shard.ids) for shard in shards)])
        found = [f + s for f, sh in zip(firsts, shards, strict=False) for s in sh.document_starts]
        assert found == starts.tolist()
        if n:
            where = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=4, max_size=4)))
            assert (row[where.reshape(2, 2)] == ids[where.reshape(2, 2)]).all()


def test_one_row_of_several_files() -> None:
    row = ShardedIds([np.arange(5, dtype=np.uint16), np.arange(5, 7, dtype=np.uint16)])
    assert row[3:6].tolist() == [3, 4, 5]
    assert row[-2:].tolist() == [5, 6]
    assert len(row[6:2]) == 0
    assert row.dtype == np.uint16
    for where in (7, -1):
        with pytest.raises(IndexError, match="positions must be from 0 to 6"):
            row[np.array([0, where])]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "x", LETTERS, 4) as writer:
            writer.append(np.zeros(10, np.uint16))
            assert len([*tmp_path.iterdir()]) == 3  # under temporary names
            assert not [*tmp_path.glob("x*")]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not [*tmp_path.iterdir()]


def test_wrong_uses_of_the_writer(shard: Path) -> None:
    with pytest.raises(FileExistsError, match=r"x-00000\.bin exists: delete it, or choose"):
        ShardWriter(shard.parent / "x", LETTERS)
    with pytest.raises(ValueError, match="tokens_per_shard must be at least 1, not 0"):
        ShardWriter(shard.parent / "y", LETTERS, 0)
    with (
        pytest.raises(ValueError, match="id 10 is not in this vocabulary of 10"),
        ShardWriter(shard.parent / "y", LETTERS) as writer,
    ):
        writer.append(np.array([1, 10], np.uint16))
    assert [*shard.parent.iterdir()] == [shard]


def change(at: int, new: bytes):
    return lambda data: data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is not a token shard: it does not begin with fGPTshrd"),
        (lambda data: b"PK" + data[2:], "is not a token shard"),
        (lambda data: data[:100], "is truncated at byte 100, within"),
        (change(8, b"\x02"), r"is of version 2 \(at offset 8\); this fastgpt reads version 1"),
        (change(24, b"\xff"), r"is damaged: its header \(bytes 0 to 252\) fails its checksum"),
        (change(252, b"abcd"), "is damaged: its header"),
        (lambda data: data[:-1], "has 295 bytes, but 11 tokens and 2 documents require 296: it"),
        (lambda data: data + b"x", "has 297 bytes, but 11 tokens"),
        (lambda data: data[:256], "has 256 bytes, but"),
        (change(256 + 6, b"\x0a"), "id 10 at offset 262 is not in its vocabulary of 10"),
    ],
)
def test_faults_30_and_32_damaged(shard: Path, damage, message: str) -> None:
    shard.write_bytes(damage(shard.read_bytes()))
    for read in (read_shard, lambda path, *args: read_shards(path.parent / "x", *args)[0]):
        with pytest.raises(UsageError, match=message) as error:
            verify_shard(read(shard, LETTERS))
        assert str(error.value).startswith(str(shard))


def test_a_shard_changed_after_it_was_written_is_detected(shard: Path) -> None:
    verify_shard(read_shard(shard))
    shard.write_bytes(change(256 + 6, b"\x01")(shard.read_bytes()))
    with pytest.raises(ShardError, match=r"x-00000\.bin was modified after it was written"):
        verify_shard(read_shard(shard, LETTERS))


def test_an_unsupported_id_size_is_rejected(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[12] = 3
    data[252:256] = struct.pack("<I", zlib.crc32(bytes(data[:252])))
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="is damaged"):
        read_shard(shard)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 295), byte=st.integers(0, 255), end=st.integers(0, 300))
def test_a_damaged_header_or_length_is_detected(shard, at, byte, end) -> None:
    """Check that a change of any byte of the header or of the length is detected."""
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[at] = byte
    path = shard.parent / "damaged"
    for content in (bytes(damaged), whole[:end]):
        path.write_bytes(content)
        if content[:256] == whole[:256] and len(content) == len(whole):
            assert len(read_shard(path, LETTERS).ids) == 11
            continue
        with pytest.raises(ShardError, match="damaged"):  # its name
            read_shard(path, LETTERS)


def test_another_tokenizer(shard: Path) -> None:
    with pytest.raises(ShardError, match=r"another tokenizer: its fingerprint is \w{16}, not"):
        read_shard(shard, CharTokenizer("abcdefghik"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot be read: No such file"):
        read_shard(tmp_path / "no.bin")
    with pytest.raises(ShardError, match=r"x-00000\.bin does not exist"):
        read_shards(tmp_path / "x")
    with ShardWriter(tmp_path / "x", LETTERS, 4) as writer:
        writer.append(np.zeros(12, np.uint16))
    first, middle, last = writer.paths
    with ShardWriter(tmp_path / "other", LETTERS) as other:
        other.append(np.zeros(4, np.uint16), [0])
    content = last.read_bytes()
    other.paths[0].rename(last)
    with pytest.raises(
        ShardError, match=r"x-00002\.bin is shard 0 of 1 according to its header: it does not"
    ):
        read_shards(tmp_path / "x")
    last.unlink()
    with pytest.raises(ShardError, match=r"x-00002\.bin is missing: there must be 3 shards"):
        read_shards(tmp_path / "x")
    last.write_bytes(content)
    middle.unlink()
    with pytest.raises(ShardError, match=r"x-00001\.bin is missing"):
        read_shards(tmp_path / "x")
    first.unlink()
    with pytest.raises(ShardError, match=r"x-00000\.bin is missing"):
        read_shards(tmp_path / "x")
