"""Tests of finding the files with texts in folders."""

import os
from pathlib import Path

import pytest

from fastgpt.data.sources import find_sources
from fastgpt.utils.errors import UsageError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(paths: "list[Path] | dict[Path, str]", folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_files_are_sorted_and_others_are_skipped_with_a_reason(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "sub/a.jsonl", "sub/c.txt.gz", "d.parquet", "e.md", "f/config.json")
    make(tmp_path, ".ipynb_checkpoints/b.txt", "sub/._c.txt", "sub/C.TXT", "sub/e.NDJSON.zst")
    make(tmp_path, ".saving-out.lock", ".saving-out/train-00000.bin")  # of fastgpt itself
    found = find_sources([tmp_path, tmp_path / "e.md", tmp_path / "f" / "config.json"])
    in_folder = ["b.txt", "d.parquet", "sub/C.TXT", "sub/a.jsonl", "sub/c.txt.gz"]
    assert names(found.files, tmp_path) == [*in_folder, "sub/e.NDJSON.zst", "e.md", "f/config.json"]
    reasons = {str(path.relative_to(tmp_path)): reason for path, reason in found.skipped.items()}
    assert reasons.pop(".ipynb_checkpoints") == reasons.pop("sub/._c.txt") == "hidden"
    assert reasons == {}  # e.md and f/config.json were named


def test_missing_and_empty_inputs_are_rejected(tmp_path: Path) -> None:
    make(tmp_path, "f/config.json")
    with pytest.raises(UsageError, match=r"no\.txt does not exist"):
        find_sources([tmp_path / "no.txt"])
    with pytest.raises(UsageError, match=r"f contains no \*\.txt, \*\.jsonl, .*\*\.pq file"):
        find_sources([tmp_path / "f"])


def test_a_file_is_used_once(tmp_path: Path) -> None:
    make(tmp_path, "in/a.txt", "in/b.txt", "in/c.txt")
    (tmp_path / "in" / "link.txt").symlink_to("a.txt")
    found = find_sources(
        [tmp_path / "in", tmp_path / "in" / "b.txt"], exclude=[tmp_path / "in" / "c.txt"]
    )
    assert names(found.files, tmp_path / "in") == ["a.txt", "b.txt"]
    assert {path.name: reason for path, reason in found.skipped.items()} == {
        "link.txt": "already included",
        "b.txt": "already included",
        "c.txt": "used for validation",
    }
    with pytest.raises(UsageError, match="does not exist"):
        find_sources([tmp_path / "in" / "broken.txt"])


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path, "in/a.txt", "elsewhere/b.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.txt").symlink_to("nothing")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    found = find_sources(tmp_path / "in")
    assert names(found.files, tmp_path / "in") == ["a.txt", "linked/b.txt"]
    assert {path.name: reason for path, reason in found.skipped.items()} == {
        "broken.txt": "a broken link",
        "loop": "already included",
        "pipe.txt": "not a regular file",
    }
