"""fastgpt's own run folders as a source of models, with the interface of other formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.checkpoint.load import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_run_tokenizer,
    read_json,
    resolve_run,
)
from fastgpt.interop.external import LazyTensor
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Run:
    """A run folder and its selected checkpoint."""

    path: Path
    checkpoint: Checkpoint

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model in evaluation mode, with averaged (EMA) weights if the run has them."""
        checkpoint = self.checkpoint
        return checkpoint.load_model(device, ops, ema=checkpoint.has_ema).eval()

    def open_tensors(self) -> Mapping[str, LazyTensor]:
        """Return the same weights, memory-mapped and read on use."""
        tensors = self.checkpoint.merged_tensors(ema=self.checkpoint.has_ema)
        return {name: LazyTensor(t.shape, t.detach) for name, t in tensors.items()}

    @property
    def config(self) -> GPTConfig:
        """The model's configuration."""
        return self.checkpoint.config

    def read_tokenizer(self) -> BaseTokenizer:
        """Return the run's tokenizer."""
        return load_run_tokenizer(self.path, self.checkpoint)


def recognizes(path: Path) -> bool:
    """Return whether a path is a run folder, or an alias of one (``runs/latest``)."""
    if not path.exists():  # if a run is meant, `read` reports that it does not exist
        return path.name == "latest" or path.parts[:1] == ("runs",)
    try:
        return "recipe" in read_json(path / "config.json")
    except CheckpointError:
        return (path / "checkpoints").is_dir()  # a damaged run: `read` reports the error


def read(path: Path, which: str = "best") -> Run:
    """Open a run with its ``"best"`` or its ``"newest"`` checkpoint."""
    path = resolve_run(path)
    return Run(path, find_checkpoint(path, which, weights_only=True))
