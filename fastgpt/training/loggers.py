"""Loggers for metrics: `metrics.jsonl`, and optionally TensorBoard and Weights & Biases.

All implement the interface `Logger`. A failing logger never ends a run that has started: the
failure is reported once as a warning, and training continues.
"""

import os
import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastgpt.training.metrics import metrics_line
from fastgpt.utils.errors import UsageError

WANDB_SECONDS = 30.0  # timeout for reaching the server at the start


class Logger(ABC):
    """Interface for recording metrics and texts of training steps."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record named values of a step."""

    @abstractmethod
    def text(self, step: int, text: str) -> None:
        """Record a text of a step, for example a sample."""

    @abstractmethod
    def close(self) -> None:
        """Flush buffered records and close the logger."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise UsageError if a logger name is unknown or its package is not installed."""
    for name in names:
        if name not in _PACKAGES:
            choices = " and ".join(_PACKAGES)
            raise UsageError(f"unknown logger {name!r}: choose from {choices}")
        if find_spec(name) is None:
            raise UsageError(
                f"logging to {_PACKAGES[name]} needs a package that is not installed: "
                f"pip install {name}"
            )


def open_loggers(
    names: Sequence[str], run: Path, config: Mapping[str, Any], step: int = 0
) -> "Loggers":
    """Open `metrics.jsonl` in a run folder, and the loggers in `names`.

    Args:
        names: Any of "tensorboard" and "wandb".
        run: The run folder.
        config: The settings of the run, shown by W&B.
        step: The step at which the run is resumed, 0 for a new run. TensorBoard discards records
            of later steps, and W&B continues the same run.

    Raises:
        UsageError: If a package is missing, W&B has no API key, or `metrics.jsonl` cannot be
            written. Other failures of a logger are warnings, and the others are opened.
    """
    check_loggers(names)
    with ExitStack() as opened:  # on an error, closes the loggers opened so far
        loggers: list[Logger] = [MetricsFile(run / "metrics.jsonl")]
        opened.callback(loggers[0].close)
        for name in dict.fromkeys(names):
            try:
                loggers.append(_open(name, run, config, step))
                opened.callback(loggers[-1].close)
            except UsageError:
                raise
            except Exception as error:  # for example a disk error or a broken installation
                warnings.warn(
                    f"{_PACKAGES[name]} is not available ({_one_line(error)}): this run is logged "
                    "without it",
                    stacklevel=2,
                )
        opened.pop_all()
    return Loggers(loggers)


class Loggers(Logger):
    """Forwards records to several loggers.

    The first failure of each logger is a warning, later ones are ignored; the other loggers are not
    affected.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = loggers
        self._failed: set[int] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record named values of a step in all loggers."""
        self._all("log", step, values)

    def text(self, step: int, text: str) -> None:
        """Record a text of a step in all loggers."""
        self._all("text", step, text)

    def close(self) -> None:
        """Close all loggers."""
        self._all("close")

    def _all(self, method: str, *args: Any) -> None:
        for index, logger in enumerate(self.loggers):
            try:
                getattr(logger, method)(*args)
            except Exception as error:  # disks and external services may raise anything
                if index not in self._failed:
                    self._failed.add(index)
                    what = f"{type(logger).__name__} failed to log a record and may lose more"
                    warnings.warn(f"{what}: {_one_line(error)}", stacklevel=3)


class MetricsFile(Logger):
    """Appends one line of JSON per record, unbuffered: `log` passes the line to the system."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a+b", buffering=0)
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
            # Whether the file ends with an incomplete line.
            self._incomplete = self._file.read(1) not in (b"", b"\n")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line with the values."""
        self._write({"step": step, **values})

    def text(self, step: int, text: str) -> None:
        """Append a line with the text."""
        self._write({"step": step, "text": text})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = metrics_line(record).encode()
        # End an incomplete line (of a crash or a full disk) first, so that it does not corrupt this
        # one. The flag stays set if the write fails or is partial.
        line = b"\n" + line if self._incomplete else line
        self._incomplete = True
        if self._file.write(line) != len(line):
            raise OSError("the disk is full")
        self._incomplete = False


class TensorBoard(Logger):
    """Writes TensorBoard event files to `folder`. View them with ``tensorboard --logdir runs``."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hide events that an interrupted run logged after its last checkpoint.
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, new_style=True)

    def text(self, step: int, text: str) -> None:
        """Add a text, indented as a code block so that it is not rendered as Markdown."""
        code = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text("sample", code, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases(Logger):
    """Logs to Weights & Biases, in the project "fastgpt" or ``$WANDB_PROJECT``.

    The W&B run id is saved in the run folder, so that a resumed run continues the same W&B run. If
    the server cannot be reached, a warning is issued and the run is logged offline into the run
    folder, for `wandb sync`.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        self._wandb = wandb
        start = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", "fastgpt"),
            name=run.name,
            id=_run_id(run / "wandb-id.txt"),
            resume="allow",
            dir=str(run),
            config=dict(config),
            settings=wandb.Settings(console="off", init_timeout=WANDB_SECONDS),
        )
        try:
            self._run = start()
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UsageError(
                f"W&B: {_one_line(error)} Run `wandb login` first, or log without a network: "
                "WANDB_MODE=offline"
            ) from None
        except Exception as error:  # network failures may raise anything
            warnings.warn(
                f"W&B cannot be reached ({_one_line(error)}): this run is logged offline in "
                f"{run / 'wandb'}; upload it later with `wandb sync`",
                stacklevel=3,
            )
            self._run = start(mode="offline")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log to the run; values that it already has for this step are kept."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, text: str) -> None:
        """Log the text as a table."""
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({"sample": table}, step=step)

    def close(self) -> None:
        """Finish the run. This may wait for the network."""
        self._run.finish()


_PACKAGES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def _open(name: str, run: Path, config: Mapping[str, Any], step: int) -> Logger:
    if name == "tensorboard":
        return TensorBoard(run / "tensorboard", step)
    return WeightsAndBiases(run, config)


def _run_id(path: Path) -> str:
    """Return the run id saved in a file; create the file with a random id if it does not exist."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
