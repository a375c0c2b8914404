"""Write files and directories atomically: a crash leaves the old or the new one; names, hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory to write to, which replaces `target` when the block succeeds.

    Its files are synced to disk before. If the block raises, the temporary directory is deleted and
    an existing `target` is kept. A process that is killed may leave `.saving-NAME`, and
    `.old-NAME`, which is the previous `target` if there is no `target`. If `target` is a symbolic
    link, the directory that it points to is replaced.

    A directory that cannot be renamed (a mount point, or in a read-only parent), and the current
    directory, get the new files instead of the old ones one by one, in the order in which they were
    last written.
    """
    target = target.resolve()  # also gives "." a name
    temporary = temporary_path(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        if temporary.parent == target:
            _replace_contents(target, temporary)
        else:
            _replace(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(target: Path) -> Path:
    """Return where `atomic_directory` writes first: next to `target`, or in it if necessary."""
    target = target.resolve()
    fixed = target.is_dir() and (
        os.path.ismount(target)
        or not os.access(target.parent, os.W_OK)
        or os.path.samefile(target, os.curdir)  # a shell there would be left in a deleted directory
    )
    return (target if fixed else target.parent) / f".saving-{target.name}"


def contents(folder: Path) -> list[Path]:
    """Return what a folder contains, except what the system or `atomic_directory` put there."""
    return [
        path
        for path in folder.iterdir()
        if path.name != "lost+found" and not path.name.startswith(".saving-")
    ]


def _replace(target: Path, temporary: Path) -> None:
    """Rename a directory to `target`; one with contents cannot be replaced in one step."""
    old = target.with_name(f".old-{target.name}")
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        fsync(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _replace_contents(target: Path, temporary: Path) -> None:
    """Replace the contents of a directory, deleting the newest and moving the oldest files first.

    A file that is written last, to mark the directory as complete, is then moved last, too.
    """
    for path in reversed(_by_age(contents(target))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in _by_age(temporary.iterdir()):
        path.rename(target / path.name)
    fsync(target)


def _by_age(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.lstat().st_mtime_ns)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `target` when the block succeeds.

    It is synced to disk before. If the block raises, it is deleted and `target` is unchanged. Its
    name ends like `target`'s. If `target` is a symbolic link, the file that it points to is
    replaced. A device or a pipe is not replaced, but written to directly.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield target
        return
    target = target.resolve()
    temporary = target.with_name(f".saving-{target.name}")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary directory, whose files are moved to `folder` when the block succeeds.

    They are synced to disk before, and replace files with the same names; other files in `folder`
    are kept. If the block raises, nothing is left, nor is `folder` if it did not exist. A process
    that is killed may leave `.saving` in it.
    """
    is_new = not folder.exists()
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            fsync(path)
        for path in list(temporary.iterdir()):
            path.replace(folder / path.name)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it has files: they were moved to it
                folder.rmdir()


def reject_file_name(text: str, instead: str) -> None:
    """Raise ValueError if a str that was given as a text is the name of an existing file.

    instead: what to pass for the contents of the file, where ``{!r}`` stands for its name.
    """
    if len(text) <= 4096 and os.path.isfile(text):  # False for a str that is not a valid name
        raise ValueError(f"{text!r} is the name of a file, not a text: pass {instead.format(text)}")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if os.name == "nt" and path.is_dir():  # directories cannot be opened on Windows
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
