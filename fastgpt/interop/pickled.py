"""Files of `torch.save`: tensors and plain values out of them, and no code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.interop.foreign import LazyTensor
from fastgpt.utils.errors import UsageError


def unpickle(path: Path) -> Any:
    """Return what a file of `torch.save` holds, its tensors mapped from it where that is possible.

    Only tensors and plain values are taken (`weights_only`): a pickle that would run anything else
    is refused with a UsageError.
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
            f"{path} holds more than tensors and plain values, and is not loaded, because a pickle "
            f"can run any code: {reason}; save its weights as safetensors where they came from"
        ) from None
    except Exception as error:  # what a damaged file raises may be anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(f"{path} cannot be read: {reason}") from None


def named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return `content`, if it maps names to weights, else a UsageError that names `path`."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{path} does not map names to tensors, as a `state_dict` does")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise UsageError(f"{path}: {name} is no plain tensor")
    return content


def mentions(path: Path, word: str) -> bool:
    """Tell whether a word is among the texts of a file of `torch.save`, which is not loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(word.encode() in archive.read(name) for name in names)
    except Exception:  # no zip archive, or a damaged one
        return False


def lazy(tensor: Tensor) -> LazyTensor:
    """Return a tensor of such a file as one that is copied when it is asked for.

    Copied, because the file may be overwritten while the model lives; and in order, which in the
    file it need not be.
    """
    in_order = torch.contiguous_format
    return LazyTensor(tuple(tensor.shape), lambda: tensor.detach().clone(memory_format=in_order))
