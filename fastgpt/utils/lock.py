"""Lock a file, so that only one process at a time writes what the file stands for.

The lock is an operating system lock on the open file. It is released when the process ends, even if
the process is killed. The contents of the file only identify the holder.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class LockedError(Exception):
    """Raised if a lock is held. The message names the holder: the process and its machine.

    by_this_process: whether the holder is this process.
    """

    def __init__(self, holder: str, by_this_process: bool = False) -> None:
        super().__init__(holder)
        self.by_this_process = by_this_process


class FileLock:
    """An exclusive lock on the file `path`, held until `release` or the end of the process.

    It can be used as a context manager. Processes that are forked while it is held do not hold it.
    On a file system without locks, a warning is issued and the file is not locked.

    Args:
        path: the file, which is created.
        delete: delete the file when the lock is released.

    Raises: LockedError if the lock is held; OSError if the file cannot be written.
    """

    def __init__(self, path: Path, delete: bool = False) -> None:
        self._path, self._delete = path, delete
        self._file = self._open()
        self._write({"pid": os.getpid(), "host": socket.gethostname()})
        self._close = weakref.finalize(self, os.close, self._file)
        _held.add(self)

    def _open(self) -> int:
        """Open and lock the file, again if its holder has deleted it in between."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(file)
                if not self._delete or _is_same(file, self._path):
                    return file
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    warnings.warn(
                        f"{self._path}: this file system has no locks ({error.strerror}); make "
                        "sure that no other process writes to the same folder",
                        stacklevel=3,
                    )
                    return file
                held = _locked_error(file) if error.errno in _HELD else error
                os.close(file)
                raise held from None
            os.close(file)

    @property
    def held(self) -> bool:
        """Whether this process still holds the lock."""
        return self._close.alive

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        if self._close.alive:
            self._write(None)
            if self._delete:
                with contextlib.suppress(OSError):  # on Windows it cannot be deleted while open
                    self._path.unlink()
            _unlock(self._file)
            self._close()

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, holder: dict[str, Any] | None) -> None:
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        if holder is not None:
            os.write(self._file, json.dumps(holder).encode() + b"\n")


def _locked_error(file: int) -> LockedError:
    try:
        holder = json.loads(os.read(file, 1000))
        who = f"process {int(holder['pid'])} on {holder['host']}"
        return LockedError(
            who, (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        )
    except (ValueError, KeyError, TypeError):  # just acquired, or just released
        return LockedError("another process")


def _is_same(file: int, path: Path) -> bool:
    """Return whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


_held: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    """Close a forked child's copies of the lock files; they would keep the locks otherwise."""
    for lock in _held:
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


if sys.platform == "win32":

    def _lock(file: int) -> None:
        """Lock a byte far after the text, since other processes cannot read locked bytes."""
        os.lseek(file, 1 << 30, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _unlock(file: int) -> None:
        """Do nothing: closing the file releases the lock, as no other process has a copy of it."""

else:

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: int) -> None:
        """Unlock explicitly: a newly forked child may still have the file open."""
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
