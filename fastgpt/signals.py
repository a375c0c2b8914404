"""Stopping in good order: the first Ctrl-C or SIGTERM asks, the second insists."""

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


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

    The second one stops at once. Outside the main thread signals cannot be caught, and nothing
    changes.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise SystemExit(128 + number)
        self.requested = number
