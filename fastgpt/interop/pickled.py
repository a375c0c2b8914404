"""Safe reading of `torch.save` files: tensors and plain values only, no code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.interop.external import LazyTensor
from fastgpt.utils.errors import UsageError


def unpickle(path: Path) -> Any:
    """Load a file of `torch.save`, with tensors memory-mapped if possible.

    Only tensors and plain values are loaded (`weights_only`).

    Raises: UsageError for a damaged file, or a pickle that would execute anything else.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # the format before torch 1.6, which cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{path} contains more than tensors and plain values and is not loaded, because a "
            f"pickle can execute any code: {reason}; save the weights as safetensors at their "
            "origin"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(f"{path} cannot be read: {reason}") from None


def named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return `content` if it maps names to tensors; otherwise raise UsageError for `path`."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{path} does not map names to tensors, as a `state_dict` does")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise UsageError(f"{path}: {name} is not a plain tensor")
    return content


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a `torch.save` file that maps names to tensors."""
    return {name: lazy(tensor) for name, tensor in named_tensors(path, unpickle(path)).items()}


def pickle_contains(path: Path, word: str) -> bool:
    """Return whether a word occurs in the pickle of a `torch.save` file, without loading it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(word.encode() in archive.read(name) for name in names)
    except Exception:  # not a zip archive, or a damaged one
        return False


def lazy(tensor: Tensor) -> LazyTensor:
    """Return a lazy tensor that copies a mapped tensor when it is read.

    The copy is needed because the file may be overwritten during the lifetime of the model, and
    because tensors in the file need not be contiguous.
    """
    in_order = torch.contiguous_format
    return LazyTensor(tuple(tensor.shape), lambda: tensor.detach().clone(memory_format=in_order))
