"""Checkpoints written by TensorFlow, and damaged or malicious files."""

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.checkpoint.load import CheckpointError
from fastgpt.interop.tensor_bundle import PIECE, TensorBundle
from tests.interop import bundle_writer as writer
from tests.interop.bundle_writer import FLOAT, HEADER, entry, number, part
from tests.interop.write_tf_checkpoint import gpt2_values, many_values, typed_values

WRITTEN = Path(__file__).parents[1] / "assets" / "tf-checkpoints"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"


def test_reads_each_dtype_and_shape_to_the_bit() -> None:
    bundle = TensorBundle(WRITTEN / "dtypes" / "model.ckpt")
    expected = typed_values()
    assert sorted(bundle.entries) == sorted(expected)
    for name, (dtype, value) in expected.items():
        read = bundle.read(name)
        assert read.dtype == bundle.entries[name].dtype == getattr(torch, dtype)
        assert read.shape == bundle.entries[name].shape == value.shape
        assert read.is_contiguous()
        assert _bytes_of(read) == value.tobytes()


def test_reads_an_index_of_several_blocks() -> None:
    bundle = TensorBundle(WRITTEN / "many" / "model.ckpt")
    assert bundle.index_path.stat().st_size > 256 << 10  # TensorFlow's block size
    expected = many_values()
    assert sorted(bundle.entries) == sorted(expected)
    for name, value in expected.items():
        assert np.array_equal(bundle.read(name).numpy(), value)


def test_reads_several_data_files() -> None:
    bundle = TensorBundle(WRITTEN / "sharded" / "model.ckpt")
    assert {entry.shard for entry in bundle.entries.values()} == {0, 1}
    for name, value in gpt2_values(4).items():
        assert np.array_equal(bundle.read(name).numpy(), value)


def test_each_tensor_owns_its_memory(tmp_path: Path) -> None:
    bundle = TensorBundle(_copy("openai", tmp_path))
    first = bundle.read("model/wte")
    assert first.untyped_storage().nbytes() == bundle.entries["model/wte"].size
    first.zero_()
    (tmp_path / DATA).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is truncated in tensor 'model/wte'"):
        bundle.read("model/wte")
    assert np.array_equal(
        TensorBundle(WRITTEN / "openai" / "model.ckpt").read("model/wte").numpy(),
        gpt2_values(0)["model/wte"],
    )


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_reads_tensors_of_several_pieces(tmp_path: Path, more: int) -> None:
    count = 3 * PIECE // 4 + more
    values = {"large": np.arange(count, dtype=np.int32), "small": np.int64([7])}
    writer.write_bundle(tmp_path / "model.ckpt", values)
    bundle = TensorBundle(tmp_path / "model.ckpt")
    large = bundle.read("large")
    assert np.array_equal(large.numpy(), values["large"])
    large.zero_()
    assert np.array_equal(bundle.read("large").numpy(), values["large"])
    assert bundle.read("small").tolist() == [7]


