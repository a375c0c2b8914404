"""Display progress: a live line during training, progress bars for files, evaluation results.

On a terminal, the live line is redrawn in place. Without a terminal, it is not shown. A run
continues if its output cannot be written.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

SECONDS_BETWEEN_LOGS = 0.5
SMOOTHING = 0.2  # weight of the latest step time in the average that predicts the time left


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
        self._first_step = self._shown_step = step
        self._began = self._logged = self._marked = time.perf_counter()
        self._before = seconds
        self._pauses = self._all_pauses = 0.0
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
            self._draw(self._text(loss, lr, grad_norm))

    def seconds(self) -> float:
        """Return the training time in seconds as of the last line, without pauses."""
        return self._before + self._logged - self._began - self._all_pauses

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
        pause = self._all_pauses / done if done else 0.0
        return (self.max_steps - self.step) * (self._step_seconds + pause)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block (evaluation, saving) from the tokens per second."""
        began = time.perf_counter()
        try:
            yield
        finally:
            pause = time.perf_counter() - began
            self._pauses += pause

    def evaluated(self, val_loss: str) -> None:
        """Print a line with the results of an evaluation; `val_loss` is the formatted loss."""
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        self.say(
            f"step {self.step:>6,}/{self.max_steps:,}  train loss {self.loss:.4f}  "
            f"validation loss {val_loss}  {self.tokens_per_s:>7,.0f} tokens/s{mfu}  "
            f"{duration(time.perf_counter() - self._began)}"
        )

    def _count(self, now: float) -> None:
        """Compute the speed since the last line, and the figures derived from it."""
        elapsed = max(1e-9, now - self._marked - self._pauses)
        self.tokens_per_s = self._tokens / elapsed
        steps = max(1, self.step - self._shown_step)
        newest, before = elapsed / steps, self._step_seconds
        # The first step includes warm-up (kernels are compiled), so the average starts after it.
        warm = self._shown_step > self._first_step + 1
        self._step_seconds = before + SMOOTHING * (newest - before) if warm else newest
        self._all_pauses += self._pauses
        self._tokens, self._pauses, self._shown_step = 0, 0.0, self.step
        self._logged = self._marked = now
        if self._flops is not None:
            self.mfu = self.tokens_per_s * self._flops
        if self._read_memory is not None:
            self.memory = self._read_memory()

    def _text(self, loss: float, lr: float, grad_norm: float | None) -> str:
        parts = [
            f"step {self.step:,}/{self.max_steps:,}",
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            None if grad_norm is None else f"norm {grad_norm:.2f}",
            f"{self.tokens_per_s:,.0f} tokens/s",
            None if self.mfu is None else f"MFU {self.mfu:.1%}",
            None if self.memory is None else f"{self.memory / 1e9:.1f} GB",
            f"{duration(self.seconds_left())} left",
        ]
        return "  ".join(part for part in parts if part)

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
