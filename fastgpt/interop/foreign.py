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

from fastgpt.checkpoint.load import refuse_differences
from fastgpt.model import GPT, GPTConfig, meta_model, meta_weights
from fastgpt.tokenizer import BaseTokenizer, Tokenizer, load_tokenizer
from fastgpt.utils.errors import UsageError


class NoTokenizerError(UsageError):
    """Nobody knows what the ids of a model stand for; the message says what to do."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, in our orientation.

    `read` returns it in memory of its own, in whatever floating-point type it has there; it may be
    the transpose of what was read.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    turned: bool = False  # what is read must be copied to lie in order

    def transposed(self) -> "LazyTensor":
        """Return a matrix the other way round: for those that hold `[in, out]`."""
        return LazyTensor(self.shape[::-1], lambda: self.read().T, not self.turned)

    def first_rows(self, size: int) -> "LazyTensor":
        """Return a matrix without its rows from `size` on."""
        return LazyTensor((size, *self.shape[1:]), lambda: self.read()[:size], self.turned)


@dataclass(frozen=True)
class Foreign:
    """Another project's model. `tensors` are by our names; `read_tokenizer` raises
    NoTokenizerError where nobody knows what the ids stand for.
    """

    path: Path
    config: GPTConfig
    tensors: Mapping[str, LazyTensor]
    read_tokenizer: Callable[[], BaseTokenizer]

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model in fp32, for evaluation; UsageError lists what does not fit."""
        weights = _read_all(self.open_tensors(), torch.device(device))
        model = meta_model(self.config, ops)
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(True).eval()

    def open_tensors(self) -> Mapping[str, LazyTensor]:
        """Return the tensors, still in their files; UsageError lists what does not fit."""
        _refuse_sizes(self.path, self.config, self.tensors)
        refuse_differences(self.path, self.tensors, meta_weights(self.config))
        return self.tensors


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
        raise NoTokenizerError(
            f"{folder} does not say what its {vocab_size:,} token ids stand for: put the "
            f"tokenizer's files (tokenizer.json, or vocab.bpe and encoder.json) into it"
        ) from None
    except ValueError as error:
        raise NoTokenizerError(str(error)) from None


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
    if config.n_layer > len(tensors):  # each layer has several
        raise UsageError(
            f"{path} does not fit the model: {len(tensors)} tensors are too few for "
            f"{config.n_layer:,} layers"
        )


def _read_all(tensors: Mapping[str, LazyTensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors as parameters are: fp32, their elements in order.

    One is read at a time. Those that must be copied come last, to memory that is there already:
    then what was read can go where the one before it was, and nothing else is in the way.
    """
    as_read = {name: tensor for name, tensor in tensors.items() if not tensor.turned}
    turned = {name: tensor for name, tensor in tensors.items() if tensor.turned}
    weights = {name: tensor.read().to(device, torch.float32) for name, tensor in as_read.items()}
    weights |= {name: torch.empty(tensor.shape, device=device) for name, tensor in turned.items()}
    for name, tensor in turned.items():
        weights[name].copy_(tensor.read())
    return weights
