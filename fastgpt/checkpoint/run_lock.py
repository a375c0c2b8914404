"""One writer per run folder: a second process is refused.

The lock is the system's, on the open file `.lock` of the folder: it ends with the process that
holds it, however that ends. The text in the file only says who it is.
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
    """Makes the run folder `run` this process's alone, from now until `release` or the end.

    Raises UsageError if another one is writing it, naming the process and the machine, or if the
    folder cannot be written at all. On a file system without locks it warns and goes on. Also a
    context manager. Processes forked while it is held do not hold it.
    """

    def __init__(self, run: Path) -> None:
        self._run, path = run, run / NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"run folder {run} cannot be written: {error.strerror} ({path}); mend that, or "
                f"copy the run to where it can"
            ) from None
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno in _HELD:
                message = self._refusal()
                os.close(self._file)
                raise UsageError(message) from None
            if error.errno not in _UNSUPPORTED:
                os.close(self._file)
                raise
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); make sure that no "
                f"other process writes this run",
                stacklevel=2,
            )
        self._write({"pid": os.getpid(), "host": socket.gethostname()})
        self._close = weakref.finalize(self, os.close, self._file)
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether the folder is still this process's."""
        return self._close.alive

    def release(self) -> None:
        """Let others have the folder; nothing happens the second time."""
        if self._close.alive:
            self._write(None)
            _unlock(self._file)
            self._close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _refusal(self) -> str:
        """Say who holds the folder, and what to do."""
        what = (
            "wait until that ends, or stop it (a notebook holds a run until its Trainer's close() "
            "or its own end)"
        )
        try:
            holder = json.loads(os.read(self._file, 1000))
            who = f"process {int(holder['pid'])} on {holder['host']}"
            if (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname()):
                who += ", which is this one"
                what = "call close() of the Trainer that was made for it before"
        except (ValueError, KeyError, TypeError):  # just taken, or just released
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


def _forget() -> None:
    """In a forked child: close its copies of the files, or the locks would outlive the parent."""
    for lock in _held:
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


if sys.platform == "win32":

    def _lock(file: int) -> None:
        """Lock a byte far behind the text, which others can then still read."""
        os.lseek(file, 1 << 30, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _unlock(file: int) -> None:
        """Do nothing: to close the file is enough, and no other process has a copy of it."""

else:

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: int) -> None:
        """Unlock by name: a child that has been forked just now may still have the file open."""
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
