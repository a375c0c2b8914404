"""Lock a run folder, so that only one process writes to it."""

from pathlib import Path

from fastgpt.utils.errors import UsageError
from fastgpt.utils.lock import FileLock, LockedError

NAME = ".lock"


class RunLock(FileLock):
    """An exclusive lock on the run folder `run`; see `FileLock`.

    Raises: UsageError if another process holds the lock, with the process and the machine, or if
        the folder is not writable.
    """

    def __init__(self, run: Path) -> None:
        try:
            super().__init__(run / NAME)
        except LockedError as error:
            raise UsageError(_held_message(run, error)) from None
        except OSError as error:
            raise UsageError(
                f"run folder {run} cannot be written: {error.strerror} ({run / NAME}); fix this, "
                f"or copy the run to a writable folder"
            ) from None


def _held_message(run: Path, error: LockedError) -> str:
    """Return the error message that names the holder of the lock and suggests what to do."""
    who = str(error)
    what = (
        "wait until it ends, or stop it (a notebook holds the lock until close() of its Trainer is "
        "called or the notebook ends)"
    )
    if error.by_this_process:
        who += ", which is this one"
        what = "call close() of the earlier Trainer of this run"
    return f"{run} is being written by {who}; {what}, or train into another folder with --out"
