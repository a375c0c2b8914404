"""The training state of a model, for the tests of checkpoints."""

from typing import Any

import torch

from fastgpt import GPT
from fastgpt.checkpoint.save import TrainingState


def state_of(
    model: GPT, optimizer: torch.optim.Optimizer, step: int, val_loss: float | None, **more: Any
) -> TrainingState:
    """Return the state of a model and its optimizer, with the hashes "t" and "d" by default."""
    moments = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    hashes = {"tokenizer_hash": "t", "data_sha256": "d"}
    return TrainingState(step, model.state_dict(), moments, val_loss, model.config, **hashes | more)
