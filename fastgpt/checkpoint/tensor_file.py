"""Safetensors files: written, hashed on the way, and read, one tensor at a time.

The library's own `save_file` would need a second pass over the data for the hash, and its readers
map the file: pages that stay in memory beside the tensors made of them. The format:
https://huggingface.co/docs/safetensors, "Format".
"""

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.utils.errors import UsageError

PIECE = 4 << 20  # bytes hashed and then written: from the processor's cache the second time
ALIGNMENT = 64  # of the first tensor, a cache line; the format asks for 8

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: read when asked for, straight into its own memory."""

    path: Path
    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the tensor, as it is stored; UsageError if the file cannot give it."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        memory = _bytes_of(tensor)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while memory and (count := file.readinto(memory)):
                    memory = memory[count:]
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from None
        if memory:
            raise UsageError(f"{self.path} ends {len(memory):,} bytes too early: it was cut off")
        return tensor


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; UsageError if it is not one, or damaged."""
    try:
        with safe_open(path, "pt"):  # the library's checks of the whole header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    entries.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    on_piece: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write tensors in host memory as the new file `path`, to the disk; return size and SHA-256.

    The hash is of the memory, not of what is read back: that would come out of the same memory,
    the system's cache, and pass whatever went wrong on the way there. Hashing and writing leave
    Python's lock to others. `on_piece` is called now and then, and may raise. One that is not laid
    out in the order of its elements is copied, but only one at a time.
    """
    layout = _layout(tensors)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        header = memoryview(_header(layout, metadata))
        for part in itertools.chain([header], (_bytes_of(tensors[name]) for name, _, _ in layout)):
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
        pieces = host_memory(max(1, sum(sizes)), pinned)[: sum(sizes)].split(sizes)
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


def host_memory(size: int, pinned: bool = False) -> Tensor:
    """Return `size` bytes, uint8, at least one: in pages of their own, unless they are pinned.

    The system gets them back once they are freed, and they are huge where it has such: the first
    copy of 1.5 GB then takes a quarter of the time.
    """
    if pinned or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


_Layout = list[tuple[str, torch.dtype, torch.Size]]


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    """Return the order in the file: wide types first, so that each begins on a multiple of it."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    return [(name, tensors[name].dtype, tensors[name].shape) for name in order]


def _stored(path: Path, name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    dtypes = {letters: dtype for dtype, letters in _DTYPES.items()}
    if entry["dtype"] not in dtypes:
        raise UsageError(
            f"{path}: {name} is of type {entry['dtype']}, which is not read; there are: "
            f"{', '.join(dtypes)}"
        )
    offset = begin + int(entry["data_offsets"][0])
    return StoredTensor(path, offset, dtypes[entry["dtype"]], tuple(entry["shape"]))


def _header(layout: _Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the file's beginning: where each tensor is, counted from there."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
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