@pytest.mark.parametrize(
    ("folder", "what"), [("sliced", "in slices"), ("string", r"'words': its type 7 \(string\)")]
)
def test_refuses_what_tensorflow_writes_but_is_not_supported(folder: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        TensorBundle(WRITTEN / folder / "model.ckpt")


def test_says_which_tensor_there_is_not() -> None:
    bundle = TensorBundle(WRITTEN / "openai" / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.index has no tensor 'model/wpx'"):
        bundle.read("model/wpx")


def test_each_flipped_bit_of_an_index_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    prefix = _small(tmp_path)
    good = (tmp_path / INDEX).read_bytes()
    expected = _read_all(prefix)
    refused = 0
    for bit in _flipped_in_turn(tmp_path / INDEX):
        try:
            assert _read_all(prefix) == expected, f"bit {bit}"
        except CheckpointError:
            refused += 1
    assert refused > 7.9 * len(good)


def test_each_flipped_bit_of_the_data_is_refused(tmp_path: Path) -> None:
    prefix = _small(tmp_path)
    bundle = TensorBundle(prefix)
    for bit in _flipped_in_turn(tmp_path / DATA):
        hit = [
            name
            for name, entry in bundle.entries.items()
            if entry.offset <= bit // 8 < entry.offset + entry.size
        ]
        assert len(hit) == 1
        with pytest.raises(CheckpointError, match=f"{DATA} does not match the checksum .*{hit[0]}"):
            bundle.read(hit[0])


def test_an_index_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    prefix = _small(tmp_path)
    good = (tmp_path / INDEX).read_bytes()
    for size in range(len(good)):
        (tmp_path / INDEX).write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=INDEX):
            TensorBundle(prefix)


@pytest.mark.parametrize("size", [0, 1, 18911])
def test_data_that_was_cut_off_is_refused_at_once(tmp_path: Path, size: int) -> None:
    prefix = _copy("openai", tmp_path)
    (tmp_path / DATA).write_bytes((tmp_path / DATA).read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{DATA} has {size:,} bytes, but tensor .* ends at"):
        TensorBundle(prefix)


@pytest.mark.parametrize("name", [INDEX, DATA])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "dangling link"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, instead: str) -> None:
    prefix = _copy("openai", tmp_path)
    (tmp_path / name).unlink()
    if instead == "folder":
        (tmp_path / name).mkdir()
    elif instead == "pipe":
        os.mkfifo(tmp_path / name)
    elif instead == "dangling link":
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=name):
        TensorBundle(prefix)


def test_a_file_of_another_kind_is_refused_with_both_magic_numbers(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match="ends with 0x04034b5004034b50, not with 0xdb4775248"):
        TensorBundle(tmp_path / "model.ckpt")


