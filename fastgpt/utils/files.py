"""Write files and directories atomically, so that a crash leaves the old or the new one; hash."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory to write to, which replaces `target` when the block succeeds.

    Its files are synced to disk before. If the block raises, the temporary directory is deleted and
    an existing `target` is kept. A process that is killed may leave `.saving-NAME`, and
    `.old-NAME`, which is the previous `target` if there is no `target`. If `target` is a symbolic
    link, the directory that it points to is replaced.
    """
    target = target.resolve()  # also gives "." a name
    temporary, old = (target.with_name(f".{word}-{target.name}") for word in ("saving", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        if target.exists():  # a directory with contents cannot be replaced in one step
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        fsync(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `target` when the block succeeds.

    It is synced to disk before. If the block raises, it is deleted and `target` is unchanged.
    """
    temporary = target.with_name(f".{target.name}.new")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
