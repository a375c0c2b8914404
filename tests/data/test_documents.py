"""Tests of reading documents from files of every format, and of errors in them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.data.documents import file_format, read_documents
from fastgpt.utils import text_files
from fastgpt.utils.errors import UsageError

EOT = "<|endoftext|>"


def read(path: Path, field: str = "text") -> list[str]:
    """Return the documents of a file, with their pieces joined."""
    found = [""]
    for text, ends in read_documents(path, field):
        found[-1] += text
        if ends:
            found.append("")
    assert found.pop() == "", "the last one is not ended"
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n", ["one\n"]),
        (f"one {EOT} two\n", [f"one {EOT} two\n"]),  # not a line of its own: ordinary text
        (f"one\n{EOT}\ntwo\n", ["one", "two\n"]),
        (f"one\n\n{EOT}\n\n two\n{EOT}\n", ["one", " two"]),
        (f"one\n{EOT}\n{EOT}\ntwo", ["one", "two"]),
        (f"{EOT}\none\n{EOT}", ["one"]),
        (f"one\n{EOT} \n{EOT}!\n", [f"one\n{EOT} \n{EOT}!\n"]),
        (f"\r\none\r\n{EOT}\r\ntwo", ["\none", "two"]),
        (EOT, []),
        ("", []),
        ("\n\n", ["\n\n"]),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 1000])
def test_lines_that_part_a_text(tmp_path, monkeypatch, text, expected, block) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read(path) == expected


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.sampled_from(["a", "b.", " ", "\n", EOT, f"\n{EOT}\n", "<|", ">"])),
    block=st.integers(1, 30),
)
def test_blocks_do_not_matter(tmp_path, monkeypatch, parts, block) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(parts), "utf-8")
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 20)
    whole = read(path)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    assert read(path) == whole
    assert all(whole)


def test_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    texts = ["one\r\n", "zwei é漢😀", f"three {EOT}\n"]
    lines = "\n".join(json.dumps({"id": i, "story": text}) for i, text in enumerate(texts))
    empty = json.dumps({"story": ""})
    files = {
        "a.jsonl": lines.encode() + b"\n\n" + empty.encode(),
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
        "c.json": json.dumps([*texts, ""]).encode(),
        "d.json": json.dumps([{"story": text} for text in texts], ensure_ascii=False).encode(),
        "e.jsonl.gz": gzip.compress(lines.encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, "story") == texts, name
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"one\n" * 5000))
    assert read(tmp_path / "f.txt.gz") == ["one\n" * 5000]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", "", ".txt"])
def test_compression_is_recognized_by_the_content(tmp_path: Path, suffix: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    content, path = b'{"text": "one"}\n' * 5000, tmp_path / f"a.jsonl{suffix}"
    packed: dict[str, bytes] = {
        ".gz": gzip.compress(content),
        ".bz2": bz2.compress(content),
        ".xz": lzma.compress(content),
        ".lzma": lzma.compress(content, format=lzma.FORMAT_ALONE),
        ".zst": pyarrow.Codec("zstd").compress(content, asbytes=True),
    }
    if suffix == ".lz4":  # its codec writes blocks, not frames
        with pyarrow.output_stream(path, compression="lz4") as file:
            file.write(content)
    else:
        path.write_bytes(packed.get(suffix, content))
    if suffix != ".txt":  # not a suffix of a compression: then it is text
        assert read(path) == ["one"] * 5000
    unnamed = path.rename(tmp_path / "DATA")
    assert read(unnamed) == ["one"] * 5000
    if suffix in packed:
        unnamed.write_bytes(packed[suffix][:-30])
        with pytest.raises(UsageError, match="DATA is not a complete "):
            read(unnamed)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "one"}', "json_lines"),
        ("A.JSONL", b"[", "json_lines"),
        ("a.ndjson.GZ", b"{", "json_lines"),
        ("a.jsonl.gzip", b"{", "json_lines"),
        ("a.jsonl.zstd", b"{", "json_lines"),
        ("a.json", b'\xef\xbb\xbf {"text": "one"}\n{"text": "two"}\n', "json_lines"),
        ("a.json", b'{"text": "' + b"x" * (1 << 20) + b'"}\n', "json_lines"),
        ("a.json", b'\xef\xbb\xbf {"text": "' + b"x" * (1 << 20) + b'"}\n', "json_lines"),
        ("a.json", b'[\n{"text": "one"}\n]', "json"),
        ("a.json", b'{\n"text": "one"}\n', "json"),
        ("a.json", b"", "json"),
        ("stdin", b'{"text": "one"}\n{"te', "json_lines"),
        ("stdin", b"{one}\n", "text"),
        ("stdin", b"[1]\n", "text"),
        ("a.md", b'{"text": "one"}\n', "text"),
        ("a.txt", b"BZh is no compression", "text"),
        ("a.txt", b'{"text": "one"}\n', "text"),
        ("a.PQ", b"", "parquet"),
        ("a.txt", b"PAR1 and more PAR1", "parquet"),
        ("a.txt", b"PAR1", "text"),
        ("a", b"", "text"),
    ],
)
def test_file_format(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert file_format(tmp_path / name) == expected


def test_rows_without_a_text_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{}\n7\n{"text": ""}\n"b"\n')
    skipped: list[str] = []
    pieces = read_documents(path, on_invalid=skipped.append)
    assert list(pieces) == [("a", True), ("b", True)]
    assert [message.removeprefix(f"{path}, ").split(":")[0] for message in skipped] == [
        "line 2",
        "line 3",
        "line 4",
    ]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"story {i} é" for i in range(3000)]
    table = pyarrow.table({"id": range(3001), "story": [*texts, ""]})
    parquet.write_table(table, path, row_group_size=700)
    advanced: list[int] = []
    assert [text for text, _ in read_documents(path, "story", advanced.append)] == texts
    assert sum(advanced) == path.stat().st_size
    for field, message in (("text", "no field 'text'; it has: id, story"), ("id", "row 0: ")):
        with pytest.raises(UsageError, match=message):
            read(path, field)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UsageError, match=r"a\.parquet\.gz is a parquet file .* decompress it"):
        read(tmp_path / "a.parquet.gz")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read as a parquet file"):
        read(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"a\.parquet: .* pip install pyarrow"):
        read(tmp_path / "a.parquet")


# The modification time is set to 0: the bytes are part of the test's name, which must be equal in
# all pytest-xdist processes.
CUT_SHORT = gzip.compress(b"one" * 999, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2, column 10: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": 1, "id": 2}', "has no field 'text'; it has: body"),
        ("a.jsonl", b'{"text": null}', "line 1: field 'text' must be a string, not None"),
        ("a.jsonl", b'["text"]', "line 1: must be an object with a field 'text', not"),
        ("a.jsonl", b"{}", "line 1: has no field 'text'; it has: none"),
        ("a.jsonl", b'{"text": "\xe9"}', "line 1: is not JSON: .* 0xe9"),
        ("a.jsonl", b"[" * 100_000, "line 1: brackets nested too deeply"),
        ("a.json", b'{\n"text": "a"}', "a.json must contain a list of texts, not a dict"),
        ("a.json", b'["a",\n 7]', "a.json, item 1: must be an object with a field 'text', not 7"),
        ("a.json", b'["a",\n b]', "a.json, line 2, column 2: Expecting value"),
        ("a.txt.gz", CUT_SHORT, "a.txt.gz is not a complete gzip file"),
        ("a.txt", b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3"),
        ("a.txt", "é\n".encode("utf-16"), "a.txt is UTF-16 text: .* iconv -f utf-16 "),
        ("a.txt", ("one\n" * 9).encode("utf-16-le"), "UTF-16 text: .* iconv -f utf-16le "),
        ("a.jsonl", ('{"text": 1}\n' * 9).encode("utf-16-be"), "UTF-16 text: .* -f utf-16be "),
        ("a.txt", "é".encode("utf-32"), "UTF-32 text: .* iconv -f utf-32 "),
        ("a.txt", bytes(range(256)) * 9 + bytes(99), "not UTF-8 text: 108 of its first 2403 bytes"),
        ("a.txt", b"PK\x03\x04", "a zip archive"),
        ("a.txt", b"%PDF-1.7\n", "a PDF document: .* pdftotext"),
        ("a.txt", b"x" * 257 + b"ustar", "a tar archive"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