# Entries for a data file of eight bytes, whose checksum is only verified when reading it.
GOOD = entry(FLOAT, [2], size=8)
REFUSED = {
    "no shards": (b"", "says 0 data files"),
    "negative shards": (number(1, -5), "says -5 data files"),
    "big-endian": (HEADER + number(2, 1), "not little-endian"),
    "version": (HEADER + part(3, number(1, 3) + number(2, 2)), "a reader of version 2"),
    "field": (HEADER + number(9, 1), "field 9 of type 0"),
    "wire type": (part(1, b"a"), "field 1 of type 2"),
    "group": (HEADER + b"\x0b" * 50, "field 1 of type 3"),
    "twice": (HEADER + HEADER, "field 1 occurs twice"),
    "cut short": (HEADER + part(3, b"abcdef")[:-2], "expected 6 more bytes, but only 4"),
    "endless number": (b"\x08" + b"\xff" * 20, "more than 64 bits"),
    "number of 65 bits": (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
    **{
        name: ({b"": HEADER, b"x": value}, f"tensor 'x': .*{what}")
        for name, value, what in [
            ("empty entry", b"", "its type 0"),
            ("resource", entry(20, [2], size=8), r"its type 20 \(resource\)"),
            ("future type", entry(1 << 40, [2], size=8), "its type 1099511627776"),
            ("size", entry(FLOAT, [3], size=8), r"float32 of shape \[3\] takes 12 bytes, not 8"),
            ("negative size", entry(FLOAT, [2], size=-8), "takes 8 bytes, not -8"),
            ("negative shape", entry(FLOAT, [-1, -2], size=8), "unknown or impossible"),
            ("huge shape", entry(FLOAT, [1 << 62, 4], size=8), "unknown or impossible"),
            ("huge and empty", entry(FLOAT, [0, 1 << 62, 4]), "unknown or impossible"),
            ("rank", entry(FLOAT, [1] * 65, size=4), "65 dimensions"),
            ("unknown rank", number(1, 1) + part(2, number(3, 1)), "unknown or impossible"),
            ("two shapes", number(1, 1) + part(2, b"") * 2, "several shapes"),
            ("shard", entry(FLOAT, [2], shard=1, size=8), "data file 1 of 1"),
            ("negative shard", entry(FLOAT, [2], shard=-1, size=8), "data file -1 of 1"),
            ("offset", entry(FLOAT, [2], offset=-8, size=8), "begins at -8"),
            ("slices", GOOD + part(7, b""), "in slices"),
            ("nested", GOOD + part(2, part(2, b"\x12" * 100)), "several shapes"),
        ]
    },
    "beyond the file": ({b"": HEADER, b"x": entry(FLOAT, [2], offset=1, size=8)}, "ends at 9"),
    "far beyond": ({b"": HEADER, b"x": entry(FLOAT, [1 << 50], size=1 << 52)}, "8 bytes, but"),
    "end wraps": ({b"": HEADER, b"x": entry(FLOAT, [2], offset=2**63 - 1, size=8)}, "ends at"),
    "no header": ({b"x": GOOD}, "first entry is not a header"),
    "slices themselves": ({b"": HEADER, b"\0x": GOOD}, "in slices"),
    "order": ({b"": HEADER, b"y": GOOD, b"x": GOOD}, "not in order: b'x' after b'y'"),
    "name": ({b"": HEADER, b"\xff": GOOD}, "not UTF-8"),
    "long name": ({b"": HEADER, b"x" * 1025: GOOD}, "a key has 1,025 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_right_checksums_too(tmp_path: Path, name: str) -> None:
    content, what = REFUSED[name]
    prefix = _bundle(
        tmp_path, writer.table(content if isinstance(content, dict) else {b"": content})
    )
    with pytest.raises(CheckpointError, match=what):
        TensorBundle(prefix)


def test_the_entries_that_are_refused_differ_from_one_that_is_not(tmp_path: Path) -> None:
    bundle = TensorBundle(_bundle(tmp_path, writer.table({b"": HEADER, b"x": GOOD})))
    assert bundle.entries["x"].shape == (2,)


BLOCK = writer.block([(0, b"", HEADER), (0, b"x", GOOD)])
SEALED = writer.sealed(BLOCK)
TABLES = {
    "snappy": (writer.table({b"": HEADER}, compression=1), r"compressed \(type 1\)"),
    "nothing": (writer.table_of_blocks([]), "0 data files"),
    "empty block": (writer.table_of_blocks([writer.block([])]), "0 data files"),
    "tiny block": (writer.table_of_blocks([b"\1"]), "no room for 1 offsets"),
    "offsets": (writer.table_of_blocks([struct.pack("<I", 1 << 30)]), "no room for 1,073,741,824"),
    "sharing": (
        writer.table_of_blocks([writer.block([(0, b"", HEADER), (5, b"x", GOOD)])]),
        "shares 5 bytes with a key of 0",
    ),
    "same block again": (
        writer.table_of_handles(SEALED, [writer.varint(0) + writer.varint(len(BLOCK))] * 2),
        "begins before the end",
    ),
    "beyond the end": (
        writer.table_of_handles(SEALED, [writer.varint(0) + writer.varint(1 << 60)]),
        "extends beyond the end",
    ),
    "half a handle": (
        writer.table_of_handles(SEALED, [b"\0"]),
        "expected 1 more bytes, but only 0",
    ),
    "more than a handle": (
        writer.table_of_handles(SEALED, [writer.varint(0) + writer.varint(len(BLOCK)) + b"\0"]),
        "more than the locations",
    ),
    "too large": (bytes((16 << 20) + 1), "more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("name", TABLES)
def test_refuses_a_table_with_right_checksums_too(tmp_path: Path, name: str) -> None:
    content, what = TABLES[name]
    with pytest.raises(CheckpointError, match=what):
        TensorBundle(_bundle(tmp_path, content))


def test_few_bytes_cannot_become_many_names(tmp_path: Path) -> None:
    """Each of 100,000 names shares a long prefix with the previous one."""
    rest = [(100_000, b"%05d" % i, GOOD) for i in range(50_000)]
    content = writer.block([(0, b"", HEADER), (0, b"x" * 100_000, GOOD), *rest])
    with pytest.raises(CheckpointError, match="a key has 100,000 bytes"):
        TensorBundle(_bundle(tmp_path, writer.table_of_blocks([content])))


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, end: bool
) -> None:
    """`end` adds the correct magic number."""
    content = data.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57) if end else data
    with pytest.raises(CheckpointError):
        TensorBundle(_bundle(_folder(tmp_path_factory), content))


_numbers = st.one_of(st.integers(0, 12), st.integers(-(1 << 63), (1 << 64) - 1))
_fields = st.recursive(
    st.builds(number, st.integers(0, 8), _numbers) | st.binary(max_size=6),
    lambda inner: st.builds(part, st.integers(0, 8), st.lists(inner, max_size=3).map(b"".join)),
    max_leaves=6,
)
_entries = st.one_of(
    st.lists(_fields, max_size=6).map(b"".join),
    st.builds(
        entry,
        st.sampled_from([1, 2, 3, 10, 14]),
        st.lists(_numbers, max_size=4),
        shard=st.sampled_from([0, 0, 0, 1, -1]),
        offset=_numbers,
        size=_numbers,
        more=st.just(b"") | _fields,
    ),
)


@given(
    st.just(HEADER) | _entries,
    st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=4), _entries), max_size=4),
)
def test_any_messages_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, entries: list[tuple[int, bytes, bytes]]
) -> None:
    content = writer.table_of_blocks([writer.block([(0, b"", header), *entries])])
    prefix = _bundle(_folder(tmp_path_factory), content)
    try:
        bundle = TensorBundle(prefix)
    except CheckpointError:
        return
    for name, found in bundle.entries.items():
        try:
            assert bundle.read(name).shape == found.shape
        except CheckpointError as error:
            assert "does not match the checksum" in str(error)  # noqa: PT017


