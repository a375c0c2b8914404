"""Files of `torch.save`: tensors and plain values out of them, and no code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.errors import UsageError
from fastgpt.interop.foreign import LazyTensor


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
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def lazy(tensor: Tensor) -> LazyTensor:
    """Return a tensor of such a file as one that is copied when it is asked for.

    Copied, because the file may be overwritten while the model lives.
    """
    return LazyTensor(tuple(tensor.shape), lambda: tensor.detach().clone())
