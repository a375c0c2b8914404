"""Save checkpoints asynchronously, while training continues.

`save` copies the tensors to host memory and returns. A thread hashes the copy, writes it to a
temporary folder, syncs it to disk and renames the folder. An existing checkpoint is therefore
always complete, even if the process is killed. `fastgpt.checkpoint.load` finds and loads them.

A large model on a CPU is saved synchronously: a copy would need as much memory again, and the
thread would compete with training for the cores.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping
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
    digest,
    rank,
)
from fastgpt.checkpoint.tensor_file import HostCopy, write_tensors
from fastgpt.model import GPTConfig
from fastgpt.utils.files import atomic_directory, write_json

LARGE = 256_000_000  # bytes; larger states on a CPU are saved synchronously


@dataclass(frozen=True)
class TrainingState:
    """The state of a run at one step. Tensors are unsharded, on any device, and are not copied.

    Attributes:
        step: number of steps done.
        model: weights by name.
        optimizer: optimizer state by names such as `wte.weight.exp_avg`.
        val_loss: validation loss in nats per token, or None if this step was not evaluated.
        config: configuration of the model.
        tokenizer_hash: fingerprint of the tokenizer.
        data_sha256: hash of the training data.
        ema: averaged weights, if the run keeps them.
        extra: further state that is needed to resume; it must be JSON serializable.
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
        """The tensors by file name."""
        averaged = {} if self.ema is None else {EMA: self.ema}
        return {MODEL: self.model, OPTIMIZER: self.optimizer, **averaged}

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [tensor for file in self.files.values() for tensor in file.values()]


class Checkpointer:
    """Saves the checkpoints of one run, and keeps the newest `keep` of them and the best one.

    Create it while holding the run's lock (see `fastgpt.checkpoint.run_lock`), since it deletes the
    leftovers of interrupted saves. As a context manager, it waits for the last save at the end of
    the block, unless the block raises KeyboardInterrupt or SystemExit: a save in progress is
    aborted then.

    Args:
        run: the run folder.
        keep: number of newest checkpoints to keep.

    Raises: CheckpointError if the folder is not writable.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self._folder, self._keep = checkpoints_of(run), keep
        self._copies: dict[str, HostCopy] = {}
        self._thread: threading.Thread | None = None
        self._failure: tuple[Path, BaseException] | None = None
        self._aborted = threading.Event()
        _make_writable(self._folder)
        _clean_up(self._folder)

    def save(self, state: TrainingState) -> None:
        """Copy `state` and start writing it as the newest checkpoint of the run.

        Waits for the previous save first.

        Raises: CheckpointError if the previous save failed or a value of `state` is not finite.
            Nothing is written in this case.
        """
        self.wait()
        self._aborted.clear()
        _check_finite(state)
        target = self._folder / f"step-{state.step:08d}"
        if _is_large_on_a_cpu(state):
            self._write(target, _manifest(state), state.files)
            self.wait()
            return
        args = (target, _manifest(state), self._copy(state))
        self._thread = threading.Thread(target=self._write_copies, args=args, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; CheckpointError if saving it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            (path, error), self._failure = self._failure, None
            raise _save_error(path, error) from error

    def close(self) -> None:
        """Wait like `wait`, and free the memory of the copies."""
        try:
            self.wait()
        finally:
            self._copies.clear()

    def abort(self) -> None:
        """Abort a save in progress; its checkpoint will not be visible."""
        self._aborted.set()
        if self._thread is not None:
            self._thread.join(timeout=0.5)  # not longer, as it may be waiting for the disk

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        else:
            self.abort()

    def _copy(self, state: TrainingState) -> "torch.cuda.Event | None":
        """Copy the tensors to host memory.

        Returns a CUDA event to synchronize with before the copies are read, or None without CUDA.
        """
        self._copies = {  # frees the old memory before new memory is allocated
            name: copy
            for name, copy in self._copies.items()
            if name in state.files and copy.fits(state.files[name])
        }
        for name, tensors in state.files.items():
            if name not in self._copies:
                self._copies[name] = HostCopy(tensors)
            self._copies[name].copy(tensors)
        on_cuda = next((tensor.device for tensor in state.tensors if tensor.is_cuda), None)
        return torch.cuda.current_stream(on_cuda).record_event() if on_cuda else None

    def _write_copies(
        self, target: Path, manifest: dict[str, Any], copied: "torch.cuda.Event | None"
    ) -> None:
        """Write one checkpoint from the copies; the target of the thread."""
        try:
            _lower_thread_priority()
            if copied is not None:
                copied.synchronize()
            files = {name: copy.tensors for name, copy in self._copies.items()}
            self._write(target, manifest, files)
        except BaseException as error:
            self._failure = (target, error)

    def _write(
        self, target: Path, manifest: dict[str, Any], files: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Write one checkpoint; an exception is stored, to be raised by `wait`."""
        try:
            with atomic_directory(target) as folder:
                for name, tensors in files.items():
                    facts = write_tensors(folder / name, tensors, self._check_aborted)
                    manifest["files"][name] = facts
                write_json(folder / MANIFEST, {**manifest, "sha256": digest(manifest)})
                self._check_aborted()
            _prune(target, self._keep)
        except _Aborted:
            pass
        except Exception as error:
            self._failure = (target, error)

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise _Aborted


