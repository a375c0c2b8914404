"""Lock a run folder, so that only one process writes to it.

The lock is an operating system lock on the open file `.lock` in the folder. It is released when the
process ends, even if the process is killed. The contents of the file only identify the holder.
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

from fastgpt.utils.errors import UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class RunLock:
    """An exclusive lock on the run folder `run`, held until `release` or the end of the process.

    It can be used as a context manager. Processes that are forked while it is held do not hold it.
    On a file system without locks, a warning is issued and the folder is not locked.

    Raises: UsageError if another process holds the lock, with the process and the machine, or if
        the folder is not writable.
    """

    def __init__(self, run: Path) -> None:
        self._run, path = run, run / NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"run folder {run} cannot be written: {error.strerror} ({path}); fix this, or "
                f"copy the run to a writable folder"
            ) from None
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno in _HELD:
                message = self._held_message()
                os.close(self._file)
                raise UsageError(message) from None
            if error.errno not in _UNSUPPORTED:
                os.close(self._file)
                raise
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); make sure that no "
                f"other process writes to this run",
                stacklevel=2,
            )
        self._write({"pid": os.getpid(), "host": socket.gethostname()})
        self._close = weakref.finalize(self, os.close, self._file)
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether this process still holds the lock."""
        return self._close.alive

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        if self._close.alive:
            self._write(None)
            _unlock(self._file)
            self._close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _held_message(self) -> str:
        """Return the error message that names the holder of the lock and suggests what to do."""
        what = (
            "wait until it ends, or stop it (a notebook holds the lock until close() of its "
            "Trainer is called or the notebook ends)"
        )
        try:
            holder = json.loads(os.read(self._file, 1000))
            who = f"process {int(holder['pid'])} on {holder['host']}"
            if (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname()):
                who += ", which is this one"
                what = "call close() of the earlier Trainer of this run"
        except (ValueError, KeyError, TypeError):  # just acquired, or just released
            who = "another process"
        return (
            f"{self._run} is being written by {who}; {what}, or train into another folder with "
            f"--out"
        )

    def _write(self, holder: dict[str, Any] | None) -> None:
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        if holder is not None:
            os.write(self._file, json.dumps(holder).encode() + b"\n")


_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


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
