"""Run folders and checkpoints.

A run folder explains itself:

    config.json       the recipe, the command, the versions
    tokenizer.json    what turns text into the model's ids
    metrics.jsonl     a line per logged step and per evaluation
    checkpoints/step-00000250/
        model.safetensors  optimizer.safetensors  manifest.json

A checkpoint is written beside its place, synced to disk and renamed into it, with the size and
SHA-256 of each file in its manifest: one that is there is whole, and damage is noticed. Nothing is
pickled.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.errors import UsageError
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer, load_tokenizer

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors")


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, or of another kind; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    val_loss: float | None  # None: saved between two evaluations
    config: GPTConfig
    tokenizer_hash: str
    data_sha256: str

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model with these weights, on `device`."""
        with torch.device("meta"):
            model = GPT(self.config, ops)
        model.load_state_dict(self._tensors("model.safetensors", device), assign=True)
        return model.requires_grad_(True)

    def restore(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Put weights and optimizer state back, in place."""
        model.load_state_dict(self._tensors("model.safetensors", model.device))
        state = self._tensors("optimizer.safetensors", "cpu")
        for name, parameter in model.named_parameters():
            moments = ("step", "exp_avg", "exp_avg_sq")
            if missing := [m for m in moments if f"{name}.{m}" not in state]:
                raise CheckpointError(f"{self.path}: no {missing[0]} of {name} for the optimizer")
            saved = {m: state[f"{name}.{m}"] for m in moments}
            optimizer.state[parameter] = {
                m: t if m == "step" and not parameter.is_cuda else t.to(parameter.device)
                for m, t in saved.items()
            }

    def _tensors(self, name: str, device: torch.device | str) -> dict[str, Tensor]:
        return load_file(self.path / name, device=str(device))


def save_checkpoint(
    run: Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    *,
    val_loss: float | None,
    tokenizer_hash: str,
    data_sha256: str,
) -> Path:
    """Write a checkpoint of `step` into `run`; keep it, the one before it, and the best."""
    facts = {
        "step": step,
        "val_loss": val_loss,
        "config": asdict(model.config),
        "tokenizer_hash": tokenizer_hash,
        "data_sha256": data_sha256,
    }
    target = _folder(run) / f"step-{step:08d}"
    with _written_beside(target) as folder:
        save_file(_contiguous(model.state_dict()), folder / "model.safetensors")
        save_file(_contiguous(_optimizer_state(model, optimizer)), folder / "optimizer.safetensors")
        listed = {name: _describe(folder / name) for name in FILES}
        write_json(folder / "manifest.json", {"format": FORMAT, **facts, "files": listed})
        for file in folder.iterdir():
            _sync(file)
    _prune(target)
    return target


def find_checkpoint(run: Path, which: str = "newest") -> Checkpoint:
    """Return the newest, or the ``"best"``, good checkpoint of a run, warning of damaged ones.

    Raises CheckpointError if there is none: a damaged run never starts afresh in silence.
    """
    good, problems = [], []
    for path in sorted(_folder(run).glob("step-*"), reverse=True):
        try:
            good.append(verify(path))
        except CheckpointError as error:
            problems.append(str(error))
        if good and which == "newest":
            break
    if not good:
        found = "; ".join(problems) or "it has none yet"
        raise CheckpointError(f"{run}: no usable checkpoint: {found}")
    for problem in problems:
        warnings.warn(f"skipped a damaged checkpoint: {problem}", stacklevel=2)
    return good[0] if which == "newest" else min(good, key=lambda c: _rank(c.val_loss))


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest; CheckpointError says what is wrong."""
    manifest = _read_manifest(path / "manifest.json")
    for name, expected in manifest["files"].items():
        _verify_file(path, name, expected)
    if missing := set(FILES) - set(manifest["files"]):
        raise CheckpointError(f"{path / 'manifest.json'}: does not list {', '.join(missing)}")
    try:
        known = {field.name for field in fields(GPTConfig)}
        config = GPTConfig(**{k: v for k, v in manifest["config"].items() if k in known})
        return Checkpoint(
            path,
            int(manifest["step"]),
            None if manifest["val_loss"] is None else float(manifest["val_loss"]),
            config,
            str(manifest["tokenizer_hash"]),
            str(manifest["data_sha256"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'}: not a manifest: {error!r}") from None


def resolve_run(run: Path) -> Path:
    """Return the folder of a run; ``latest`` stands for the newest run beside it."""
    if run.name == "latest" and not run.exists():
        runs = [config.parent for config in run.parent.glob("*/config.json")]
        if not runs:
            raise UsageError(
                f"{run}: no runs in {run.parent}/ yet; train one: python -m fastgpt.train"
            )
        return max(runs, key=lambda folder: (folder / "config.json").stat().st_mtime)
    if not (run / "config.json").is_file():
        what = "is not a run folder (it has no config.json)" if run.exists() else "does not exist"
        raise UsageError(f"{run} {what}; give a folder that fastgpt.train made, e.g. runs/latest")
    return run


def load_run_tokenizer(run: Path, checkpoint: Checkpoint) -> BaseTokenizer:
    """Return the run's tokenizer; CheckpointError if the checkpoint was trained with another."""
    try:
        tokenizer = load_tokenizer(run / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run / 'tokenizer.json'}: {error}") from None
    if tokenizer.fingerprint != checkpoint.tokenizer_hash:
        raise CheckpointError(
            f"{run / 'tokenizer.json'} is not what {checkpoint.path.name} was trained with: "
            f"its hash is {tokenizer.fingerprint[:16]}, not {checkpoint.tokenizer_hash[:16]}"
        )
    return tokenizer


def sweep(run: Path) -> None:
    """Delete what an interrupted save left behind; put back what it had moved aside."""
    for leftover in _folder(run).glob(".*"):
        replaced = leftover.with_name(leftover.name.removeprefix(".old-"))
        if leftover.name.startswith(".old-") and not replaced.exists():
            leftover.rename(replaced)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON: the whole file or, on failure, nothing of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(beside)
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _folder(run: Path) -> Path:
    return run / "checkpoints"


@contextlib.contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `target` at the end, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, old = (target.with_name(f".{word}-{target.name}") for word in ("saving", "old"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        _sync(folder)
        if target.exists():  # the same step, trained again after a resume from an older one
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk now."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(newest: Path) -> None:
    """Keep the checkpoint just written, the one before it, and the one of the lowest loss.

    What is numbered higher was damaged, or this run would have continued from there.
    """
    ranks = {}
    for path in newest.parent.glob("step-*"):
        if path > newest:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(CheckpointError):  # a damaged one is left for a person to see
            ranks[path] = _rank(read_json(path / "manifest.json").get("val_loss"))
    kept = {*sorted(ranks)[-2:], min(ranks, key=ranks.__getitem__)}
    for path in ranks.keys() - kept:
        shutil.rmtree(path, ignore_errors=True)


def _rank(val_loss: float | None) -> float:
    """Order by loss, what was never evaluated last."""
    return math.inf if val_loss is None else val_loss


def _optimizer_state(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: written by a newer fastgpt (format {manifest['format']})"
            )
        raise CheckpointError(f"{path}: not a manifest of format {FORMAT}")
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: lists no files")
    return manifest


def _verify_file(folder: Path, name: str, expected: Any) -> None:
    if name not in FILES:  # also anything that points out of the folder
        raise CheckpointError(f"{folder / 'manifest.json'}: lists {name!r}, which is not ours")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / 'manifest.json'}: says nothing about {name}")
    size = path.stat().st_size
    if size != expected.get("size"):
        raise CheckpointError(f"{path} has {size:,} bytes instead of {expected.get('size')}")
    if _describe(path)["sha256"] != expected.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")