class _Aborted(Exception):  # noqa: N818 (not an error: requested by the user)
    """Raised in the writing thread when the save was aborted."""


def _is_large_on_a_cpu(state: TrainingState) -> bool:
    on_host = all(tensor.device.type == "cpu" for tensor in state.tensors)
    return on_host and sum(tensor.nbytes for tensor in state.tensors) > LARGE


def _manifest(state: TrainingState) -> dict[str, Any]:
    """Return the contents of the manifest.

    files: size and SHA-256 of each file by its name, added when the files are written, as is the
    hash of the manifest itself.
    """
    return {
        "format": FORMAT,
        "step": state.step,
        "val_loss": state.val_loss,
        "config": asdict(state.config),
        "tokenizer_hash": state.tokenizer_hash,
        "data_sha256": state.data_sha256,
        "extra": json.loads(json.dumps(state.extra)),  # a deep copy, for the writing thread
        "files": {},
    }


@torch.no_grad()
def _check_finite(state: TrainingState) -> None:
    """Raise CheckpointError if any value is NaN or infinite.

    The fast path computes the norm of all tensors, which is bound by memory bandwidth. As the norm
    also overflows for huge finite values, a non-finite norm is confirmed tensor by tensor.
    """
    tensors = [tensor for tensor in state.tensors if tensor.is_floating_point()]
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
                f"non-finite {what} at step {state.step:,} ({listed}): training has "
                f"diverged; lower --lr; the saved checkpoints are unchanged"
            )


def _save_error(path: Path, error: BaseException) -> CheckpointError:
    """Return the error for a failed save, with its reason and what to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{error.strerror}; free some space, then continue the run with --resume"
    elif isinstance(error, OSError):
        what = f"{error.strerror or error} ({error.filename or path.parent})"
    else:
        what = repr(error)
    return CheckpointError(f"{path} was not saved: {what}; earlier checkpoints are unchanged")


def _make_writable(folder: Path) -> None:
    """Create the folder of checkpoints; CheckpointError if it is not writable."""
    probe = folder / ".saving-probe"
    try:
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; fix this, or copy the run to a "
            f"writable folder"
        ) from None


def _clean_up(folder: Path) -> None:
    """Delete the leftovers of an interrupted save, and restore a checkpoint that it had renamed."""
    for leftover in folder.glob(".*"):
        replaced = leftover.with_name(leftover.name.removeprefix(".old-"))
        if leftover.name.startswith(".old-") and not replaced.exists():
            leftover.rename(replaced)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _prune(newest: Path, keep: int) -> None:
    """Delete all checkpoints except the `keep` newest, up to `newest`, and the best one.

    `newest` is the checkpoint just written. Checkpoints with a higher step are damaged, as the run
    would have resumed from them otherwise, and are deleted.
    """
    ranks = {}
    for path in newest.parent.glob("step-*"):
        if path > newest:
            _delete(path)
            continue
        with contextlib.suppress(CheckpointError):  # keep damaged checkpoints for inspection
            ranks[path] = rank(path)
    kept = {*sorted(ranks)[-keep:], min(ranks, key=ranks.__getitem__)}
    for path in ranks.keys() - kept:
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that an interruption cannot leave half of it."""
    hidden = path.with_name(f".deleting-{path.name}")
    with contextlib.suppress(OSError):
        path.rename(hidden)
        shutil.rmtree(hidden)


def _lower_thread_priority() -> None:
    """Lower the priority of this thread: a training step waits for its slowest thread."""
    if sys.platform == "linux":  # priorities are per thread there
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
