"""Models of other projects: opened, with a known configuration and lazily read tensors.

Each format has a module with two functions: ``recognizes(path)`` returns whether a path has that
format, judging by file names and first bytes, and ``read(path)`` opens it as an `ExternalModel`.
Building a model from that is common to all formats: either the whole model is loaded, or an error
lists every difference from the tensors that the configuration requires.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgpt.checkpoint.load import check_fits
from fastgpt.model import GPT, GPTConfig, meta_model, meta_weights
from fastgpt.tokenizer import BaseTokenizer, Tokenizer, load_tokenizer
from fastgpt.utils.errors import UsageError

PREFIX = "transformer."  # of the names in most formats
T = TypeVar("T")


class NoTokenizerError(UsageError):
    """Raised if the tokenizer of a model is unknown; the message says what to do."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, in fastgpt's orientation.

    `read` returns the tensor in its own memory and in the floating-point dtype of the file. The
    result may be a transposed view of what was read.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    transposed: bool = False  # `read` returns a transposed view, which is not contiguous

    def transpose(self) -> "LazyTensor":
        """Return the transposed matrix, for formats that store `[in, out]`."""
        return LazyTensor(self.shape[::-1], lambda: self.read().T, not self.transposed)

    def first_rows(self, size: int) -> "LazyTensor":
        """Return the matrix truncated to its first `size` rows."""
        return LazyTensor((size, *self.shape[1:]), lambda: self.read()[:size], self.transposed)


@dataclass(frozen=True)
class ExternalModel:
    """A model of another project.

    tensors: the weights by fastgpt's names. read_tokenizer: returns the tokenizer, or raises
    NoTokenizerError if it is unknown.
    """

    path: Path
    config: GPTConfig
    tensors: Mapping[str, LazyTensor]
    read_tokenizer: Callable[[], BaseTokenizer]

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model in fp32 and evaluation mode; UsageError lists tensors that differ."""
        weights = _read_all(self.open_tensors(), torch.device(device))
        model = meta_model(self.config, ops)
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(True).eval()

    def open_tensors(self) -> Mapping[str, LazyTensor]:
        """Return the lazily read tensors; UsageError lists those that do not fit the model."""
        check_fits(self.path, self.tensors, self.config)
        return self.tensors


def make_config(path: Path, names: Mapping[str, str] = {}, /, **settings: Any) -> GPTConfig:
    """Return the configuration in a file; UsageError for missing or invalid settings.

    names: names of settings in the file, by fastgpt's, for the messages.
    """
    try:
        return GPTConfig(**settings)
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        raise UsageError(f"{path}: {names.get(name, name)} {problem}") from None


def strip_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of a file by fastgpt's names, without "transformer.".

    Constant attention masks, which some versions of the projects save as buffers, are left out.
    """
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def zero_biases(config: GPTConfig) -> dict[str, Tensor]:
    """Return zeros for the biases that a model lacks, for formats that require them."""
    names = {} if config.bias else meta_weights(replace(config, bias=True))
    return {name: torch.zeros(b.shape) for name, b in names.items() if name.endswith("bias")}


def starts_with(path: Path, prefixes: tuple[bytes, ...]) -> bool:
    """Return whether a path is a file whose first bytes are one of `prefixes`."""
    try:
        with path.open("rb") as file:
            return file.read(max(map(len, prefixes))).startswith(prefixes)
    except OSError:
        return False


def count_layers(names: Iterable[str]) -> int:
    """Return the number of layers in fastgpt's tensor names (such as `h.0.ln_1.weight`)."""
    return len({name.split(".")[1] for name in names if name.startswith("h.")})


def find_tokenizer(folder: Path, vocab_size: int) -> BaseTokenizer:
    """Return the tokenizer in `folder`; without one, GPT-2's if `vocab_size` matches it.

    Added tokens without a row in the model are left out: a padding token, for example, is often
    added without resizing the model, which is then never given its id.

    Raises: NoTokenizerError if neither applies.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        gpt2 = Tokenizer.gpt2()
        if vocab_size == gpt2.vocab_size:
            return gpt2
        raise NoTokenizerError(
            f"{folder} has no tokenizer for its {vocab_size:,} token ids: put the tokenizer's "
            f"files (tokenizer.json, or vocab.bpe and encoder.json) into it"
        ) from None
    except ValueError as error:
        raise NoTokenizerError(str(error)) from None
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.crop(vocab_size)
    return tokenizer


def _read_all(tensors: Mapping[str, LazyTensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors as fp32 and contiguous, as parameters must be.

    Tensors are read one at a time. Transposed ones must be copied; they come last, and their
    destinations are allocated beforehand. Each temporary can then reuse the memory of the previous
    one, since no allocation happens in between.
    """
    transposed = {name: tensor for name, tensor in tensors.items() if tensor.transposed}
    weights = {
        name: tensor.read().to(device, torch.float32)
        for name, tensor in tensors.items()
        if name not in transposed
    }
    for name, tensor in transposed.items():
        weights[name] = torch.empty(tensor.shape, device=device)
    for name, tensor in transposed.items():
        weights[name].copy_(tensor.read())
    return weights
