"""Stopping in good order: the first Ctrl-C or SIGTERM asks, the second insists."""

import os
import shlex
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 0.25  # one request, sent to a group of processes and passed on within it
GRACE_SECONDS = 1.0  # to end properly once it was insisted


class Stopped(Exception):  # noqa: N818 (not an error: what the person asked for)
    """A run that was asked to stop has saved its state.

    `exit_code` is the shell's convention for the signal: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signal_number: int, run: Path, step: int) -> None:
        super().__init__(
            f"stopped at step {step:,} and saved; go on with: "
            f"python -m fastgpt.train --resume {shlex.quote(str(run))}"
        )
        self.exit_code = 128 + signal_number


class StopSignal:
    """Within the block, the first SIGINT or SIGTERM sets `requested` instead of interrupting.

    The second one stops at once, by SystemExit; where Python cannot raise it, because a long
    computation or a wait for another process does not return, the process ends a second later. A
    second signal within ECHO_SECONDS counts as the first. Outside the main thread signals cannot be
    caught, and nothing changes.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._request = _Request()
        self._before: dict[int, Any] = {}
        self._watcher: _Watcher | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._watcher = _Watcher()
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._watcher is not None:
            self._watcher.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._request.insists():
            raise SystemExit(128 + number)
        self.requested = self.requested or number


class _Request:
    """Tells whether a signal is the first, or an echo of it, or insists."""

    def __init__(self) -> None:
        self._first: float | None = None

    def insists(self) -> bool:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > ECHO_SECONDS


class _Watcher:
    """Ends the process if it is still there a while after it was insisted.

    Python runs signal handlers in the main thread and between two of its own operations only. What
    it does at once, in any thread, is to write the signal's number to a socket: a thread reads it.
    """

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        signal.set_wakeup_fd(self._before)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _watch(self) -> None:
        request = _Request()
        while received := self._read.recv(1):  # nothing: closed
            number = received[0]
            if number in SIGNALS and request.insists():
                self._read.settimeout(GRACE_SECONDS)
                self._end_unless_closed(128 + number)
                return

    def _end_unless_closed(self, exit_code: int) -> None:
        try:
            while self._read.recv(1):  # more signals
                pass
        except TimeoutError:
            os._exit(exit_code)
