"""A safetensors file as it will be on disk, in host memory that is kept and filled again.

The library's own `save_file` writes what it is given then and there. A save that goes on while
training does needs a copy first; laid out as the file, that copy is hashed and written in one pass.
The format: https://huggingface.co/docs/safetensors, "Format".
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 4 << 20  # bytes hashed and then written: from the processor's cache the second time
ALIGNMENT = 64  # of the first tensor, a cache line; the format asks for 8

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


class TensorFile:
    """The bytes of a safetensors file with the names, dtypes and shapes of `tensors`.

    The first `copy` is slow, as the system hands out the memory page by page; later ones run at the
    speed of memory. On CUDA the memory is pinned.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._layout = _layout(tensors)
        header, ends = _header(self._layout)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        memory = _host_memory(len(header) + max(ends, default=0), pinned)
        self._bytes = memory.numpy().data
        self._bytes[: len(header)] = header
        self._tensors = {
            name: memory[len(header) + end - size : len(header) + end].view(dtype).view(shape)
            for (name, dtype, shape), end in zip(self._layout, ends, strict=True)
            for size in [_size(dtype, shape)]
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` can be copied here: they have the same names, dtypes and shapes."""
        return self._layout == _layout(tensors)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of `tensors`; from CUDA they come in the order of the current stream."""
        for name, here in self._tensors.items():
            here.copy_(tensors[name], non_blocking=tensors[name].is_cuda)

    def write(self, path: Path, on_piece: Callable[[], None]) -> dict[str, Any]:
        """Write the new file `path` and have it on the disk; return its size and SHA-256.

        The hash is of the memory, not of what is read back: that would come out of the same memory,
        the system's cache, and pass whatever went wrong on the way there. Hashing and writing leave
        Python's lock to others. `on_piece` is called now and then, and may raise.
        """
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for begin in range(0, len(self._bytes), PIECE):
                on_piece()
                piece = self._bytes[begin : begin + PIECE]
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return {"size": len(self._bytes), "sha256": digest.hexdigest()}


_Layout = list[tuple[str, torch.dtype, torch.Size]]


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    """Return the order in the file: wide types first, so that each begins on a multiple of it."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    return [(name, tensors[name].dtype, tensors[name].shape) for name in order]


def _header(layout: _Layout) -> tuple[bytes, list[int]]:
    """Return the file's beginning, and where each tensor ends, counted from there."""
    entries: dict[str, Any] = {}
    ends, end = [], 0
    for name, dtype, shape in layout:
        begin, end = end, end + _size(dtype, shape)
        ends.append(end)
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, ends


def _size(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * math.prod(shape)


def _host_memory(size: int, pinned: bool) -> Tensor:
    """Return `size` bytes, uint8.

    In huge pages where the system has them: the first copy of 1.5 GB then takes a quarter of the
    time.
    """
    if pinned or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
