"""Where a run's figures go: always into its `metrics.jsonl`, and on request elsewhere too.

All have one small interface, `Logger`. None of them can end a run once it has begun: what fails is
said once, as a warning, and training goes on.
"""

import os
import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastgpt.training.metrics import metrics_line
from fastgpt.utils.errors import UsageError

WANDB_SECONDS = 30.0  # to reach the server at the start


class Logger(ABC):
    """Takes what is worth keeping about a step."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep named figures of a step."""

    @abstractmethod
    def text(self, step: int, text: str) -> None:
        """Keep a text of a step, say a sample."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still held back; the logger is not used any more."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise UsageError if a name is unknown or its package missing; nothing is opened."""
    for name in names:
        if name not in _PACKAGES:
            choices = " and ".join(_PACKAGES)
            raise UsageError(f"unknown logger {name!r}: there are {choices}")
        if find_spec(name) is None:
            raise UsageError(
                f"logging to {_PACKAGES[name]} needs a package that is not installed: "
                f"pip install {name}"
            )


def open_loggers(
    names: Sequence[str], run: Path, config: Mapping[str, Any], step: int = 0
) -> "Loggers":
    """Open `metrics.jsonl` in a run folder, and the loggers called `names`.

    names: "tensorboard", "wandb". config: what W&B is to show as the run's settings. step: where
    the run goes on (0: it is new); nothing is kept of later steps, and W&B's run stays the same
    one. UsageError if a package is missing, W&B knows no key, or `metrics.jsonl` cannot be written;
    what else goes wrong with a logger is a warning, and the others are opened.
    """
    check_loggers(names)
    with ExitStack() as opened:  # closes what is open if the next cannot be
        loggers: list[Logger] = [MetricsFile(run / "metrics.jsonl")]
        opened.callback(loggers[0].close)
        for name in dict.fromkeys(names):
            try:
                loggers.append(_open(name, run, config, step))
                opened.callback(loggers[-1].close)
            except UsageError:
                raise
            except Exception as error:  # a disk, a broken installation
                warnings.warn(
                    f"{_PACKAGES[name]} cannot be had ({_one_line(error)}): this run is logged "
                    "without it",
                    stacklevel=2,
                )
        opened.pop_all()
    return Loggers(loggers)


class Loggers(Logger):
    """Several as one; a fault of one is a warning, the first time, and the others go on."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = loggers
        self._failed: set[int] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep named figures of a step everywhere."""
        self._all("log", step, values)

    def text(self, step: int, text: str) -> None:
        """Keep a text of a step everywhere."""
        self._all("text", step, text)

    def close(self) -> None:
        """Close all."""
        self._all("close")

    def _all(self, method: str, *args: Any) -> None:
        for index, logger in enumerate(self.loggers):
            try:
                getattr(logger, method)(*args)
            except Exception as error:  # whatever a disk or somebody's service may come up with
                if index not in self._failed:
                    self._failed.add(index)
                    what = f"{type(logger).__name__} lost a record and may lose more"
                    warnings.warn(f"{what}: {_one_line(error)}", stacklevel=3)


class MetricsFile(Logger):
    """Adds a line of JSON per record; a line is with the system as soon as it was logged."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("ab", buffering=0)
            self._torn = path.stat().st_size > 0 and _last_byte(path) != b"\n"
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line."""
        self._write({"step": step, **values})

    def text(self, step: int, text: str) -> None:
        """Add a line with the text."""
        self._write({"step": step, "text": text})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = metrics_line(record).encode()
        whole = b"\n" + line if self._torn else line  # a torn line, of a full disk, stays alone
        self._torn = True
        if self._file.write(whole) != len(whole):
            raise OSError("the disk is full")
        self._torn = False


class TensorBoard(Logger):
    """Writes event files into `folder`: ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged behind its last checkpoint is hidden.
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to a curve per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, new_style=True)

    def text(self, step: int, text: str) -> None:
        """Show the text as it is, not as Markdown."""
        code = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text("sample", code, step)

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


class WeightsAndBiases(Logger):
    """Logs to W&B, project "fastgpt" or ``$WANDB_PROJECT``.

    The run's id is kept in the run folder, so that a resumed run goes on in the same one. A server
    that cannot be reached is a warning, and the run is written into the folder for `wandb sync`.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        self._wandb = wandb
        settings = wandb.Settings(console="off", init_timeout=WANDB_SECONDS)
        options: dict[str, Any] = {
            "name": run.name,
            "id": _kept_id(run / "wandb-id.txt"),
            "resume": "allow",
            "dir": str(run),
            "config": dict(config),
            "settings": settings,
        }
        try:
            self._run = _start(wandb, options)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UsageError(
                f"W&B: {_one_line(error)} Run `wandb login` first, or log without a network: "
                "WANDB_MODE=offline"
            ) from None
        except Exception as error:  # whatever a network may come up with
            warnings.warn(
                f"W&B cannot be reached ({_one_line(error)}): this run is kept in {run / 'wandb'}; "
                "send it later with `wandb sync`",
                stacklevel=3,
            )
            self._run = _start(wandb, options | {"mode": "offline"})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log to the run; what it has of a step already stays."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, text: str) -> None:
        """Add the text to the run's media."""
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({"sample": table}, step=step)

    def close(self) -> None:
        """Finish the run; it may wait for the network."""
        self._run.finish()


_PACKAGES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def _open(name: str, run: Path, config: Mapping[str, Any], step: int) -> Logger:
    if name == "tensorboard":
        return TensorBoard(run / "tensorboard", step)
    return WeightsAndBiases(run, config)


def _start(wandb: Any, options: dict[str, Any]) -> Any:
    return wandb.init(project=os.environ.get("WANDB_PROJECT", "fastgpt"), **options)


def _kept_id(path: Path) -> str:
    """Return the id in a file, made at random when the file is."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
