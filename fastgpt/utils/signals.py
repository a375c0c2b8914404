"""Stop gracefully: the first Ctrl-C, SIGTERM or SIGHUP requests a stop, the second one forces it.

SIGHUP is sent when the terminal is closed. `nohup` and some job systems ignore it; it stays ignored
then.
"""

import os
import shlex
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, _HANGUP)))
# Signals within this time count as one request: a launcher can forward a signal that was already
# sent to the whole process group.
ECHO_SECONDS = 0.25
GRACE_SECONDS = 1.0  # time for a normal exit after the second request


class Stopped(Exception):  # noqa: N818 (not an error: requested by the user)
    """Raised when a run was stopped by a signal, after its state was saved.

    `exit_code` follows the shell convention for signals: 130 for Ctrl-C, 143 for SIGTERM, 129 for
    SIGHUP.
    """

    def __init__(self, signal_number: int, run: Path, step: int) -> None:
        super().__init__(
            f"stopped at step {step:,} and saved; resume with: "
            f"python -m fastgpt.train --resume {shlex.quote(str(run))}"
        )
        self.exit_code = 128 + signal_number


class StopSignal:
    """A context manager in which the first SIGINT, SIGTERM or SIGHUP only sets `requested`.

    The second signal raises SystemExit. If Python cannot raise it, because a long computation or a
    wait for another process does not return, the process exits a second later. A second signal
    within ECHO_SECONDS of the first one is ignored. Outside of the main thread, signals cannot be
    handled, and the context manager has no effect.
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
                if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._watcher is not None:
            self._watcher.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._request.is_repeated():
            raise SystemExit(128 + number)
        self.requested = self.requested or number


class _Request:
    """Distinguishes the first signal and its echoes from a second one, which forces a stop."""

    def __init__(self) -> None:
        self._first: float | None = None

    def is_repeated(self) -> bool:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > ECHO_SECONDS


class _Watcher:
    """Ends the process if it is still running GRACE_SECONDS after the second signal.

    Python runs signal handlers only in the main thread, between two bytecode instructions. But its
    C-level handler immediately writes the signal number to the wakeup file descriptor, which is a
    socket here that a thread reads from.
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
        while received := self._read.recv(1):  # empty if closed
            number = received[0]
            if number in SIGNALS and request.is_repeated():
                self._read.settimeout(GRACE_SECONDS)
                self._exit_unless_closed(128 + number)
                return

    def _exit_unless_closed(self, exit_code: int) -> None:
        try:
            while self._read.recv(1):  # ignore further signals until it is closed
                pass
        except TimeoutError:
            os._exit(exit_code)
