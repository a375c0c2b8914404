"""Memory for training on a CPU: as little as is in use, and none that the system must give twice.

Each step allocates activations and gradients and frees them again. The system's allocator either
hands them back, and the system then gives them again page by page, zeroed, or keeps them in pieces
that no longer fit together. Large tensors therefore come from a pool (csrc/common/host_pool.hpp).
"""

import ctypes
import platform
from math import prod

import torch
from torch import Tensor

from fastgpt.utils.extension import _C

SMALLEST = 2**15  # numbers; smaller ones are quick to allocate, and fit anywhere


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor on the CPU, not initialised, to be freed before long; fp32 or bf16."""
    bf16 = dtype == torch.bfloat16
    array = _C.pool_array(shape, bf16) if prod(shape) >= SMALLEST else None
    if array is None:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if bf16 else tensor


def empty_like(tensor: Tensor) -> Tensor:
    """Return such a tensor of the shape and the dtype of another."""
    return empty(*tensor.shape, dtype=tensor.dtype)


def give_back() -> None:
    """Return to the system what the pool holds and nobody uses.

    For after work of another kind than the next: a step gets what the last one had.
    """
    _C.trim_pool()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of handing it back to the system.

    For what PyTorch itself allocates in a step: without this, that is 10 to 20% of a small model's.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
