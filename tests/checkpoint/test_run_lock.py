"""Tests of the lock of a run folder, with real second processes."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgpt.checkpoint.run_lock import NAME, RunLock
from fastgpt.utils.errors import UsageError

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fastgpt.utils.errors import UsageError
from fastgpt.checkpoint.run_lock import RunLock
try:
    lock = RunLock(Path(sys.argv[1]))
except UsageError as error:
    sys.exit(f"refused: {error}")
print("held", flush=True)
time.sleep(60)
"""

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Iterator[Start]:
    """Return a function that starts processes which acquire the lock of `tmp_path` and keep it."""
    started = []

    def one() -> "subprocess.Popen[str]":
        args = [sys.executable, "-c", HOLD, str(tmp_path), str(checkout)]
        started.append(
            subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_rejected_and_a_killed_one_releases_the_lock(
    tmp_path: Path, start: Start
) -> None:
    holder = start()
    assert holder.stdout.readline() == "held\n"
    message = rf"is being written by process {holder.pid} on .+; wait until .* --out"
    with pytest.raises(UsageError, match=message):
        RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path):
        second = start()
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"refused: {tmp_path} is being written by process {os.getpid()} on" in said
    third = start()
    assert third.stdout.readline() == "held\n"


def test_it_ends_with_the_object_or_the_block(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(UsageError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    del lock
    with RunLock(tmp_path) as lock:
        lock.release()
        with RunLock(tmp_path):
            lock.release()  # does nothing, in particular not to the other lock
            with pytest.raises(UsageError):
                RunLock(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Fork a child that outlives the lock, as the workers of a data loader can for seconds."""
    read, write = os.pipe()
    lock = RunLock(tmp_path)
    child = os.fork()
    if not child:
        os.close(write)
        lock.release()  # must not release the parent's lock
        os.read(read, 1)
        os._exit(0)
    try:
        with pytest.raises(UsageError, match="is being written"):
            RunLock(tmp_path)
        lock.release()
        with RunLock(tmp_path):  # although the child is still running
            pass
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


def test_without_locks_it_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fastgpt.utils.lock._lock", fail)
    message = "this file system has no locks .No locks available.; make sure"
    with pytest.warns(UserWarning, match=message):
        lock = RunLock(tmp_path)
    lock.release()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """Put a folder in place of the lock file, which is the first file that a run writes."""
    (tmp_path / NAME).mkdir()
    with pytest.raises(UsageError, match=r"run folder .* cannot be written: Is a directory"):
        RunLock(tmp_path)


def test_a_holder_that_has_not_said_its_name(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / NAME).write_text("{")
        with pytest.raises(UsageError, match="is being written by another process;"):
            RunLock(tmp_path)
