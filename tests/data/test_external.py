"""Tests of opening token files of nanoGPT and llm.c, and of errors in them."""

import collections
import hashlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt import train
from fastgpt.data.batches import Batches, gather
from fastgpt.data.corpus import load_corpus
from fastgpt.data.external import read_meta
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

CHARACTERS = "\n abcdefgh"
META = {
    "vocab_size": len(CHARACTERS),
    "itos": dict(enumerate(CHARACTERS)),
    "stoi": {character: i for i, character in enumerate(CHARACTERS)},
}


def nanogpt(folder: Path, vocab_size: int = 50257, meta: Any = None) -> Path:
    """Write a folder as nanoGPT's prepare.py does."""
    folder.mkdir(exist_ok=True)
    for name, size in (("train.bin", 3000), ("val.bin", 300)):
        (np.arange(size) * 7 % vocab_size).astype(np.uint16).tofile(folder / name)
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def llmc(path: Path, ids: Any, magic: int = 20240520, version: int = 1) -> bytes:
    """Write a file as llm.c's data_common.py does and return its path."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    content = header.tobytes() + np.asarray(ids, "<u2").tobytes()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return content


def shards(folder: Path) -> Path:
    """Write eleven training shards and one validation shard, named as fineweb.py names them."""
    llmc(folder / "fineweb_val_000000.bin", np.arange(300))
    for i in range(1, 12):
        llmc(folder / f"fineweb_train_{i}.bin", np.arange(i * 50, (i + 1) * 50))
    return folder


def test_nanogpt_with_gpt2s_tokenizer(tmp_path: Path) -> None:
    corpus = load_corpus(str(nanogpt(tmp_path / "owt")))
    assert corpus.tokenizer == Tokenizer.gpt2()
    assert corpus.train.tolist() == [i * 7 % 50257 for i in range(3000)]
    assert corpus.val.tolist() == [i * 7 for i in range(300)]
    assert corpus.train.dtype == np.uint16


def test_nanogpt_with_characters(tmp_path: Path) -> None:
    corpus = load_corpus(str(nanogpt(tmp_path / "chars", 10, META)), "gpt2")
    assert corpus.tokenizer == CharTokenizer(CHARACTERS)
    expected = [CHARACTERS[i * 7 % 10] for i in range(10)]
    assert corpus.tokenizer.decode(corpus.train[:10]) == "".join(expected)


def test_llmc(tmp_path: Path) -> None:
    corpus = load_corpus(str(shards(tmp_path / "fineweb")))
    assert corpus.tokenizer == Tokenizer.gpt2()
    assert corpus.train[:].tolist() == [*range(50, 600)]  # shard 2 comes before 10
    inputs, targets = gather(corpus.train, np.array([0, 45, 540]), 9)
    assert inputs.tolist() == [[*range(s, s + 9)] for s in (50, 95, 590)]
    assert targets.tolist() == [[*range(s, s + 9)] for s in (51, 96, 591)]
    assert corpus.val.tolist() == [*range(300)]
    for part in ("train", "val"):
        llmc(tmp_path / "tiny" / f"tiny_shakespeare_{part}.bin", range(100))
        llmc(tmp_path / "plain" / f"{part}.bin", range(100))
    for name in ("tiny", "plain"):
        assert load_corpus(str(tmp_path / name)).train.tolist() == [*range(100)]


def test_training_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    nanogpt(Path("chars"), 10, META)
    small = "--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2 --device cpu"
    rest = "--max-steps 2 --warmup-steps 1 --eval-interval 2 --sample-tokens 3 --out r"
    with pytest.raises(SystemExit) as info:
        cli.run(train.main, ["--data", "chars", *small.split(), *rest.split()])
    assert not info.value.code
    assert "vocabulary of 10" in capfd.readouterr().out
    # The data is changed, but all ids are still valid.
    ids = np.fromfile("chars/train.bin", np.uint16)
    ids[100] = (ids[100] + 1) % 10
    ids.tofile("chars/train.bin")
    with pytest.raises(SystemExit) as info:
        cli.run(train.main, ["--resume", "r", "--max-steps", "4"])
    assert info.value.code == 2
    assert "chars is not what the run was trained on" in capfd.readouterr().err


def test_every_change_of_the_data_changes_its_hash(tmp_path: Path) -> None:
    folder = shards(tmp_path / "fineweb")
    digest = load_corpus(str(folder)).sha256
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    folder = folder.rename(tmp_path / "moved")
    assert load_corpus(str(folder), sha256=digest).sha256 == digest
    for name, ids in (("train_1", range(49, 99)), ("train_11", range(9)), ("val_000000", [7, 8])):
        path = folder / f"fineweb_{name}.bin"
        before = path.read_bytes()
        llmc(path, ids)
        assert load_corpus(str(folder)).sha256 != digest
        with pytest.raises(UsageError, match="moved is not what the run was trained on"):
            load_corpus(str(folder), sha256=digest)
        path.write_bytes(before)
    (folder / "fineweb_train_11.bin").rename(folder / "fineweb_val_000001.bin")
    assert load_corpus(str(folder)).sha256 != digest


def test_the_hash_is_that_of_sizes_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.data.token_files._BLOCK", 1000)
    monkeypatch.setattr("fastgpt.data.token_files._PIECE", 300)
    nanogpt(tmp_path)
    expected = hashlib.sha256(b"[(3000, 2), (300, 2)]")
    for name in ("train.bin", "val.bin"):
        content = (tmp_path / name).read_bytes()
        for first in range(0, len(content), 2000):
            expected.update(hashlib.sha256(content[first : first + 2000]).digest())
    assert load_corpus(str(tmp_path)).sha256 == expected.hexdigest()


def test_another_process_has_checked(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "d")
    digest = load_corpus(str(folder)).sha256
    np.full(3000, 60000, np.uint16).tofile(folder / "train.bin")
    corpus = load_corpus(str(folder), sha256=digest, check=False)
    assert (corpus.sha256, len(corpus.train)) == (digest, 3000)


def cut(n: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:n]


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.bin", cut(0), r"train\.bin \(0 bytes\) is empty; recreate it"),
        ("val.bin", cut(599), r"val\.bin \(599 bytes\) is truncated: nanoGPT's ids have two"),
        (
            "val.bin",
            put(400, b"\x51\xc4"),
            r"val\.bin: id 50257 at offset 400 is not in its vocabulary of 50,257",
        ),
        ("train.bin", put(5998, b"\xff\xff"), r"train\.bin: id 65535 at offset 5,998 is not"),
    ],
)
def test_faults_30_and_31_nanogpt(tmp_path: Path, name: str, damage, message: str) -> None:
    path = nanogpt(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=message):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(0), r"has 0 bytes, but the header of llm\.c's token files has 1,024"),
        (cut(1023), r"has 1,023 bytes, but the header"),
        (
            cut(1024),
            r"has 1,024 bytes, but its header \(at offset 8\) says 50 ids, .* require 1,124",
        ),
        (cut(1123), "has 1,123 bytes, but its header"),
        (lambda content: content + b"\0\0", "has 1,126 bytes, but its header"),
        (put(8, b"\0\0\0\0"), "says 0 ids, which require 1,024: it was truncated"),
        (put(8, b"\xff\xff\xff\xff"), "says -1 ids"),
        (put(0, b"\0"), r"begins with \d+ at offset 0, not with 20240520"),
        (put(4, b"\2"), r"is of version 2 \(at offset 4\) of llm\.c's token files, not 1"),
        (put(0, (20240801).to_bytes(4, "little")), "contains ids of Llama 3's tokenizer, which"),
        (put(0, (20240522).to_bytes(4, "little")), "contains multiple-choice questions"),
        (put(1030, b"\x51\xc4"), "id 50257 at offset 1,030 is not in its vocabulary of 50,257"),
    ],
)
def test_faults_30_31_and_32_llmc(tmp_path: Path, damage, message: str) -> None:
    path = shards(tmp_path) / "fineweb_train_3.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=message) as info:
        load_corpus(str(tmp_path))
    assert str(info.value).startswith(str(path))


def test_missing_and_unreadable_files_are_rejected(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "d")
    (folder / "val.bin").unlink()
    with pytest.raises(UsageError, match=r"train\.bin, but no token file for val \(such as val"):
        load_corpus(str(folder))
    (folder / "val.bin").mkdir()
    with pytest.raises(UsageError, match=r"val\.bin cannot be read: Is a directory"):
        load_corpus(str(folder))
    (folder / "val.bin").rmdir()
    (folder / "val.bin").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"val\.bin cannot be read: No such file"):
        load_corpus(str(folder))
    with pytest.raises(UsageError, match=r"is a file of token ids: pass the folder .*--data .*d\)"):
        load_corpus(str(folder / "train.bin"))
    (folder / "other_train.bin").touch()
    with pytest.raises(UsageError, match=r"several texts \(other, train\.bin and val\.bin\)"):
        load_corpus(str(folder))
    with pytest.raises(UsageError, match=r"cannot be read: No such file"):
        read_meta(tmp_path / "meta.pkl")


def test_less_data_than_a_context_is_rejected(tmp_path: Path) -> None:
    for part in ("train", "val"):
        llmc(tmp_path / f"x_{part}.bin", range(20))
    with pytest.raises(UsageError, match="has 20 tokens, but block_size=16 needs at least 32"):
        Batches(load_corpus(str(tmp_path)).train, 16, seed=0)


def test_more_characters_than_uint16_holds_are_rejected(tmp_path: Path) -> None:
    characters = map(chr, range(0x10000, 0x20001))
    nanogpt(tmp_path, 100, {"itos": dict(enumerate(characters))})
    with pytest.raises(UsageError, match=r"meta\.pkl has 65,537 characters, but the ids have"):
        load_corpus(str(tmp_path))


def test_data_of_another_tokenizer_is_rejected(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "d", 10, META)
    with pytest.raises(UsageError, match="was prepared with another tokenizer"):
        load_corpus(str(folder), Tokenizer.gpt2())
    load_corpus(str(folder), CharTokenizer(CHARACTERS))


class Attack:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [Attack(), {**META, "more": Attack()}, collections.OrderedDict(META), CharTokenizer("ab")],
)
def test_code_in_a_pickle_is_not_executed(tmp_path, monkeypatch, value, protocol) -> None:
    monkeypatch.chdir(tmp_path)
    nanogpt(tmp_path)
    Path("meta.pkl").write_bytes(pickle.dumps(value, protocol))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"meta\.pkl was rejected: it refers to \S+, and could"):
        load_corpus(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"meta\.pkl is damaged: EOFError"),
        (pickle.dumps(META)[:-30], "is damaged: "),
        (b"\x80\x04\xff.", "is damaged: "),
        (b"cos\nsystem\n(S'touch pwned'\ntR.", r"was rejected: it refers to os\.system"),
        (b"Psomething\n.", "was rejected: it refers to an external object"),
        (b"\x80\x02\x82\x01.", "is damaged: "),  # an unregistered extension code
        (pickle.dumps([1, 2]), "is not a character vocabulary .* has no dict 'itos'"),
        (pickle.dumps({"vocab_size": 7}), "has no dict 'itos'"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "must have each of the ids 0 to 2 - 1 exactly"),
        (pickle.dumps({**META, "vocab_size": 50304}), "must have each of the ids 0 to 50304 - 1"),
        (pickle.dumps({"itos": {0: "a", 1: "bc"}}), "id 1 maps to 'bc', which is not a character"),
        (pickle.dumps({"itos": {0: "a", 1: b"c"}}), "id 1 maps to b'c', which is not"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "character 'a' occurs twice"),
        (pickle.dumps({"itos": {0: "\ud800"}}), "half a surrogate pair"),
        (pickle.dumps({"itos": {}}), "needs at least one character"),
        (pickle.dumps({**META, "stoi": {"a": 0}}), "'stoi' is not the inverse of 'itos'"),
        (bytes(2**24 + 1), "has more than 16,777,216 bytes"),
    ],
)
def test_a_meta_that_is_none(tmp_path: Path, monkeypatch, content: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as info:
        read_meta(path)
    assert str(info.value).startswith(str(path))
    assert not Path("pwned").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_use_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """Check that token files are memory mapped, so that they do not increase private memory."""
    size = 200_000_000
    for name in ("train.bin", "val.bin"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    own_memory()  # do its imports first
    before = own_memory()
    corpus = load_corpus(str(tmp_path))
    batches = Batches(corpus.train, 1024, seed=0)
    most = max(own_memory() for first in range(0, 8000, 8) if len(batches.samples(first, 8)))
    assert most - before < size // 20


def own_memory() -> int:
    """Return the number of bytes of this process's memory that are not backed by a file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
