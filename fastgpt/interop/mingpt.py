"""Import of minGPT models: `model.pt`, or the same tensors in `model.npz`, with a `config.json`.

Linear layers are `nn.Linear` with biases, GELU is the tanh approximation, and the head is not tied:
https://github.com/karpathy/minGPT, ``mingpt/model.py``. A file contains tensors only (minGPT's
`projects` save ``model.state_dict()``). Their shapes determine all sizes except the number of
heads, which is in the `config.json` that minGPT writes to the same folder.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.checkpoint.load import read_json
from fastgpt.interop import external
from fastgpt.interop.external import PREFIX, ExternalModel, LazyTensor
from fastgpt.interop.pickled import open_tensors
from fastgpt.model import GPTConfig
from fastgpt.utils.errors import UsageError

CONFIG = "config.json"
_FILES = ("model.npz", "model.pt")
_OTHERS = ("model.safetensors", "pytorch_model.bin")  # mark a Hugging Face folder
_HEADS = {
    **{"gpt2": 12, "gpt2-medium": 16, "gpt2-large": 20, "gpt2-xl": 25, "openai-gpt": 12},
    **{"gopher-44m": 16, "gpt-mini": 6, "gpt-micro": 4, "gpt-nano": 3},
}


def recognizes(path: Path) -> bool:
    """Return whether a path is a minGPT model file, or a folder that contains one."""
    if path.is_dir():
        return any((path / name).is_file() for name in _FILES) and not any(
            (path / name).exists() for name in _OTHERS
        )
    return path.suffix in (".npz", ".pt") and path.is_file()


def read(path: Path) -> ExternalModel:
    """Open a minGPT model; UsageError if it is invalid or its number of heads is unknown."""
    file = path
    if path.is_dir():
        file = next(path / name for name in _FILES if (path / name).is_file())
    stored = dict(_open_npz(file)) if file.suffix == ".npz" else open_tensors(file)
    tensors = external.strip_names(stored)
    config = _config(file, tensors)
    return ExternalModel(
        file, config, tensors, partial(external.find_tokenizer, file.parent, config.vocab_size)
    )


def _config(file: Path, tensors: Mapping[str, LazyTensor]) -> GPTConfig:
    """Return the config derived from the tensors; UsageError if `config.json` contradicts it."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UsageError(f"{file} is not a minGPT model: it has no matrix {PREFIX}{name}")
    vocab_size, n_embd = tensors["wte.weight"].shape
    found = {
        "vocab_size": vocab_size,
        "block_size": tensors["wpe.weight"].shape[0],
        "n_layer": external.count_layers(tensors),
        "n_embd": n_embd,
    }
    settings = _settings(file.parent / CONFIG)
    for name, value in found.items():
        if settings.get(name) not in (None, value):
            raise UsageError(
                f"{file} has {name} = {value}, but {CONFIG} next to it says {settings[name]!r:.40}"
            )
    n_head, dropout = _n_head(file, settings), settings.get("resid_pdrop", 0.1)
    return external.make_config(file, **found, n_head=n_head, dropout=dropout, tie_weights=False)


def _settings(path: Path) -> dict[str, Any]:
    """Return the model's settings; minGPT nests them in a dict with other settings."""
    if not path.is_file():
        return {}
    settings = read_json(path)
    inner = settings.get("model")
    return inner if isinstance(inner, dict) else settings


def _n_head(file: Path, settings: Mapping[str, Any]) -> Any:
    """Return the number of heads from `n_head`, or from a known `model_type`."""
    if settings.get("n_head") is not None:
        return settings["n_head"]
    if (kind := settings.get("model_type")) in list(_HEADS):
        return _HEADS[str(kind)]
    raise UsageError(
        f"{file} does not record its number of attention heads: write it to "
        f'{file.parent / CONFIG}: {{"n_head": 6}} (with the value it was trained with)'
    )


def _open_npz(file: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the arrays of a NumPy archive, each of which is read again when it is used.

    Thus only one array is in memory at a time.
    """
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if array.dtype.kind != "f":
                    raise UsageError(f"{file}: {name} has dtype {array.dtype}: it is not a weight")
                yield name, LazyTensor(array.shape, partial(_read_array, file, name))
    except UsageError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise UsageError(f"{file} cannot be read: {error!r:.200}") from None


def _read_array(file: Path, name: str) -> Tensor:
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as archive:
            array = archive[name]
    except Exception as error:  # as above
        raise UsageError(f"{file}: {name} cannot be read: {error!r:.200}") from None
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
