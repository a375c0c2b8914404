"""Run folders and checkpoints: finding, checking and loading them.

A run folder explains itself:

    config.json       the recipe, the command, the versions
    tokenizer.json    what turns text into the model's ids
    metrics.jsonl     a line per logged step and per evaluation
    checkpoints/step-00000250/
        model.safetensors  optimizer.safetensors  manifest.json
        ema.safetensors    the averaged weights, if the run keeps them

A checkpoint has the size and SHA-256 of each of its files in its manifest, so damage is noticed.
Nothing is pickled. `fastgpt.checkpoint.save` writes them.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgpt.lora import Lora, merged
from fastgpt.model import GPT, GPTConfig, meta_model, meta_weights
from fastgpt.tokenizer import BaseTokenizer, load_tokenizer
from fastgpt.utils.errors import UsageError

FORMAT = 2  # 1 had no `extra` and no ema.safetensors; it is still read
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
MANIFEST = "manifest.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter
_NONE_YET = "it has none yet (if it is not training now: delete the folder, and train again)"


class Shaped(Protocol):
    """A tensor, or one that is still in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, or of another kind; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its manifest read. `extra` is what the run noted besides."""

    path: Path
    step: int
    val_loss: float | None  # None: saved between two evaluations
    config: GPTConfig
    tokenizer_hash: str
    data_sha256: str
    files: dict[str, dict[str, Any]]  # the size and SHA-256 of each
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def has_ema(self) -> bool:
        """Whether averaged weights were saved too."""
        return EMA in self.files

    def load_model(
        self, device: torch.device | str = "cpu", ops: str = "auto", *, ema: bool = False
    ) -> GPT:
        """Return the model with these weights, or with their average (`ema`), on `device`.

        Matrices that were trained beside the weights (LoRA) are added to them: it is a plain GPT.
        """
        model = meta_model(self.config, ops)
        on_device = {name: t.to(device) for name, t in self.merged_tensors(ema=ema).items()}
        model.load_state_dict(on_device, assign=True)
        return model.requires_grad_(True)

    def merged_tensors(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Return the weights of that plain GPT by name; CheckpointError lists what does not fit."""
        tensors = self.model_tensors(ema=ema)
        if self.lora is not None:
            tensors = merged(tensors, self.lora)
        expected = meta_weights(self.config)
        refuse_differences(self.path / (EMA if ema else MODEL), tensors, expected)
        return tensors

    @torch.no_grad()
    def restore(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        part: Callable[[Tensor, Tensor], Tensor] = lambda saved, like: saved,
    ) -> None:
        """Put weights and optimizer state back, in place; learning rates stay as they are.

        part: returns the part of a saved tensor that this process holds when it is sharded over
        several (see `fastgpt.training.distributed`). Raises CheckpointError, listing every
        difference, if weights or state have other shapes.
        """
        weights, state = self.model_tensors(), self.optimizer_tensors()
        refuse_differences(self.path / MODEL, weights, model.state_dict())
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        if self.step:  # before the first there is none
            refuse_differences(self.path / OPTIMIZER, state, _expected_state(names, optimizer))
        for p, name in names.items():
            p.copy_(part(weights[name], p))
            if f"{name}.{MOMENTS[0]}" not in state:  # frozen, or not trained yet
                continue
            saved = {moment: part(state[f"{name}.{moment}"], p) for moment in MOMENTS}
            optimizer.state[p] = {moment: _beside(p, moment, t) for moment, t in saved.items()}

    @property
    def lora(self) -> Lora | None:
        """The matrices that are trained beside the weights, if there are any."""
        saved = self.extra.get("lora")
        if saved is None:
            return None
        try:
            return Lora(**saved)
        except TypeError as error:
            raise CheckpointError(f"{self.path / MANIFEST}: lora is {saved!r}: {error}") from None

    def model_tensors(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Return the weights by name, or their average, mapped from the file: read when used."""
        if not ema:
            return _load(self.path / MODEL)
        if not self.has_ema:
            raise CheckpointError(f"{self.path} has no averaged weights: the run kept none")
        average = _load(self.path / EMA)
        if self.lora is None:
            return average
        return _load(self.path / MODEL) | average  # what is frozen is its own average

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state, mapped from the file: `wte.weight.exp_avg`, and so on."""
        return _load(self.path / OPTIMIZER)


def find_checkpoint(
    run: Path,
    which: str = "newest",
    *,
    weights_only: bool = False,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Return the newest, or the ``"best"``, good checkpoint of a run.

    Candidates are checked in order until one is whole. With `weights_only` the optimizer's state,
    two thirds of the bytes, is not checked and must not be used. `report` is called with a line for
    each damaged checkpoint that was passed over; without it they are warnings. Raises
    CheckpointError if none is good: a damaged run never starts afresh in silence.
    """
    problems: list[str] = []
    found = _first_good(run, which, weights_only, problems)
    if found is None:
        what = "; ".join(problems) or _NONE_YET
        raise CheckpointError(f"{run}: no usable checkpoint: {what}")
    for problem in problems:
        line = f"skipped a damaged checkpoint: {problem}"
        if report is not None:
            report(line)
        else:
            warnings.warn(line, stacklevel=2)
    return found


def verify(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Check each file of a checkpoint against its manifest; CheckpointError says what is wrong."""
    checkpoint = open_checkpoint(path)
    for name, expected in checkpoint.files.items():
        if not (weights_only and name == OPTIMIZER):
            _verify_file(path / name, expected)
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest, and nothing else of it.

    For a process that another one has told which checkpoint is good.
    """
    manifest = _read_manifest(path / MANIFEST)
    try:
        known = {field.name for field in fields(GPTConfig)}
        return Checkpoint(
            path,
            int(manifest["step"]),
            None if manifest["val_loss"] is None else float(manifest["val_loss"]),
            GPTConfig(**{k: v for k, v in manifest["config"].items() if k in known}),
            str(manifest["tokenizer_hash"]),
            str(manifest["data_sha256"]),
            manifest["files"],
            dict(manifest.get("extra", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not a manifest: {error!r}") from None


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


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON: the whole file or, on failure, nothing of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(beside)
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


def checkpoints_of(run: Path) -> Path:
    """Return the folder of a run's checkpoints, made or not."""
    return run / "checkpoints"


def rank(val_loss: Any) -> float:
    """Order by loss: what was never evaluated, or not to a number, comes last."""
    number = isinstance(val_loss, int | float) and not math.isnan(val_loss)
    return float(val_loss) if number else math.inf


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk now."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_good(
    run: Path, which: str, weights_only: bool, problems: list[str]
) -> Checkpoint | None:
    """Return the first whole checkpoint, newest or best first; note what is wrong with others."""
    candidates = sorted(checkpoints_of(run).glob("step-*"), reverse=True)
    if which == "best":
        candidates.sort(key=_rank_on_disk)  # of equal ones the newest stays first
    for path in candidates:
        try:
            return verify(path, weights_only=weights_only)
        except CheckpointError as error:
            if path.exists():  # else a run that is still going has deleted it
                problems.append(str(error))
    return None


def _rank_on_disk(path: Path) -> float:
    try:
        return rank(read_json(path / MANIFEST).get("val_loss"))
    except CheckpointError:
        return -math.inf  # unreadable: tried first, and so reported


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    written = manifest.get("format")
    if not isinstance(written, int) or not 1 <= written <= FORMAT:
        if isinstance(written, int) and written > FORMAT:
            raise CheckpointError(f"{path}: written by a newer fastgpt (format {written})")
        raise CheckpointError(f"{path}: not a manifest of format 1 to {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: lists no files")
    for name, expected in files.items():
        if name not in (MODEL, OPTIMIZER, EMA):  # also anything that points out of the folder
            raise CheckpointError(f"{path}: lists {name!r}, which is not ours")
        if not isinstance(expected, dict):
            raise CheckpointError(f"{path}: says nothing about {name}")
    if missing := {MODEL, OPTIMIZER} - set(files):
        raise CheckpointError(f"{path}: does not list {', '.join(sorted(missing))}")
    return manifest


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size != expected.get("size"):
        raise CheckpointError(f"{path} has {size:,} bytes instead of {expected.get('size')}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a bad sector, say
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if digest != expected.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _expected_state(
    names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return what AdamW's state must look like: a count and two moments of each parameter."""
    count = torch.zeros(())
    return {
        f"{names[p]}.{moment}": count if moment == "step" else p
        for group in optimizer.param_groups
        for p in group["params"]
        for moment in MOMENTS
    }


def refuse_differences(
    path: Path, found: Mapping[str, Shaped], expected: Mapping[str, Shaped]
) -> None:
    """Raise CheckpointError, listing every tensor that is missing, too many or of another shape."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not the model's" for name in found if name not in expected]
    differences += [
        f"{name} is {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if differences:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(differences)}")


def _beside(parameter: Tensor, moment: str, saved: Tensor) -> Tensor:
    """Copy a saved tensor to where AdamW wants it: beside its parameter, laid out like it.

    A copy also where nothing moves: what is mapped from a file keeps the deleted file's space.
    """
    if moment == "step":
        return saved.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False).copy_(saved)
