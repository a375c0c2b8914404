"""Tests of reading a whole text, in any format, and of splitting it."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.corpus import load_corpus
from fastgpt.data.text import Text, read_text
from fastgpt.tokenizer import Tokenizer
from fastgpt.utils.errors import UsageError


def test_missing_and_empty_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist; pass .* one of: shakespeare"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match=r"empty.txt is empty \(0 bytes\)"):
        read_text(tmp_path / "empty.txt")


def test_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"x" * 1500 + "é".encode("latin1") + b"y")
    with pytest.raises(UsageError, match=r"not UTF-8: byte 0xe9 at offset 1,500; .* iconv"):
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
    assert str(read_text(path)) == "one\ntwo\n"


RECORDS = ["One\n", "Two", "<|endoftext|>"]  # the last one is text, not a marker


@pytest.mark.parametrize("name", ["a.jsonl", "A.NDJSON", "a.json", "a.jsonl.gz"])
def test_training_reads_the_texts_of_records(tmp_path: Path, name: str) -> None:
    """Compare with the texts themselves; a character tokenizer has a newline between them."""
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in RECORDS).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    text = read_text(path)
    assert str(text) == "One\n\nTwo\n<|endoftext|>\n"
    assert text.documents == [(record, True) for record in RECORDS]
    gpt2 = load_corpus(str(path), "gpt2", val_fraction=0.0)
    expected = [id for record in RECORDS for id in [*Tokenizer.gpt2().encode(record), 50256]]
    assert gpt2.train.tolist() == expected
    char = load_corpus(str(path), "char", val_fraction=0.0)
    assert char.tokenizer.decode(char.train) == str(text)


@given(st.lists(st.text("ab\n", max_size=9), min_size=1), st.floats(0, 1), st.booleans())
def test_the_parts_of_a_split_are_the_text(texts: list[str], fraction: float, plain: bool) -> None:
    text = Text([("".join(texts), False)] if plain else [(t, True) for t in texts], plain)
    train, val = text.split(fraction)
    n_characters = sum(map(len, texts))
    assert sum(len(piece) for piece, _ in val.pieces) == int(n_characters * fraction)
    assert str(train) + str(val) == str(text)
    assert (text.sha256 == hashlib.sha256(str(text).encode()).hexdigest()) == plain


def test_the_hash_depends_on_where_documents_end() -> None:
    hashes = {
        Text([("a", True), ("b", True)], False).sha256,
        Text([("ab", True)], False).sha256,
        Text([("a\nb", True)], False).sha256,
        Text([("ab", False)], True).sha256,
    }
    assert len(hashes) == 4