@given(st.data())
def test_changes_of_several_bytes_are_refused_or_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = _folder(tmp_path_factory)
    prefix = _small(folder)
    expected = _read_all(prefix)
    content = bytearray((folder / INDEX).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    (folder / INDEX).write_bytes(content)
    try:
        assert _read_all(prefix) == expected
    except CheckpointError as error:
        assert INDEX in str(error) or DATA in str(error)  # noqa: PT017


def _copy(folder: str, to: Path) -> Path:
    shutil.copytree(WRITTEN / folder, to, dirs_exist_ok=True)
    return to / "model.ckpt"


def _small(folder: Path) -> Path:
    tensors = {"a": np.float32([[1, 2, 3]]), "a/b": np.int64(4)}
    writer.write_bundle(folder / "model.ckpt", tensors)
    return folder / "model.ckpt"


def _bundle(folder: Path, index: bytes) -> Path:
    """Write an index and a data file of eight bytes."""
    (folder / INDEX).write_bytes(index)
    (folder / DATA).write_bytes(bytes(8))
    return folder / "model.ckpt"


def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "again-and-again"
    folder.mkdir(exist_ok=True)
    return folder


def _flipped_in_turn(path: Path) -> Iterator[int]:
    """Flip each bit of a file in place, yield its position, and flip it back."""
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(good)):
            os.pwrite(file.fileno(), bytes([good[bit // 8] ^ 1 << bit % 8]), bit // 8)
            yield bit
            os.pwrite(file.fileno(), good[bit // 8 : bit // 8 + 1], bit // 8)


def _read_all(prefix: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    bundle = TensorBundle(prefix)
    read = {name: bundle.read(name) for name in bundle.entries}
    return {name: (tensor.dtype, tensor.shape, _bytes_of(tensor)) for name, tensor in read.items()}


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
