"""Find, verify and load the checkpoints of a run.

A run folder is self-contained:

    config.json       recipe, command and versions
    tokenizer.json    tokenizer of the model
    metrics.jsonl     one line per logged step and per evaluation
    summary.json      best checkpoint, steps and time of a finished run
    checkpoints/step-00000250/
        model.safetensors  optimizer.safetensors  manifest.json
        ema.safetensors    averaged weights, if the run keeps them

The manifest of a checkpoint contains the size and SHA-256 of each file, and its own SHA-256, so
that damage is detected. No pickles are used. Checkpoints are written by `fastgpt.checkpoint.save`.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgpt.checkpoint.tensor_file import utf8_path
from fastgpt.lora import Lora, merge_lora
from fastgpt.model import GPT, GPTConfig, meta_model, meta_weights
from fastgpt.tokenizer import BaseTokenizer, load_tokenizer
from fastgpt.utils import checks
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import sha256

FORMAT = 2  # format 1 has no `extra` and no ema.safetensors; it can still be read
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
MANIFEST = "manifest.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state per parameter
_NONE_YET = "it has none yet (if it is not training now: delete the folder, and train again)"


class HasShape(Protocol):
    """Anything with a shape: a tensor, or a tensor in a file that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""


class CheckpointError(UsageError):
    """Raised for a checkpoint that is missing, damaged or of another format; names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, with the contents of its manifest."""

    path: Path
    step: int
    val_loss: float | None  # None if it was saved without an evaluation
    config: GPTConfig
    tokenizer_hash: str
    data_sha256: str
    files: dict[str, dict[str, Any]]  # size and SHA-256 by file name
    extra: dict[str, Any] = field(default_factory=dict)  # further state of the run

    @property
    def has_ema(self) -> bool:
        """Whether the checkpoint contains averaged weights."""
        return EMA in self.files

    def load_model(
        self, device: torch.device | str = "cpu", ops: str = "auto", *, ema: bool = False
    ) -> GPT:
        """Return the model of this checkpoint.

        Args:
            device: device of the weights.
            ops: implementation of the operators; see `GPT`.
            ema: load the averaged weights.

        LoRA matrices are merged into the weights, so that the result is a plain GPT.

        Raises: CheckpointError if a file cannot be read, or the weights do not fit the model.
        """
        on_device = {name: t.to(device) for name, t in self.merged_tensors(ema=ema).items()}
        model = meta_model(self.config, ops)
        model.load_state_dict(on_device, assign=True)
        return model.requires_grad_(True)

    def merged_tensors(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Return the weights by name, with LoRA matrices merged into them.

        Raises: CheckpointError that lists all tensors that do not fit the model.
        """
        tensors, path = self.model_tensors(ema=ema), self.path / (EMA if ema else MODEL)
        if self.lora is not None:
            try:
                tensors = merge_lora(tensors, self.lora)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from None
        check_fits(path, tensors, self.config)
        return tensors

    @torch.no_grad()
    def restore(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        part: Callable[[Tensor, Tensor], Tensor] = lambda saved, like: saved,
    ) -> None:
        """Load weights and optimizer state in place. Learning rates are not changed.

        Args:
            model: the model to load into.
            optimizer: its AdamW optimizer.
            part: called with a saved tensor and the parameter; returns the shard of the tensor that
                belongs to this process (see `fastgpt.training.distributed`).

        Raises: CheckpointError that lists all differences, if the names or shapes of weights or
            optimizer state differ. In this case nothing is changed.
        """
        weights, state = self.model_tensors(), self.optimizer_tensors()
        check_matching(self.path / MODEL, weights, model.state_dict())
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        if self.step:  # there is no optimizer state before the first step
            check_matching(self.path / OPTIMIZER, state, _expected_state(names, optimizer))
        for p, name in names.items():
            p.copy_(part(weights[name], p))
            if f"{name}.{MOMENTS[0]}" not in state:  # the parameter is frozen or not trained yet
                continue
            saved = {moment: part(state[f"{name}.{moment}"], p) for moment in MOMENTS}
            optimizer.state[p] = {moment: _copy_for(p, moment, t) for moment, t in saved.items()}

    @property
    def lora(self) -> Lora | None:
        """The LoRA settings, or None if the run does not use LoRA."""
        saved = self.extra.get("lora")
        if saved is None:
            return None
        try:
            return Lora(**checks.mapping("lora", saved))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path / MANIFEST}: lora is {saved!r}: {error}") from None

    def model_tensors(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Return the weights, or the averaged weights, by name.

        The tensors are memory mapped, so they are read from disk when used.
        """
        if not ema:
            return _load(self.path / MODEL)
        if not self.has_ema:
            raise CheckpointError(f"{self.path} has no averaged weights: the run did not keep them")
        average = _load(self.path / EMA)
        if self.lora is None:
            return average
        return _load(self.path / MODEL) | average  # frozen weights equal their average

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer state, memory mapped, by names such as `wte.weight.exp_avg`."""
        return _load(self.path / OPTIMIZER)


def find_checkpoint(
    run: Path,
    which: str = "newest",
    *,
    weights_only: bool = False,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Return the newest or the best undamaged checkpoint of a run.

    Args:
        run: the run folder.
        which: ``"newest"``, or ``"best"`` for the lowest validation loss.
        weights_only: do not verify the optimizer state, which is two thirds of the bytes; it must
            not be used then.
        report: called with a message for each damaged checkpoint that is skipped. By default these
            messages are warnings.

    Candidates are verified in order until an undamaged one is found.

    Raises: CheckpointError if there is none, so that a damaged run is never silently restarted.
    """
    candidates = sorted(checkpoints_of(run).glob("step-*"), reverse=True)
    if which == "best":
        candidates.sort(key=_rank_on_disk)  # the sort is stable: of equal ones, the newest first
    problems = []
    for path in candidates:
        try:
            found = verify(path, weights_only=weights_only)
        except CheckpointError as error:
            if path.exists():  # otherwise, a process that is still training has deleted it
                problems.append(str(error))
            continue
        report = report or partial(warnings.warn, stacklevel=2)
        for problem in problems:
            report(f"skipped a damaged checkpoint: {problem}")
        return found
    raise CheckpointError(f"{run}: no usable checkpoint: {'; '.join(problems) or _NONE_YET}")


def verify(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Verify the size and SHA-256 of each file of a checkpoint; CheckpointError names damage.

    weights_only: do not verify the optimizer state.
    """
    checkpoint = open_checkpoint(path)
    for name, expected in checkpoint.files.items():
        if not (weights_only and name == OPTIMIZER):
            _verify_file(path / name, expected)
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Read only the manifest of a checkpoint, without verifying its files."""
    manifest = _read_manifest(path / MANIFEST)
    val_loss = manifest.get("val_loss")
    try:
        config = checks.mapping("config", manifest.get("config"))
        settings: dict[str, Any] = {
            field.name: config.get(field.name) for field in fields(GPTConfig)
        }
        checkpoint = Checkpoint(
            path,
            checks.integer("step", manifest.get("step"), least=0, most=2**63 - 1),
            None if val_loss is None else checks.number("val_loss", val_loss),
            GPTConfig(**settings),
            checks.text("tokenizer_hash", manifest.get("tokenizer_hash")),
            checks.text("data_sha256", manifest.get("data_sha256")),
            manifest["files"],
            checks.mapping("extra", manifest.get("extra", {})),
        )
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST}: not a manifest: {error}") from None
    if manifest.get("sha256", found := digest(manifest)) != found:  # older ones have none
        raise CheckpointError(f"{path / MANIFEST} is damaged: its SHA-256 differs")
    return checkpoint


def digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of the values in a manifest except its own `sha256`."""
    values = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def resolve_run(run: Path) -> Path:
    """Return the folder of a run; the name ``latest`` stands for the newest run in its parent.

    ``latest`` is a link to it, if it was made by fastgpt.train in a folder called ``runs``. Where
    there is no link, the newest run is found by the time at which it was started or resumed.

    Raises: UsageError if it is not a run folder, or there are no runs.
    """
    if run.name == "latest" and not run.exists():
        runs = [config.parent for config in run.parent.glob("*/config.json")]
        if not runs:
            raise UsageError(
                f"{run}: no runs in {run.parent}/ yet; train one: python -m fastgpt.train"
            )
        return max(runs, key=lambda folder: (folder / "config.json").stat().st_mtime)
    if run.name == "latest" and run.is_symlink():
        run = run.parent / run.readlink()  # it can point to another run later
    if not (run / "config.json").is_file():
        what = "is not a run folder (it has no config.json)" if run.exists() else "does not exist"
        raise UsageError(f"{run} {what}; pass a folder made by fastgpt.train, e.g. runs/latest")
    return run


def load_run_tokenizer(run: Path, checkpoint: Checkpoint) -> BaseTokenizer:
    """Return the tokenizer of a run.

    Raises: CheckpointError if it cannot be read, or the checkpoint was trained with another one.
    """
    try:
        tokenizer = load_tokenizer(run / "tokenizer.json")
    except (OSError, ValueError) as error:  # both name the file
        raise CheckpointError(str(error)) from None
    if tokenizer.fingerprint != checkpoint.tokenizer_hash:
        raise CheckpointError(
            f"{run / 'tokenizer.json'} is not what {checkpoint.path.name} was trained with: "
            f"its hash is {tokenizer.fingerprint[:16]}, not {checkpoint.tokenizer_hash[:16]}"
        )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError if the file is missing or contains anything else."""
    try:
        return checks.json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def checkpoints_of(run: Path) -> Path:
    """Return the checkpoints folder of a run, which need not exist."""
    return run / "checkpoints"


def rank(path: Path) -> float:
    """Return the sort key of a checkpoint: its validation loss, or infinity for None and NaN.

    Raises: CheckpointError if the manifest cannot be read.
    """
    try:
        val_loss = checks.number("val_loss", read_json(path / MANIFEST).get("val_loss"))
    except ValueError:
        return math.inf
    return math.inf if math.isnan(val_loss) else val_loss


def _rank_on_disk(path: Path) -> float:
    try:
        return rank(path)
    except CheckpointError:
        return -math.inf  # it may have been the best: try it first, so that the damage is reported


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    version, files = manifest.get("format"), manifest.get("files")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: not a manifest of format 1 to {FORMAT}")
    if version > FORMAT:
        raise CheckpointError(f"{path}: written by a newer fastgpt (format {version})")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: lists no files")
    for name, expected in files.items():
        if name not in (MODEL, OPTIMIZER, EMA):  # includes paths outside of the folder
            raise CheckpointError(f"{path}: lists an unknown file {name!r}")
        if not isinstance(expected, dict):
            raise CheckpointError(f"{path}: has no size and SHA-256 of {name}")
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
        digest = sha256(path)
    except OSError as error:  # for example, a bad sector
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if digest != expected.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_path(path) as name:
            return load_file(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _expected_state(
    names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return tensors with the expected shapes of AdamW's state: a step count and two moments."""
    count = torch.zeros(())
    return {
        f"{names[p]}.{moment}": count if moment == "step" else p
        for group in optimizer.param_groups
        for p in group["params"]
        for moment in MOMENTS
    }


def check_fits(path: Path, found: Mapping[str, HasShape], config: GPTConfig) -> None:
    """Raise CheckpointError unless the tensors in a file are exactly those of a model."""
    if config.n_layer > len(found):  # each layer has several; do not list those of a billion layers
        raise CheckpointError(
            f"{path} does not fit the model: {len(found)} tensors are too few for "
            f"{config.n_layer:,} layers"
        )
    check_matching(path, found, meta_weights(config))


def check_matching(
    path: Path, found: Mapping[str, HasShape], expected: Mapping[str, HasShape]
) -> None:
    """Raise CheckpointError that lists all tensors that are missing, unexpected or misshapen."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not in the model" for name in found if name not in expected]
    differences += [
        f"{name} is {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if differences:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(differences)}")


def _copy_for(parameter: Tensor, moment: str, saved: Tensor) -> Tensor:
    """Copy a saved tensor to the device of its parameter, with the memory layout AdamW expects.

    The moments have the strides of the parameter. A copy is always made: a memory-mapped tensor
    would keep the disk space of a deleted checkpoint in use.
    """
    if moment == "step":
        return saved.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False).copy_(saved)
