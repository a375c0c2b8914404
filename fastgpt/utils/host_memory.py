"""Allocate memory for training on a CPU from a pool.

Each step allocates and frees activations and gradients. The system's allocator either returns freed
memory to the system, so that it must be mapped and zeroed page by page again, or keeps it and
becomes fragmented. Large tensors are therefore allocated from a pool (csrc/common/host_pool.hpp).
"""

import ctypes
import platform
from math import prod

import torch
from torch import Tensor

from fastgpt.utils.extension import _C

SMALLEST = 2**15  # elements; smaller tensors are fast to allocate and do not cause fragmentation


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialized CPU tensor from the pool.

    Use it for short-lived tensors, such as activations. Small tensors, and those for which the pool
    has no memory, are allocated by PyTorch.

    Args:
        shape: size of each dimension.
        dtype: `torch.float32` or `torch.bfloat16`.
    """
    bf16 = dtype == torch.bfloat16
    array = _C.pool_array(shape, bf16) if prod(shape) >= SMALLEST else None
    if array is None:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if bf16 else tensor


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized tensor from the pool with the shape and dtype of another."""
    return empty(*tensor.shape, dtype=tensor.dtype)


def trim_pool() -> None:
    """Return the pool's unused memory to the system.

    Call it when the workload changes. Consecutive training steps reuse the memory instead.
    """
    _C.trim_pool()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    This is for memory that PyTorch itself allocates: without it, returning and mapping this memory
    takes 10 to 20% of the step time of a small model.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
