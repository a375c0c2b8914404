"""Tests of preparing a folder of token shards and of training on it."""

import errno
import gzip
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastgpt import __main__ as fastgpt_main
from fastgpt import generate, prepare, train
from fastgpt.data.corpus import load_corpus
from fastgpt.data.pipeline import prepare as prepare_data
from fastgpt.data.shards import read_shards, verify_shard
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.tokenizer import reference as bpe
from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

EOT = "<|endoftext|>"
SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"),
    *("--batch-size", "4", "--max-steps", "2", "--warmup-steps", "1", "--eval-interval", "2"),
    *("--sample-tokens", "5", "--device", "cpu", "--eval-tokens", "500"),
]


def run(command, *args: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as info:
        cli.run(command, args)
    return int(info.value.code or 0)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    """Return a tokenizer of the bytes, a few merges, and <|endoftext|>."""
    merges = bpe.train(["story of the other story "], 12)
    tokens = bpe.vocabulary(merges)
    ids = {token: i for i, token in enumerate(tokens)}
    rows = [(ids[a], ids[b], ids[a + b]) for a, b in merges]
    return Tokenizer([*tokens, EOT.encode()], rows, {EOT: len(tokens)})


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """Write 1,001 documents, one of which contains the end-of-text string."""
    path = tmp_path / "stories.jsonl"
    texts = [f"The story of {i}, é.\n" for i in range(1001)]
    texts[500] = f"It said {EOT}, and went on."
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def documents(folder: Path, name: str, tokenizer: Tokenizer) -> list[str]:
    """Return the documents of a prepared part, cut at its document starts."""
    shards = read_shards(folder / name, tokenizer)
    for shard in shards:
        verify_shard(shard)
    ids = np.concatenate([shard.ids for shard in shards])
    firsts = np.cumsum([0, *(len(shard.ids) for shard in shards)])
    pairs = zip(firsts, shards, strict=False)
    starts = [int(first + s) for first, shard in pairs for s in shard.document_starts]
    rows = np.split(ids, starts[1:])
    assert starts[0] == 0
    assert all(row[-1] == tokenizer.eot_token for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_documents_are_parted_and_drawn_by_their_number(stories, tmp_path, small_tokenizer) -> None:
    out = tmp_path / "made"
    options = {"tokenizer": small_tokenizer, "val_fraction": 0.1}
    prepared = prepare_data(stories, out, tokens_per_shard=5000, **options)
    parts = {name: documents(out, name, small_tokenizer) for name in ("train", "val")}
    texts = [json.loads(line)["text"] for line in stories.read_text("utf-8").splitlines()]
    assert sorted(parts["train"] + parts["val"]) == sorted(texts)
    assert [text for text in texts if text in set(parts["val"])] == parts["val"]  # in order
    assert 60 < len(parts["val"]) < 140
    assert prepared.train.shards == len([*out.glob("train-*.bin")]) > 1
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    assert meta["train"]["documents"] == len(parts["train"])
    assert meta["val"]["bytes"] + meta["train"]["bytes"] == sum(len(t.encode()) for t in texts)
    assert meta["sources"][0]["path"] == str(stories)
    assert Tokenizer.load(out) == small_tokenizer
    # The result must not depend on batches and threads, and a document must stay in its part when
    # documents are added.
    prepare_data(stories, tmp_path / "again", threads=1, **options)
    assert documents(tmp_path / "again", "val", small_tokenizer) == parts["val"]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(stories.read_bytes())
    prepare_data([stories, copy], tmp_path / "twice", **options)
    twice = documents(tmp_path / "twice", "val", small_tokenizer)
    assert twice[: len(parts["val"])] == parts["val"]


def test_small_batches_are_the_same(stories, tmp_path, small_tokenizer, monkeypatch) -> None:
    options = {"tokenizer": small_tokenizer, "val_fraction": 0.1, "progress": False}
    prepare_data(stories, tmp_path / "a", **options)
    monkeypatch.setattr("fastgpt.data.pipeline._BATCH_CHARACTERS", 50)
    prepare_data(stories, tmp_path / "b", threads=3, **options)
    for name in ("train-00000.bin", "val-00000.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_document_is_cut_as_load_corpus_cuts_it(verse, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.utils.text_files.BLOCK_BYTES", 1000)
    monkeypatch.setattr("fastgpt.data.pipeline._BATCH_CHARACTERS", 3000)
    prepare_data(verse, tmp_path / "made", val_fraction=0.1)
    made, plain = load_corpus(str(tmp_path / "made")), load_corpus(str(verse), "gpt2", 0.1)
    assert made.tokenizer == plain.tokenizer
    assert made.train.tolist() == plain.train.tolist()
    assert made.val.tolist() == [*plain.val.tolist(), 50256]
    assert made.train.dtype == np.uint16


def test_few_documents_leave_the_last_part(tmp_path, small_tokenizer) -> None:
    (tmp_path / "a.txt").write_text(f"one\n{EOT}\n" * 9, "utf-8")
    (tmp_path / "b.txt").write_text("ten characters", "utf-8")
    prepared = prepare_data(tmp_path, tmp_path / "m", tokenizer=small_tokenizer, val_fraction=0.25)
    assert (prepared.train.bytes, prepared.val.bytes) == (31, 10)
    corpus = load_corpus(str(tmp_path / "m"))
    assert corpus.tokenizer.decode(corpus.train) == f"one{EOT}" * 9 + "ten "
    assert corpus.tokenizer.decode(corpus.val) == f"characters{EOT}"


def test_prepare_then_train_as_printed(stories, workplace, small_tokenizer, capfd) -> None:
    small_tokenizer.save("my.json")
    args = ["stories.jsonl", "--tokenizer", "my.json", "--out", "data/my", "--val-fraction", "0.1"]
    assert run(prepare.main, *args, "--tokens-per-shard", "4000") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "vocabulary of 269" in out
    assert "bytes of text per token" in out
    *_, command = out.strip().splitlines()
    assert command == "train on it:  python -m fastgpt.train --data data/my"
    assert run(train.main, "--data", "data/my", *SMALL, "--out", "r") == 0
    assert "vocabulary of 269" in capfd.readouterr().out
    assert run(train.main, "--resume", "r", "--max-steps", "4") == 0
    assert run(generate.main, "r", "--prompt", "The", "--max-new-tokens", "3") == 0
    assert "The" in capfd.readouterr().out
    # Other data under the same name.
    shard = workplace / "data/my/train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:300] + b"\0\0" + whole[302:])
    assert run(train.main, "--resume", "r", "--max-steps", "6") == 2
    assert "train-00001.bin was modified after it was written" in capfd.readouterr().err
    assert run(prepare.main, *args, "--overwrite") == 0
    assert not shard.exists()
    assert run(train.main, "--resume", "r", "--max-steps", "6") == 2
    assert "data/my is not what the run was trained on" in capfd.readouterr().err


def test_several_shards_train_as_one(stories, workplace, small_tokenizer) -> None:
    options = {"tokenizer": small_tokenizer, "val_fraction": 0.1}
    weights = []
    for name, size in (("one", 10**6), ("many", 3000)):
        prepare_data(stories, name, tokens_per_shard=size, **options)
        assert run(train.main, "--data", name, *SMALL, "--out", f"run-{name}") == 0
        (file,) = Path(f"run-{name}").glob("checkpoints/*/model.safetensors")
        weights.append(file.read_bytes())
    assert weights[0] == weights[1]
    one, many = load_corpus("one"), load_corpus("many")
    assert one.train.tolist() == many.train[:].tolist()
    assert len(one.train) == len(many.train) > 9000
    assert one.sha256 != many.sha256


def test_train_vocab(stories, workplace, monkeypatch, small_tokenizer, capfd) -> None:
    """Check what the tokenizer training receives: the texts, the size, the special token."""
    given: list[object] = []

    def learn(source, vocab_size, *, special_tokens=(EOT,)):
        given.extend([[*source], vocab_size, special_tokens])
        return small_tokenizer

    monkeypatch.setattr(Tokenizer, "train", learn, raising=False)
    args = ["stories.jsonl", "--train-vocab", "300", "--out", "d"]
    assert run(prepare.main, *args) == 0
    texts, vocab_size, special_tokens = given
    expected = [json.loads(line)["text"] for line in stories.read_text("utf-8").splitlines()]
    assert [text.decode() for text in texts] == expected
    assert (vocab_size, special_tokens) == (300, (EOT,))
    assert f"vocabulary of {small_tokenizer.vocab_size}" in capfd.readouterr().out
    assert Tokenizer.load("d") == small_tokenizer


@pytest.mark.skipif(not hasattr(Tokenizer, "train"), reason="this version trains no tokenizers")
def test_train_vocab_for_real(stories, workplace, capfd) -> None:
    assert run(prepare.main, "stories.jsonl", "--train-vocab", "300", "--out", "d") == 0
    out = capfd.readouterr().out
    assert "vocabulary of 300" in out
    assert "fewer than" not in out
    assert run(prepare.main, "stories.jsonl", "--train-vocab", "9000", "--out", "more") == 0
    out = capfd.readouterr().out
    assert "(fewer than the requested 9,000: the texts have no more pairs to merge)" in out
    assert f"vocabulary of {Tokenizer.load('more').vocab_size:,}\n" in out
    tokenizer = Tokenizer.load("d")
    assert tokenizer.eot_token is not None
    found = [*documents(Path("d"), "train", tokenizer), *documents(Path("d"), "val", tokenizer)]
    assert len(found) == 1001
    named = stories.read_text("utf-8") + '{"text": "stories.jsonl"}\n'  # the name of a file
    Path("named.jsonl").write_text(named, "utf-8")
    assert run(prepare.main, "named.jsonl", "--train-vocab", "270", "--out", "named") == 0
    capfd.readouterr()
    assert run(prepare.main, "stories.jsonl", "--train-vocab", "3", "--out", "e") == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def wrong_uses() -> dict[str, tuple[list[str], str]]:
    return {
        "missing": (["no.txt"], "no.txt does not exist"),
        "empty": (["empty.txt"], "empty.txt: contains no text"),
        "folder of nothing": (["nothing"], "folder nothing contains no *.txt"),
        "no inputs": ([], "nothing to prepare: pass at least one"),
        "not UTF-8": (["latin1.txt"], "not UTF-8: byte 0xe9 at offset 3"),
        "field": (["a.jsonl", "--field", "body"], "a.jsonl, line 1: has no field 'body'"),
        "tokenizer": (["a.jsonl", "--tokenizer", "gtp2"], "tokenizer must be gpt2 or"),
        "no end of text": (["a.jsonl", "--tokenizer", "char.json"], "has no <|endoftext|>, which"),
        "fraction": (["a.jsonl", "--val-fraction", "1"], "val_fraction must be between 0 and 1"),
        "too short": (["a.jsonl"], "no text is left for validation: use more text, or choose"),
        "shard size": (["a.jsonl", "--tokens-per-shard", "0"], "tokens_per_shard must be at least"),
        "threads": (["a.jsonl", "--threads", "0"], "threads must be at least 1, not 0"),
        "a file in the way": (
            ["a.jsonl", "--out", "a.jsonl"],
            "a.jsonl exists, and is not a prepared",
        ),
        "a folder in the way": (["a.jsonl", "--out", "."], "exists, and is not a prepared"),
        "below a file": (["a.jsonl", "--out", "a.jsonl/x"], "a.jsonl/x cannot be written: Not a"),
    }


@pytest.mark.parametrize("name", wrong_uses())
def test_wrong_use_is_one_line_and_exit_code_2(name: str, workplace: Path, capfd) -> None:
    (workplace / "empty.txt").touch()
    (workplace / "nothing").mkdir()
    (workplace / "latin1.txt").write_bytes(b"caf\xe9")
    (workplace / "a.jsonl").write_text('{"text": "short"}\n')
    CharTokenizer("short").save("char.json")
    before = sorted(workplace.rglob("*"))
    args, message = wrong_uses()[name]
    assert run(prepare.main, *args, *([] if "--out" in args else ["--out", "d"])) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert sorted(workplace.rglob("*")) == before


def test_ctrl_c_leaves_nothing(stories, workplace, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastgpt.data.shards.ShardWriter.append", interrupt)
    assert run(fastgpt_main.dispatch, "prepare", "stories.jsonl", "--out", "d") == 130
    assert [path.name for path in workplace.iterdir()] == ["stories.jsonl"]


def test_a_prepared_folder_is_not_overwritten_unasked(verse, tmp_path, capfd) -> None:
    out = tmp_path / "made"
    prepare_data(verse, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match=r"is already prepared: train on it .* with --overwrite"):
        prepare_data(verse, out)
    (tmp_path / "bad.txt").write_bytes(b"good, " * 9999 + b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        prepare_data(tmp_path / "bad.txt", out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepare_data(verse, out, overwrite=True, val_fraction=0.5)
    assert (out / "val-00000.bin").read_bytes() != before["val-00000.bin"]
    assert {path.name for path in tmp_path.iterdir()} == {"made", "bad.txt", "verse.txt"}


def test_faults_30_and_32_a_prepared_folder_that_is_damaged(verse, workplace, capfd) -> None:
    prepare_data(verse, "d")

    def refused(message: str) -> None:
        assert run(train.main, "--data", "d", *SMALL, "--out", "r") == 2
        assert message in capfd.readouterr().err
        assert not Path("r").exists()

    shard, tokenizer = Path("d/train-00000.bin"), Path("d/tokenizer.json")
    whole = shard.read_bytes()
    for content, message in (
        (
            whole[:256] + b"\xff\xff" + whole[258:],
            "id 65535 at offset 256 is not in its vocabulary",
        ),
        (whole[:-1], "d/train-00000.bin has"),
        (b"x" + whole[1:], "d/train-00000.bin is not a token shard"),
    ):
        shard.write_bytes(content)
        refused(message)
    shard.unlink()
    refused("d/train-00000.bin does not exist")
    shard.write_bytes(whole)
    content = tokenizer.read_text("utf-8")
    tokenizer.write_text(content.replace("<|endoftext|>", "<|end|>"), "utf-8")
    refused("d/train-00000.bin was made with another tokenizer")
    tokenizer.unlink()
    refused("the tokenizer of d cannot be read")
    Path("d/meta.json").unlink()
    refused("d is not a prepared folder (it has no meta.json); prepare the texts")


def test_another_tokenizer_than_the_folders(verse, tmp_path, small_tokenizer) -> None:
    prepare_data(verse, tmp_path / "made")
    load_corpus(str(tmp_path / "made"), Tokenizer.gpt2())
    with pytest.raises(UsageError, match="was prepared with another tokenizer"):
        load_corpus(str(tmp_path / "made"), small_tokenizer)


def test_the_command_does_not_import_torch(verse: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from fastgpt import prepare\n"
        f"prepare.main([{str(verse)!r}, '--out', {str(tmp_path / 'd')!r}])\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = str(Path(prepare.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0


def test_texts_for_validation(stories, workplace, capfd) -> None:
    """Check two separate texts, as in TinyStories; the tokenizer is trained on the first alone."""
    Path("valid.txt").write_text("A dog.\n<|endoftext|>\nzyzzyva zyzzyva zyzzyva\n")
    args = ["stories.jsonl", "--val", "valid.txt", "--train-vocab", "300", "--out", "d"]
    assert run(prepare.main, *args) == 0
    tokenizer = Tokenizer.load("d")
    assert documents(Path("d"), "val", tokenizer) == ["A dog.", "zyzzyva zyzzyva zyzzyva\n"]
    texts = [json.loads(line)["text"] for line in stories.read_text("utf-8").splitlines()]
    assert documents(Path("d"), "train", tokenizer) == texts
    meta = json.loads(Path("d/meta.json").read_text())
    assert meta["val_fraction"] is None
    assert [source["path"] for source in meta["val_sources"]] == ["valid.txt"]
    Path("empty.txt").touch()
    capfd.readouterr()
    assert run(prepare.main, "stories.jsonl", "--val", "empty.txt", "--out", "e") == 2
    assert "the files for validation contain no text" in capfd.readouterr().err
    assert not Path("e").exists()


def start_prepare(folder: Path, checkout: Path, *args: str, **options) -> "subprocess.Popen[bytes]":
    """Start the command in a folder; its standard input can be written to."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastgpt.prepare", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


MANY = f"\n{EOT}\n".join(f"The story of {i}, é.\n" * (1 + i % 7) for i in range(20_000))


@pytest.mark.parametrize("source", ["-", "/dev/stdin", "fifo", "substitution"])
def test_a_pipe_is_read_once_and_whole(tmp_path: Path, checkout: Path, source: str) -> None:
    """Prepare 20,000 documents from a pipe, with a new tokenizer, as from the same file."""
    (tmp_path / "many.txt").write_text(MANY, "utf-8")
    args = ("--out", "piped", "--train-vocab", "300", "--threads", "1")
    if source == "substitution":
        command = f"{sys.executable} -m fastgpt.prepare <(cat many.txt) {' '.join(args)}"
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    else:
        if source == "fifo":
            os.mkfifo(tmp_path / "fifo")
        process = start_prepare(tmp_path, checkout, source, *args)
        if source == "fifo":
            (tmp_path / "fifo").write_bytes(MANY.encode())
        _, err = process.communicate(b"" if source == "fifo" else MANY.encode(), timeout=100)
        assert process.returncode == 0, err
    prepare_data(tmp_path / "many.txt", tmp_path / "read", train_vocab=300)
    for name in ("train-00000.bin", "val-00000.bin", "tokenizer.json"):
        assert (tmp_path / "piped" / name).read_bytes() == (tmp_path / "read" / name).read_bytes()
    meta = json.loads((tmp_path / "piped" / "meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] == 20_000
    (described,) = meta["sources"]
    assert described["bytes"] == len(MANY.encode())
    if source != "substitution":
        assert described["path"] == source


def test_json_lines_from_a_pipe(tmp_path: Path, checkout: Path, stories: Path) -> None:
    process = start_prepare(tmp_path, checkout, "-", "--out", "piped")
    _, err = process.communicate(gzip.compress(stories.read_bytes()), timeout=100)
    assert process.returncode == 0, err
    prepare_data(stories, tmp_path / "read")
    for name in ("train-00000.bin", "val-00000.bin"):
        assert (tmp_path / "piped" / name).read_bytes() == (tmp_path / "read" / name).read_bytes()


def test_errors_in_a_pipe_do_not_name_the_temporary_file(tmp_path: Path, checkout: Path) -> None:
    process = start_prepare(tmp_path, checkout, "-", "--out", "piped")
    _, err = process.communicate(b'{"content": "x"}\n', timeout=100)
    assert process.returncode == 2
    assert err.startswith(b"error: standard input, line 1: has no field 'text'; it has: content;")


def test_two_processes_with_one_output_folder(
    tmp_path: Path, checkout: Path, stories: Path
) -> None:
    """The first one, which waits for its standard input, finishes; the second is refused."""
    first = start_prepare(tmp_path, checkout, "-", "--out", "d")
    lock = tmp_path / ".saving-d.lock"
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = start_prepare(tmp_path, checkout, str(stories), "--out", "d", "--overwrite")
    _, err = second.communicate(timeout=100)
    assert second.returncode == 2
    message = f"error: d is being prepared by process {first.pid} on {socket.gethostname()}; wait"
    assert err.decode().startswith(message)
    _, err = first.communicate(stories.read_bytes(), timeout=100)
    assert first.returncode == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "stories.jsonl"]
    _, err = start_prepare(tmp_path, checkout, str(stories), "--out", "d").communicate(timeout=100)
    assert b"d is already prepared" in err


@pytest.mark.parametrize("reason", ["mount point", "read-only parent"])
def test_an_output_folder_that_cannot_be_renamed(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    out = tmp_path / "parent" / "out"
    (out / "lost+found").mkdir(parents=True)
    rename = Path.rename

    def refuse(self: Path, other: Path) -> Path:
        if out in (self, Path(other)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    if reason == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    else:
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: p != out.parent and access(p, mode))
    prepare_data(stories, tmp_path / "normal")
    prepare_data(stories, out)
    names = {path.name for path in (tmp_path / "normal").iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"lost+found"}
    with pytest.raises(UsageError, match="already prepared"):
        prepare_data(stories, out)
    prepare_data(stories, out, overwrite=True, tokens_per_shard=1000)
    assert len([*out.glob("train-*.bin")]) > 1
    load_corpus(str(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_a_folder_contributed_is_reported(
    workplace: Path, stories: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("in/a.txt", "in/.cache/b.txt", "in/c.md", "in/val.txt"):
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(f"The text of {name}. " * 99)
    (workplace / "in" / "d.jsonl").write_text('{"text": null}\n{"text": "One more."}\n')
    args = ("in", "in/a.txt", "--val", "in/val.txt", "--out", "d")
    assert run(prepare.main, *args) == 2
    message = (
        "in/d.jsonl, line 1: field 'text' must be a string, not None; skip such rows with --skip"
    )
    assert message in capfd.readouterr().err
    assert run(prepare.main, *args, "--skip-invalid") == 0
    out = capfd.readouterr().out
    assert "2 files read, 4 skipped\n  skipped in/.cache: hidden\n  skipped in/c.md: not *.t" in out
    assert "  skipped in/val.txt: used for validation\n  skipped in/a.txt: already inc" in out
    assert "included\n1 row without a text skipped\n" in out
    meta = json.loads(Path("d/meta.json").read_text())
    assert [source["path"] for source in meta["sources"]] == ["in/a.txt", "in/d.jsonl"]
    assert (meta["train"]["documents"], meta["val"]["documents"], meta["invalid"]) == (2, 1, 1)
