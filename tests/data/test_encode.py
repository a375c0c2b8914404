"""Tests that encoding a file in blocks gives the ids of the whole text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.data.documents import cut_at_pieces
from fastgpt.data.encode import encode_file
from fastgpt.data.shards import read_shards, verify_shard
from fastgpt.tokenizer import CharTokenizer
from fastgpt.utils import text_files
from fastgpt.utils.errors import UsageError
from fastgpt.utils.extension import _C
from fastgpt.utils.text_files import read_blocks
from fastgpt.utils.threads import map_in_order

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRICKY = st.text() | st.text(
    st.sampled_from("'stlve aL1²漢é́ \n\t\r\u00a0\u3000\u0085\x1c\x0b.!<|>😀\ufeff\u200d\x00")
)
NOTHING = ("", "\ufeff")  # tested separately


def encoded(tokenizer, path: Path, out: Path, **options) -> list[int]:
    paths = encode_file(tokenizer, path, out, **options)
    shards = read_shards(out, tokenizer)
    for shard in shards:
        verify_shard(shard)
    assert [shard.path for shard in shards] == paths
    assert [shard.document_starts.tolist() for shard in shards] == [[0], *[[]] * (len(paths) - 1)]
    ids = np.concatenate([shard.ids for shard in shards]).tolist()
    for file in paths:
        file.unlink()
    return ids


@SETTINGS
@given(text=TRICKY.filter(lambda text: text not in NOTHING), size=st.integers(1, 9), data=st.data())
def test_any_blocks_are_the_whole_text(gpt2, tmp_path, monkeypatch, text, size, data):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    whole = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    assert b"".join(read_blocks(path, size)).decode() == whole
    options = {"threads": data.draw(st.sampled_from([1, 2])), "tokens_per_shard": 20}
    assert encoded(gpt2, path, tmp_path / "a", **options) == gpt2.encode(whole)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TRICKY))
def test_pieces_are_cut_only_where_the_pattern_cuts(gpt2, texts):
    blocks = [text.encode() for text in texts]
    pieces = [*cut_at_pieces(blocks)]
    assert b"".join(pieces) == b"".join(blocks)
    assert [i for piece in pieces for i in gpt2.encode(piece)] == gpt2.encode(b"".join(blocks))


@settings(max_examples=300, deadline=None)
@given(data=st.binary() | st.text().map(str.encode) | st.text(alphabet="aé漢😀").map(str.encode))
def test_valid_utf8_as_python_decodes(data):
    try:
        data.decode()
        expected = len(data)
    except UnicodeDecodeError as error:
        expected = error.start
    assert _C.valid_utf8(data) == expected


@SETTINGS
@given(text=st.text(st.sampled_from("a\r\n")).map(str.encode))
def test_unix_newlines(text):
    assert _C.unix_newlines(text) == text.replace(b"\r\n", b"\n")


def test_valid_utf8_of_all_characters_and_their_neighbors():
    for point in range(0x7F, 0x110000, 0x3F):
        data = chr(point).encode("utf-8", "surrogatepass")
        valid = not 0xD800 <= point < 0xE000
        assert _C.valid_utf8(b"a" + data + b"b") == (2 + len(data) if valid else 1), hex(point)
    for data in (
        b"\xc0\x80",
        b"\xc1\xbf",
        b"\xe0\x9f\xbf",
        b"\xf0\x8f\xbf\xbf",
        b"\xf4\x90\x80\x80",
    ):
        assert _C.valid_utf8(data) == 0


def test_a_long_text_in_several_threads(gpt2, tmp_path, monkeypatch, multilingual):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 12)
    path = tmp_path / "a.txt"
    path.write_text(multilingual * 3, encoding="utf-8")
    assert encoded(gpt2, path, tmp_path / "a", threads=3) == gpt2.encode(multilingual * 3)
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        encode_file(gpt2, path, tmp_path / "a", threads=0)


def test_single_characters(tmp_path, shakespeare, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 12)
    tokenizer = CharTokenizer.from_text(shakespeare)
    path = tmp_path / "a.txt"
    path.write_text(shakespeare[:50_000], encoding="utf-8")
    ids = encoded(tokenizer, path, tmp_path / "a")
    assert tokenizer.decode(ids) == shakespeare[:50_000]
    path.write_text(shakespeare[:50_000] + "é", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt, after 4\d,\d* bytes: character 'é'"):
        encode_file(tokenizer, path, tmp_path / "b")
    assert not [*tmp_path.glob("*b-*")]


def test_windows_line_ends_and_the_byte_order_mark_across_blocks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\r\n\r\r\né\r\n\ufeff\r".encode())
    for size in range(1, 20):
        assert b"".join(read_blocks(path, size)).decode() == "\n\r\né\n\ufeff\r"


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize(
    "content", [b"x" * 1500 + b"\xe9y", b"\xef\xbb\xbfab\r\n\xff", b"caf\xc3", b"a\xf0\x9f\x98 b"]
)
def test_text_that_is_not_utf8_is_rejected(gpt2, tmp_path, content, size):
    path = tmp_path / "latin1.txt"
    path.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as oracle:
        content.decode()
    place = f"byte 0x{content[oracle.value.start]:02x} at offset {oracle.value.start:,};"
    with pytest.raises(UsageError, match=place):
        list(read_blocks(path, size))
    with pytest.raises(UsageError, match="not UTF-8"):
        encode_file(gpt2, path, tmp_path / "out")
    assert [*tmp_path.iterdir()] == [path]


def test_empty_and_missing_files_are_rejected(gpt2, tmp_path):
    for content in NOTHING:
        (tmp_path / "empty.txt").write_text(content, "utf-8")
        message = rf"empty\.txt is empty \({len(content.encode())} bytes\)"
        with pytest.raises(UsageError, match=message):
            encode_file(gpt2, tmp_path / "empty.txt", tmp_path / "a")
    unreadable = {"no.txt": "No such file", ".": "Is a directory", "a" * 300: "File name too long"}
    for name, reason in unreadable.items():
        with pytest.raises(UsageError, match=f"cannot be read: {reason}"):
            encode_file(gpt2, tmp_path / name, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_memory_use_does_not_grow_with_the_input():
    """Check that reading is never ahead of writing by more than a few blocks."""
    alive, most = 0, 0

    def items():
        nonlocal alive, most
        for i in range(100):
            alive += 1
            most = max(most, alive)
            yield i

    for expected, i in enumerate(map_in_order(lambda i: i, items(), 3)):
        assert i == expected
        alive -= 1
    assert most <= 4


def test_progress_is_for_terminals(gpt2, tmp_path, capfd, verse):
    encode_file(gpt2, verse, tmp_path / "a", progress=True)
    assert capfd.readouterr() == ("", "")
