"""Saving checkpoints while training goes on.

`save` copies the tensors to host memory and returns; a thread hashes the copy, writes it beside its
place, syncs it to disk and renames it into place. So a checkpoint that is there is whole, whenever
the process ends. `fastgpt.checkpoint.load` finds and loads them.

A large model on a CPU is written while training waits: a copy would take as much memory again, and
the thread would work on the cores that train.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.load import (
    EMA,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    CheckpointError,
    checkpoints_of,
    rank,
    read_json,
    sync,
    write_json,
)
from fastgpt.checkpoint.tensor_file import HostCopy, write_tensors
from fastgpt.model import GPT, GPTConfig

LARGE = 256_000_000  # bytes


@dataclass(frozen=True)
class TrainingState:
    """All of a run at one step. Tensors are whole ones, on any device; values are not copied.

    optimizer: `wte.weight.exp_avg` and so on, per parameter. val_loss: nats per token, None between
    two evaluations. ema: averaged weights, if the run keeps them. extra: whatever else continuing
    needs, as JSON can hold it.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    val_loss: float | None
    config: GPTConfig
    tokenizer_hash: str
    data_sha256: str
    ema: Mapping[str, Tensor] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors by the file that they go to."""
        averaged = {} if self.ema is None else {EMA: self.ema}
        return {MODEL: self.model, OPTIMIZER: self.optimizer, **averaged}


def state_of(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    val_loss: float | None,
    tokenizer_hash: str,
    data_sha256: str,
    ema: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> TrainingState:
    """Return the state of a run whose model and optimizer are whole in this process."""
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return TrainingState(
        step,
        model.state_dict(),
        moments,
        val_loss,
        model.config,
        tokenizer_hash,
        data_sha256,
        ema,
        extra or {},
    )


class Checkpointer:
    """Saves the checkpoints of one run; the newest `keep` of them stay, and the best.

    Create it while holding the run's lock (see `fastgpt.checkpoint.run_lock`): it deletes what an
    interrupted save left, and raises CheckpointError if the folder cannot be written. Used as a
    context manager it waits for the last save at the end, unless the block ends by
    KeyboardInterrupt or SystemExit: then a save in flight is given up.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self._folder, self._keep = checkpoints_of(run), keep
        self._copies: dict[str, HostCopy] = {}
        self._thread: threading.Thread | None = None
        self._failure: tuple[Path, BaseException] | None = None
        self._given_up = threading.Event()
        _make_writable(self._folder)
        _sweep(self._folder)

    def save(self, state: TrainingState) -> None:
        """Copy `state` and start writing it as the newest checkpoint of the run.

        Waits for the save before this one, and raises CheckpointError if that failed, or if a value
        is not finite: then nothing is written.
        """
        self.wait()
        self._given_up.clear()
        _refuse_not_finite(state)
        target = self._folder / f"step-{state.step:08d}"
        if _is_large_on_a_cpu(state):
            self._write(target, _manifest(state), state.files)
            self.wait()
            return
        copied = self._copy(state)
        work = (target, _manifest(state), copied)
        self._thread = threading.Thread(target=self._write_copies, args=work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was saved is on the disk; CheckpointError if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            (path, error), self._failure = self._failure, None
            raise _explained(path, error) from error

    def close(self) -> None:
        """Wait as `wait` does, and free the memory of the copies."""
        try:
            self.wait()
        finally:
            self._copies.clear()

    def give_up(self) -> None:
        """Stop a save in flight as soon as it can be: nothing of it will be visible."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join(timeout=0.5)  # it may be waiting for the disk

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        else:
            self.give_up()

    def _copy(self, state: TrainingState) -> "torch.cuda.Event | None":
        """Fill the copies' memory; return what to wait for before it is complete."""
        for name in self._copies.keys() - state.files.keys():
            del self._copies[name]
        on_cuda: torch.device | None = None
        for name, tensors in state.files.items():
            if name not in self._copies or not self._copies[name].fits(tensors):
                self._copies.pop(name, None)  # freed before the next is made
                self._copies[name] = HostCopy(tensors)
            self._copies[name].copy(tensors)
            on_cuda = next((t.device for t in tensors.values() if t.is_cuda), on_cuda)
        return torch.cuda.current_stream(on_cuda).record_event() if on_cuda else None

    def _write_copies(
        self, target: Path, manifest: dict[str, Any], copied: "torch.cuda.Event | None"
    ) -> None:
        """Write one checkpoint, in a thread of its own."""
        try:
            _step_back()
            if copied is not None:
                copied.synchronize()
            files = {name: copy.tensors for name, copy in self._copies.items()}
            self._write(target, manifest, files)
        except BaseException as error:
            self._failure = (target, error)

    def _write(
        self, target: Path, manifest: dict[str, Any], files: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Write one checkpoint; what goes wrong is for `wait` to tell."""
        try:
            with _written_beside(target) as folder:
                for name, tensors in files.items():
                    manifest["files"][name] = write_tensors(folder / name, tensors, self._go_on)
                write_json(folder / MANIFEST, manifest)
                self._go_on()
            _prune(target, self._keep)
        except _GivenUp:
            pass
        except Exception as error:
            self._failure = (target, error)

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise _GivenUp


class _GivenUp(Exception):  # noqa: N818 (not an error: what the person asked for)
    """The save in flight is not wanted any more."""


def _is_large_on_a_cpu(state: TrainingState) -> bool:
    tensors = [tensor for file in state.files.values() for tensor in file.values()]
    on_host = all(tensor.device.type == "cpu" for tensor in tensors)
    return on_host and sum(tensor.nbytes for tensor in tensors) > LARGE


def _manifest(state: TrainingState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": state.step,
        "val_loss": state.val_loss,
        "config": asdict(state.config),
        "tokenizer_hash": state.tokenizer_hash,
        "data_sha256": state.data_sha256,
        "extra": json.loads(json.dumps(state.extra)),  # a copy, which nobody changes any more
        "files": {},
    }


@torch.no_grad()
def _refuse_not_finite(state: TrainingState) -> None:
    """Raise CheckpointError if any value is NaN or infinite.

    The norm of everything is a pass at the speed of memory. It also overflows for huge values, so
    what looks wrong is looked at again, one tensor at a time.
    """
    tensors = [t for file in state.files.values() for t in file.values() if t.is_floating_point()]
    if torch.nn.utils.get_total_norm(tensors).isfinite():
        return
    for what, file in (
        ("weights", state.model),
        ("averaged weights", state.ema or {}),
        ("optimizer state", state.optimizer),
    ):
        if bad := [name for name, tensor in file.items() if not tensor.isfinite().all()]:
            listed = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            raise CheckpointError(
                f"{what} that are not finite at step {state.step:,} ({listed}): training has "
                f"diverged; lower --lr; the saved checkpoints are untouched"
            )


def _explained(path: Path, error: BaseException) -> CheckpointError:
    """Say what became of a save that failed, and what to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{error.strerror}; free some, then continue the run with --resume"
    elif isinstance(error, OSError):
        what = f"{error.strerror or error} ({error.filename or path.parent})"
    else:
        what = repr(error)
    return CheckpointError(f"{path} was not saved: {what}; the checkpoints before it are untouched")


def _make_writable(folder: Path) -> None:
    """Make the folder of checkpoints; CheckpointError if nothing can be made in it."""
    probe = folder / ".saving-probe"
    try:
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; mend that, or copy the run to where "
            f"it can"
        ) from None


def _sweep(folder: Path) -> None:
    """Delete what an interrupted save left behind; put back what it had moved aside."""
    for leftover in folder.glob(".*"):
        replaced = leftover.with_name(leftover.name.removeprefix(".old-"))
        if leftover.name.startswith(".old-") and not replaced.exists():
            leftover.rename(replaced)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `target` at the end, or vanishes."""
    folder, old = (target.with_name(f".{word}-{target.name}") for word in ("saving", "old"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sync(folder)
        if target.exists():  # the same step, trained again after a resume from an older one
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)


def _prune(newest: Path, keep: int) -> None:
    """Keep the `keep` newest checkpoints up to the one just written, and that of the lowest loss.

    What is numbered higher was damaged, or this run would have continued from there.
    """
    ranks = {}
    for path in newest.parent.glob("step-*"):
        if path > newest:
            _delete(path)
            continue
        with contextlib.suppress(CheckpointError):  # a damaged one is left for a person to see
            ranks[path] = rank(read_json(path / MANIFEST).get("val_loss"))
    kept = {*sorted(ranks)[-keep:], min(ranks, key=ranks.__getitem__)}
    for path in ranks.keys() - kept:
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint, out of sight first: an end halfway must not leave half of it."""
    hidden = path.with_name(f".deleting-{path.name}")
    with contextlib.suppress(OSError):
        path.rename(hidden)
        shutil.rmtree(hidden)


def _step_back() -> None:
    """Let the threads that train go first: a step waits for the slowest of them."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
