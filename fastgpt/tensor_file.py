"""Writing safetensors files, hashed on the way, and copies of tensors to write them from.

The library's own `save_file` would need a second pass over the data for the hash. The format:
https://huggingface.co/docs/safetensors, "Format".
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], on_piece: Callable[[], None]
) -> dict[str, Any]:
    """Write tensors in host memory as the new file `path`, to the disk; return size and SHA-256.

    The hash is of the memory, not of what is read back: that would come out of the same memory,
    the system's cache, and pass whatever went wrong on the way there. Hashing and writing leave
    Python's lock to others. `on_piece` is called now and then, and may raise.
    """
    layout = _layout(tensors)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        parts = (memoryview(_header(layout)), *(_bytes_of(tensors[n]) for n, _, _ in layout))
        for part in parts:
            for begin in range(0, len(part), PIECE):
                on_piece()
                piece = part[begin : begin + PIECE]
                digest.update(piece)
                file.write(piece)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


class HostCopy:
    """A copy, in host memory that is kept and filled again, of tensors like the ones given.

    The first `copy` is slow, as the system hands out the memory page by page; later ones run at the
    speed of memory. On CUDA the memory is pinned.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._layout = _layout(tensors)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        sizes = [_size(dtype, shape) for _, dtype, shape in self._layout]
        pieces = _host_memory(max(1, sum(sizes)), pinned)[: sum(sizes)].split(sizes)
        self.tensors = {
            name: piece.view(dtype).view(shape)
            for piece, (name, dtype, shape) in zip(pieces, self._layout, strict=True)
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` can be copied here: they have the same names, dtypes and shapes."""
        return self._layout == _layout(tensors)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of `tensors`; from CUDA they come in the order of the current stream."""
        for name, here in self.tensors.items():
            here.copy_(tensors[name], non_blocking=tensors[name].is_cuda)


_Layout = list[tuple[str, torch.dtype, torch.Size]]


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    """Return the order in the file: wide types first, so that each begins on a multiple of it."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    return [(name, tensors[name].dtype, tensors[name].shape) for name in order]


def _header(layout: _Layout) -> bytes:
    """Return the file's beginning: where each tensor is, counted from there."""
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in layout:
        begin, end = end, end + _size(dtype, shape)
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor on the host, in the order of its elements."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


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
