"""A model of another project: opened, its shape known, its tensors still in their files.

Each format has a module with two functions: ``recognises(path)`` tells, by names and first bytes,
whether a path is of that kind, and ``read(path)`` opens it as a `Foreign`. What is built of it here
is the same for all: every difference from what the shape demands is listed, or the whole model is
there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint import refuse_differences
from fastgpt.errors import UsageError
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, in our orientation.

    `read` returns it in memory of its own, in whatever floating-point type it has there; it may be
    the transpose of what was read.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def transposed(self) -> "LazyTensor":
        """Return a matrix the other way round: for those that hold `[in, out]`."""
        return LazyTensor(self.shape[::-1], lambda: self.read().T)


@dataclass(frozen=True)
class Foreign:
    """Another project's model. `tensors` are by our names; `read_tokenizer` raises UsageError
    where nobody knows what the ids stand for.
    """

    path: Path
    config: GPTConfig
    tensors: Mapping[str, LazyTensor]
    read_tokenizer: Callable[[], BaseTokenizer]

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model in fp32, for evaluation; UsageError lists what does not fit."""
        _refuse_sizes(self.path, self.config, self.tensors)
        with torch.device("meta"):
            model = GPT(self.config, ops)
        refuse_differences(self.path, self.tensors, model.state_dict())
        # One at a time: beside the weights there is never more than one tensor's original.
        weights = {name: _as_ours(tensor, device) for name, tensor in self.tensors.items()}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(True).eval()


def make_config(path: Path, **settings: Any) -> GPTConfig:
    """Return the shape that a file states; UsageError names what is missing or cannot be."""
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        if type(value := settings.get(name)) is not int:
            raise UsageError(f"{path}: {name} must be a whole number, not {value!r:.40}")
    try:
        return GPTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def count_layers(names: Iterable[str]) -> int:
    """Return how many layers the tensors of these names (ours: `h.0.ln_1.weight`) are of."""
    return len({name.split(".")[1] for name in names if name.startswith("h.")})


def tokenizer_beside(folder: Path, vocab_size: int) -> BaseTokenizer:
    """Return the tokenizer whose files are in `folder`; without any, GPT-2's if the size is its."""
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        gpt2 = Tokenizer.gpt2()
        if vocab_size == gpt2.vocab_size:
            return gpt2
        raise UsageError(
            f"{folder} does not say what its {vocab_size:,} token ids stand for: put the "
            f"tokenizer's files (tokenizer.json, or vocab.bpe and encoder.json) into it"
        ) from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _refuse_sizes(path: Path, config: GPTConfig, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise if tensors contradict the sizes of the model, before one of absurd size is made."""
    stated = {
        "wte.weight": (config.vocab_size, config.n_embd),
        "wpe.weight": (config.block_size, config.n_embd),
    }
    for name, shape in stated.items():
        if name in tensors and tensors[name].shape != shape:
            raise UsageError(
                f"{path} does not fit the model: {name} is {list(tensors[name].shape)} instead of "
                f"{list(shape)}"
            )
    if (layers := count_layers(tensors)) != config.n_layer:
        raise UsageError(
            f"{path} does not fit the model: it has tensors of {layers} layers instead of "
            f"{config.n_layer:,}"
        )


def _as_ours(tensor: LazyTensor, device: torch.device | str) -> Tensor:
    """Read a tensor as a parameter has it: fp32, its elements in order."""
    return tensor.read().to(device, torch.float32).contiguous()
