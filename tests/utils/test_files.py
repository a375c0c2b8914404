"""Tests of writing files and directories atomically."""

from pathlib import Path

import pytest

from fastgpt.utils.files import atomic_directory, atomic_file


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
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        raise RuntimeError(temporary.write_text("three"))
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]
