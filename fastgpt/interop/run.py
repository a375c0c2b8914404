"""A run folder of our own, as a source of a model like any other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.checkpoint.load import Checkpoint, find_checkpoint, load_run_tokenizer, resolve_run
from fastgpt.interop.foreign import LazyTensor
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Run:
    """A run folder and the checkpoint of it to take."""

    path: Path
    checkpoint: Checkpoint

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model, with the averaged weights if the run keeps them."""
        checkpoint = self.checkpoint
        return checkpoint.load_model(device, ops, ema=checkpoint.has_ema).eval()

    def open_tensors(self) -> Mapping[str, LazyTensor]:
        """Return the same weights, mapped from their file: read when used."""
        tensors = self.checkpoint.merged_tensors(ema=self.checkpoint.has_ema)
        return {name: LazyTensor(t.shape, t.detach) for name, t in tensors.items()}

    @property
    def config(self) -> GPTConfig:
        """The model's shape."""
        return self.checkpoint.config

    def read_tokenizer(self) -> BaseTokenizer:
        """Return the run's tokenizer."""
        return load_run_tokenizer(self.path, self.checkpoint)


def recognises(path: Path) -> bool:
    """Tell whether a path is a run folder, or stands for one (``runs/latest``)."""
    if not path.exists():  # `read` says so of what is meant to be a run
        return path.name == "latest" or path.parts[:1] == ("runs",)
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return (path / "checkpoints").is_dir()  # a damaged run: `read` says what is wrong with it
    return isinstance(config, dict) and "recipe" in config


def read(path: Path, which: str = "best") -> Run:
    """Open a run at its ``"best"`` checkpoint, or the ``"newest"``."""
    path = resolve_run(path)
    return Run(path, find_checkpoint(path, which, weights_only=True))
