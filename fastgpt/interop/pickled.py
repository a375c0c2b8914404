"""Safe reading of `torch.save` files: tensors and plain values only, no code."""

import pickle
import re
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
        names = _unsafe_names(path, str(error))
        raise UsageError(
            f"{path} contains more than tensors and plain values ({', '.join(map(repr, names))}) "
            "and is not loaded, because such a pickle can execute any code; if you trust it, "
            f"{_how_to_save_again(path, names)}"
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


def _unsafe_names(path: Path, message: str) -> list[str]:
    """Return the classes and functions in a pickle that are not loaded, as `module.name`.

    message: torch's error for the file, which names the first of them. The function for all of them
    does not read the format before torch 1.6.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # a damaged file may raise anything
        return re.findall(r"GLOBAL (\S+)", message)[:1] or ["objects"]


def _how_to_save_again(path: Path, names: list[str]) -> str:
    """Return what to do with a trusted file.

    A file whose only classes are a training script's own is that of build-nanogpt or alike, which
    saves the weights with its configuration, a dataclass. An empty class of the same name is enough
    to load that.
    """
    classes = [name.removeprefix("__main__.") for name in names]
    if not all(f"__main__.{name}" in names and name.isidentifier() for name in classes):
        return "save its `state_dict()` as safetensors with the code that made it"
    empty = "".join(f"{name} = type('{name}', (), {{}}); " for name in classes)
    return (
        f"save it again in nanoGPT's form, with its own configuration: python -c \"import torch; "
        f"{empty}c = torch.load({str(path)!r}, weights_only=False); torch.save({{'model': "
        "c['model'], 'model_args': vars(c['config'])}, 'ckpt.pt')\""
    )


def lazy(tensor: Tensor) -> LazyTensor:
    """Return a lazy tensor that copies a mapped tensor when it is read.

    The copy is needed because the file may be overwritten during the lifetime of the model, and
    because tensors in the file need not be contiguous.
    """
    in_order = torch.contiguous_format
    return LazyTensor(tuple(tensor.shape), lambda: tensor.detach().clone(memory_format=in_order))
