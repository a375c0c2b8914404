"""Writing files and directories atomically, and exports to a full disk."""

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastgpt import GPT, CharTokenizer, GPTConfig, Tokenizer
from fastgpt.inference.engine import Engine
from fastgpt.interop import gguf, hugging_face, nanogpt
from fastgpt.training.loss_curves import Run, draw
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_directory, atomic_file, atomic_files


@pytest.mark.parametrize("leftovers", [False, True])
def test_a_directory_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, leftovers: bool) -> None:
    target = tmp_path / "parent" / "x"
    for text in ("one", "two"):
        if leftovers:  # of a process that was killed
            for name in (".saving-x", ".old-x"):
                (target.with_name(name) / "stale").mkdir(parents=True)
        with atomic_directory(target) as folder:
            (folder / text).write_text(text)
        assert [path.name for path in target.iterdir()] == [text]
        assert list(target.parent.iterdir()) == [target]
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        raise RuntimeError((folder / "three").write_text("three"))
    assert (target / "two").read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


def test_the_directory_behind_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "x"
    link.symlink_to(target)
    for text in ("one", "two"):
        with atomic_directory(link) as folder:
            (folder / text).write_text(text)
        assert link.is_symlink()
        assert [path.name for path in target.iterdir()] == [text]
    assert list(target.parent.iterdir()) == [target]


def test_the_current_directory_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    target.mkdir()
    monkeypatch.chdir(target)
    before = target.stat().st_ino
    for path, text in ((Path(), "one"), (target, "two")):
        with atomic_directory(path) as folder:
            (folder / text).write_text(text)
        assert os.listdir() == [text]
    assert target.stat().st_ino == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_cannot_be_renamed_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "x", Path.rename
    (target / "one").mkdir(parents=True)

    def fail(self: Path, other: Path) -> Path:
        if self.name == ".saving-x":
            raise OSError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), atomic_directory(target):
        pass
    assert list(tmp_path.rglob("*")) == [target, target / "one"]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    (tmp_path / ".saving-x").write_text("of a process that was killed")
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            assert not temporary.exists()
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        raise RuntimeError(temporary.write_text("three"))
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_added_to_a_folder_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "x"
    for _ in range(2):  # without and with `x`
        with pytest.raises(RuntimeError), atomic_files(folder) as temporary:
            raise RuntimeError((temporary / "one").write_text("one"))
        assert not folder.exists()
    folder.mkdir()
    (folder / "kept").write_text("kept")
    (folder / "one").write_text("old")
    (folder / ".saving").mkdir()
    (folder / ".saving" / "stale").write_text("of a process that was killed")
    with pytest.raises(RuntimeError), atomic_files(folder) as temporary:
        raise RuntimeError((temporary / "one").write_text("one"))
    assert read_all(folder) == {"kept": "kept", "one": "old"}
    with atomic_files(folder) as temporary:
        for name in ("one", "two"):
            (temporary / name).write_text(name)
    assert read_all(folder) == {"kept": "kept", "one": "one", "two": "two"}


def read_all(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_file_behind_a_link_is_replaced(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "x"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("one", "two"):
        with atomic_file(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert read_all(target.parent) == {"x": text}


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        received = threads.submit(pipe.read_text)
        with atomic_file(pipe) as path:
            path.write_text("text")
        assert received.result() == "text"
    assert pipe.is_fifo()


# --- a full disk -------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    tokenizer = Tokenizer.train(["abcabc"], 259)
    gguf.write(GPT(GPTConfig(259, 8, 1, 1, 8)), path / "model.gguf", tokenizer)


def write_pair(path: Path) -> None:
    Tokenizer.train(["abcabcabc"], 259).save(path / "merges.txt")


def write_plot(path: Path) -> None:
    run = Run("run", path, [{"step": step, "loss": 1.0} for step in range(3)])
    draw([run], path / "loss.png")


EXPORTS = {
    "hugging_face": lambda path: hugging_face.write(model(), path / "model", characters()),
    "nanogpt": lambda path: nanogpt.write(model(), path / "model", characters()),
    "gguf": write_gguf,
    "engine": lambda path: Engine.from_model(model()).save(path / "model.safetensors"),
    "tokenizer.json": lambda path: Tokenizer.train(["abc"], 259).save(path),
    "merges.txt": write_pair,
    "ranks.tiktoken": lambda path: Tokenizer.train(["abc"], 259).save(path / "ranks.tiktoken"),
    "characters": lambda path: characters().save(path / "characters.json"),
    "plot": write_plot,
}


def characters() -> CharTokenizer:
    return CharTokenizer(map(chr, range(300, 400)))


def model() -> GPT:
    return GPT(GPTConfig(100, 8, 1, 1, 8))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block, writing beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_to_a_full_disk_leaves_nothing_and_can_be_repeated(
    name: str, tmp_path: Path
) -> None:
    if name == "gguf":
        pytest.importorskip("gguf")
    export, whole = EXPORTS[name], tmp_path / "whole"
    whole.mkdir()
    export(whole)
    sizes = {path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    folder = tmp_path / "full"
    folder.mkdir()
    for size in {min(sizes) // 2, max(sizes) - 1}:  # fails in the first file, or in the largest
        failure = pytest.raises((OSError, UsageError), match=r"File too large|is the disk full")
        with largest_file(size), failure:
            export(folder)
        assert list(folder.rglob("*")) == []
    export(folder)
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (whole, folder)]
    assert names[0] == names[1]
