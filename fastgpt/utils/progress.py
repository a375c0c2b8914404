"""Display progress: a live line during training, progress bars for files, evaluation results.

On a terminal, the live line is redrawn in place. Elsewhere, as in log files and notebooks, it is
printed every `SECONDS_BETWEEN_LINES`. A run continues if its output cannot be written.
"""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from fastgpt.utils.output import OptionalOutput

SECONDS_BETWEEN_LOGS = 0.5  # and the shortest time over which the speed is measured
SECONDS_BETWEEN_LINES = 30.0  # without a terminal
SMOOTHING = 0.2  # weight of the latest step time in the average that predicts the time left


class Mark(NamedTuple):
    """A point in a run, from which the speed is measured."""

    step: int
    tokens: int
    seconds: float  # of training, without pauses


class Progress:
    """Counts steps and tokens during training, and displays the progress.

    Args:
        step: the step to start from.
        max_steps: the last step.
        seconds: training time before a resume.
        flops_per_token: operations per token, for the MFU (`fastgpt.training.throughput`).
        peak: operations per second of all devices together, for the MFU.
        memory: returns the memory in use in bytes, or None if unknown.
        shown: whether to display anything; False on all processes except one.

    The line is not drawn with rich: its progress bar uses a thread that redraws ten times per
    second, while a training step can take only a few milliseconds. Here, a step costs about 1 µs
    and drawing a line about 50 µs.
    """

    def __init__(
        self,
        step: int,
        max_steps: int,
        *,
        seconds: float = 0.0,
        flops_per_token: float | None = None,
        peak: float | None = None,
        memory: Callable[[], int | None] | None = None,
        shown: bool = True,
    ) -> None:
        self.step, self.max_steps = step, max_steps
        self.loss = float("nan")
        self.tokens_per_s = 0.0
        self.mfu: float | None = None
        self.memory: int | None = None
        self.shown = shown
        self._out = OptionalOutput(sys.stdout)
        self.live = shown and self._out.isatty()
        self._flops = flops_per_token / peak if flops_per_token and peak else None
        self._read_memory = memory
        self._tokens = 0
        self._first_step = step
        self._began = self._logged = self._printed = time.perf_counter()
        self._before, self._pauses = seconds, 0.0
        self._marks = deque([Mark(step, 0, 0.0)])
        self._seconds = 0.0  # of training as of the last line, without pauses
        self._step_seconds = math.nan  # smoothed recent step time, without pauses
        self._line = ""  # the live line as currently displayed

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("")

    def say(self, text: str) -> None:
        """Print text above the live line, for example a generated sample."""
        if self.shown:
            line = self._line
            self._draw("")
            print(text, file=self._out, flush=True)
            self._printed = time.perf_counter()
            self._draw(line)

    def stepped(self, step: int, tokens: int) -> None:
        """Count one step; `tokens` is the number of tokens of all processes in it."""
        self.step = step
        self._tokens += tokens

    def due(self) -> bool:
        """Return whether the live line should be redrawn.

        This limits how often the loss is read, which can require synchronizing with the GPU.
        """
        last = self.step == self.max_steps
        first = self.step == self._first_step + 1
        return first or last or time.perf_counter() - self._logged >= SECONDS_BETWEEN_LOGS

    def show(self, loss: float, lr: float, grad_norm: float | None = None) -> None:
        """Update all figures and redraw the live line."""
        now = time.perf_counter()
        self._count(now)
        self.loss = loss
        if self.live:
            self._draw(self._text(loss, lr, grad_norm, shutil.get_terminal_size().columns))
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self.say(self._text(loss, lr, grad_norm))

    def seconds(self) -> float:
        """Return the training time in seconds as of the last line, without pauses."""
        return self._before + self._seconds

    def figures(self) -> dict[str, float]:
        """Return the metrics to log in addition to the loss, as of the last line."""
        known = {"mfu": self.mfu, "memory_gb": self.memory and self.memory / 1e9}
        return {
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds(),
            **{name: value for name, value in known.items() if value is not None},
        }

    def seconds_left(self) -> float:
        """Return the estimated remaining time in seconds, NaN before the first measurement.

        It includes pauses such as evaluations, at their average so far per step.
        """
        done = self.step - self._first_step
        pause = self._pauses / done if done else 0.0
        return (self.max_steps - self.step) * (self._step_seconds + pause)

    @contextmanager
    def paused(self, activity: str) -> Iterator[None]:
        """Exclude the time of the block from the tokens per second, and show its `activity`."""
        began, line = time.perf_counter(), self._line
        self._draw(f"step {self.step:,}/{self.max_steps:,}  {activity} ...")
        try:
            yield
        finally:
            self._pauses += time.perf_counter() - began
            self._draw(line)

    def evaluated(self, val_loss: str) -> None:
        """Print a line with the results of an evaluation; `val_loss` is the formatted loss.

        The other figures are those of the last `show`, or left out if no step was made yet.
        """
        trained = self.step > self._first_step
        parts = [
            f"step {self.step:>6,}/{self.max_steps:,}",
            f"train loss {self.loss:.4f}" if trained else None,
            f"validation loss {val_loss}",
            f"{self.tokens_per_s:>7,.0f} tokens/s" if trained else None,
            None if self.mfu is None else f"MFU {self.mfu:.1%}",
            duration(time.perf_counter() - self._began),
        ]
        self.say("  ".join(filter(None, parts)))

    def _count(self, now: float) -> None:
        """Compute the speed, and the figures derived from it.

        It is measured over at least SECONDS_BETWEEN_LOGS, because a step can take only a few
        milliseconds, but not over the first line again: kernels are compiled before it.
        """
        self._logged, self._seconds = now, now - self._began - self._pauses
        marks, latest = self._marks, self._seconds - SECONDS_BETWEEN_LOGS
        while len(marks) > 1 and marks[1].seconds <= latest:
            marks.popleft()
        since = marks[0]
        elapsed = max(1e-9, self._seconds - since.seconds)
        self.tokens_per_s = (self._tokens - since.tokens) / elapsed
        newest, before = elapsed / max(1, self.step - since.step), self._step_seconds
        warm = since.step > self._first_step + 1
        self._step_seconds = before + SMOOTHING * (newest - before) if warm else newest
        if since.step == self._first_step:
            marks.clear()
        marks.append(Mark(self.step, self._tokens, self._seconds))
        if self._flops is not None:
            self.mfu = self.tokens_per_s * self._flops
        if self._read_memory is not None:
            self.memory = self._read_memory()

    def _text(
        self, loss: float, lr: float, grad_norm: float | None, columns: float = math.inf
    ) -> str:
        """Return the line, without its least important figures if it exceeds the columns."""
        figures = [  # in the order of the line, each with its importance
            (f"step {self.step:,}/{self.max_steps:,}", 7),
            (f"loss {loss:.4f}", 6),
            (f"lr {lr:.2e}", 1),
            ("" if grad_norm is None else f"norm {grad_norm:.2f}", 0),
            (f"{self.tokens_per_s:,.0f} tokens/s", 4),
            ("" if self.mfu is None else f"MFU {self.mfu:.1%}", 2),
            ("" if self.memory is None else f"{self.memory / 1e9:.1f} GB", 3),
            (f"{duration(self.seconds_left())} left", 5),
        ]
        for least in range(len(figures)):
            line = "  ".join(text for text, importance in figures if text and importance >= least)
            if len(line) < columns:
                break
        return line

    def _draw(self, line: str) -> None:
        """Replace the live line by `line`, padded with spaces to cover a longer old line."""
        if not self.live or (not line and not self._line):
            return
        line = line[: shutil.get_terminal_size().columns - 1]  # a full line would wrap
        covered = " " * max(0, len(self._line) - len(line))
        self._out.write(f"\r{line}{covered}" + ("" if line else "\r"))
        self._out.flush()
        self._line = line


def duration(seconds: float) -> str:
    """Format a duration as 0:07, 12:34, 5:01:23 or 3 d 04:05; "?" if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plural(count: int, noun: str) -> str:
    """Format a number of things, whose plural ends with s: 1 thread, 1,000 threads."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class FileProgress:
    """A progress bar of bytes read, on standard error; only shown on a terminal.

    Args:
        what: label of the bar.
        total: total number of bytes, or None if it is unknown.
        shown: False to never show it.
    """

    columns: tuple[type[ProgressColumn], ...] = (DownloadColumn, TransferSpeedColumn)

    def __init__(self, what: str, total: int | None, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn(what),
            BarColumn(bar_width=24),
            *(column() for column in self.columns),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "FileProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Advance the bar by `count`."""
        self._bar.advance(self._task, count)


class CountProgress(FileProgress):
    """A progress bar of completed items; only shown on a terminal."""

    columns = (MofNCompleteColumn,)
