"""Text to tokens to batches."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import Batches, load_corpus, mix, permute, read_text
from fastgpt.errors import UsageError


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permute_is_one_to_one(size: int, seed: int) -> None:
    image = permute(np.arange(size, dtype=np.uint64), size, mix(seed, 0))
    assert sorted(image.tolist()) == list(range(size))


def test_permute_depends_on_its_key_and_scatters() -> None:
    index = np.arange(10_000, dtype=np.uint64)
    first, second = (permute(index, 10_000, mix(0, key)) for key in (1, 2))
    assert (first == second).mean() < 0.01
    assert (first == index).mean() < 0.01
    assert abs(np.corrcoef(first.astype(float), index.astype(float))[0, 1]) < 0.05


def test_mix_is_splitmix64() -> None:
    """Steele, Lea & Flood's generator seeded with 0: its published first outputs."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(mix(0, i)) for i in range(3)] == expected


@pytest.mark.parametrize(("n_tokens", "block", "batch"), [(100, 7, 4), (64, 8, 3), (1000, 16, 64)])
def test_every_window_exactly_once_an_epoch(n_tokens: int, block: int, batch: int) -> None:
    batches = Batches(np.arange(n_tokens, dtype=np.uint16), block, batch, seed=3)
    starts = []
    for step in range(2 * batches.n_windows):
        inputs, targets = batches[step]
        assert inputs.shape == targets.shape == (batch, block)
        assert (targets == inputs + 1).all()
        starts += inputs[:, 0].tolist()
        assert ((inputs - inputs[:, :1]) == np.arange(block)).all()
    epochs = [starts[i : i + batches.n_windows] for i in range(0, len(starts), batches.n_windows)]
    offsets = set()
    for epoch in epochs[: 2 * batch]:
        in_order = sorted(epoch)
        offsets.add(in_order[0])
        assert in_order == list(range(in_order[0], in_order[-1] + 1, block))
    assert epochs[0] != epochs[1]
    assert len(offsets) > 1  # each epoch cuts the text elsewhere
    assert max(starts) + block < n_tokens


def test_batches_are_a_function_of_seed_and_step() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    one, two = Batches(tokens, 16, 4, seed=1), Batches(tokens, 16, 4, seed=1)
    later = one[1234][0]
    for step in (0, 7, 99):
        _ = two[step]
    assert (two[1234][0] == later).all()
    assert (Batches(tokens, 16, 4, seed=2)[1234][0] != later).any()


@pytest.mark.parametrize("size", [0, 1, 31])
def test_fault_31_less_data_than_a_context(size: int) -> None:
    with pytest.raises(UsageError, match=f"has {size} tokens, but block_size=16 needs .* 32"):
        Batches(np.zeros(size, dtype=np.uint16), 16, 2, seed=0)


def test_fault_31_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist; give .* one of: shakespeare"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match=r"empty.txt is empty \(0 bytes\)"):
        read_text(tmp_path / "empty.txt")


def test_fault_35_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"x" * 1500 + "é".encode("latin1") + b"y")
    with pytest.raises(UsageError, match="not UTF-8: byte 0xe9 at offset 1,500; convert it"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbfabc\xff")
    with pytest.raises(UsageError, match="not UTF-8: byte 0xff at offset 6"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UsageError, match=r"is empty \(3 bytes\)"):
        read_text(path)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "notepad.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_text(path) == "one\ntwo\n"


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_text_is_split_in_order(verse: Path, tokenizer: str) -> None:
    corpus = load_corpus(str(verse), tokenizer, 0.1)
    text = verse.read_text(encoding="utf-8")
    assert corpus.tokenizer.decode(corpus.train) == text[:10_800]
    assert corpus.tokenizer.decode(corpus.val) == text[10_800:]
    assert corpus.train.dtype == np.uint16


def test_the_packaged_text() -> None:
    corpus = load_corpus("shakespeare")
    assert corpus.tokenizer.vocab_size == 65
    assert len(corpus.train) + len(corpus.val) == 1_115_394
