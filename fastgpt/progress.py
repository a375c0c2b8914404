"""What a person sees: one live line while a model trains or files are read, and the evaluations.

On a terminal the live line is redrawn in place; anywhere else there is none.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LOGS = 0.5


class Progress:
    """Counts steps and tokens from `step` to `max_steps`, and shows how training goes."""

    def __init__(self, step: int, max_steps: int) -> None:
        self.console = Console(highlight=False)
        self._bar = Bar(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", completed=step, total=max_steps)
        self.step, self.max_steps = step, max_steps
        self.loss = float("nan")
        self.tokens_per_s = 0.0
        self._tokens, self._first_step = 0, step
        self._began = self._logged = self._marked = time.perf_counter()
        self._pauses = 0.0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stepped(self, step: int, tokens: int) -> None:
        """Count one step of so many tokens."""
        self.step = step
        self._tokens += tokens

    def due(self) -> bool:
        """Tell whether the live line is old enough to be redrawn (reading a loss may wait)."""
        last = self.step == self.max_steps
        first = self.step == self._first_step + 1
        return first or last or time.perf_counter() - self._logged >= SECONDS_BETWEEN_LOGS

    def show(self, loss: float, lr: float) -> None:
        """Redraw the live line."""
        now = time.perf_counter()
        self.tokens_per_s = self._tokens / max(1e-9, now - self._marked - self._pauses)
        self._tokens, self._pauses, self._logged, self._marked = 0, 0.0, now, now
        self.loss = loss
        text = f"loss {loss:.4f}  lr {lr:.2e}  {self.tokens_per_s:,.0f} tokens/s  left"
        self._bar.update(self._task, completed=self.step, description=text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, saving) out of the tokens per second."""
        began = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - began

    def evaluated(self, val_loss: float) -> None:
        """Print the line of an evaluation."""
        minutes, seconds = divmod(int(time.perf_counter() - self._began), 60)
        self.say(
            f"step {self.step:>6,}/{self.max_steps:,}  train loss {self.loss:.4f}  "
            f"validation loss {val_loss:.4f}  {self.tokens_per_s:>7,.0f} tokens/s  "
            f"{minutes}:{seconds:02d}"
        )


class FileProgress:
    """A bar of the bytes read of `total`, on a terminal only (it goes to standard error)."""

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn(what),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
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

    def advance(self, n_bytes: int) -> None:
        """Count so many bytes more."""
        self._bar.advance(self._task, n_bytes)
