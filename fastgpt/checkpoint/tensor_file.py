"""Read and write safetensors files, one tensor at a time, hashing while writing.

The library's `save_file` would require a second pass over the data for the hash. Its readers memory
map the file, so the pages stay in memory in addition to the tensors made from them. The format is
described at https://huggingface.co/docs/safetensors, section "Format".
"""

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.utils.errors import UsageError

PIECE = 4 << 20  # bytes hashed and then written at a time; they are still in the cache for writing
ALIGNMENT = 64  # bytes, of the first tensor: a cache line; the format requires 8

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which `read` reads directly into newly allocated memory."""

    path: Path
    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Read and return the tensor; UsageError if the file cannot be read or is truncated."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        memory = bytes_of(tensor)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while memory and (count := file.readinto(memory)):
                    memory = memory[count:]
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from None
        if memory:
            raise UsageError(f"{self.path} is truncated: {len(memory):,} bytes are missing")
        return tensor


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, without reading their data.

    Raises: UsageError if the file cannot be read, is damaged, or has a dtype that is not supported.
    """
    try:
        with utf8_path(path) as name, safe_open(name, "pt"):  # the library validates the header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    entries.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yield a path of the file that is UTF-8, as the safetensors library requires."""
    if not any("\udc80" <= character <= "\udcff" for character in str(path)):
        yield path
        return
    with path.open("rb") as file:
        yield Path(f"/dev/fd/{file.fileno()}")


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    on_piece: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write tensors in host memory to the new file `path`, and sync it to disk.

    The hash is computed from the tensors in memory, not by reading the file back: a hash of the
    contents of the system's page cache would also match data corrupted on the way into it.

    Hashing and writing release the GIL. Tensors that are not contiguous are copied, one at a time.

    Args:
        path: the file, which must not exist.
        tensors: CPU tensors by name.
        on_piece: called before each piece of at most `PIECE` bytes; it can raise to abort.
        metadata: strings to store in the header.

    Returns: a dict with the `size` in bytes and the `sha256` of the file.
    """
    layout = _layout(tensors)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        header = memoryview(_header(layout, metadata))
        for part in itertools.chain([header], (bytes_of(tensors[name]) for name, _, _ in layout)):
            for begin in range(0, len(part), PIECE):
                on_piece()
                piece = part[begin : begin + PIECE]
                digest.update(piece)
                file.write(piece)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in row-major order, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class HostCopy:
    """A reusable copy in host memory, for tensors with the names, dtypes and shapes of `tensors`.

    The first `copy` is slow because of page faults; later ones run at memory bandwidth. The memory
    is pinned if any of the tensors is on CUDA.
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
        """Return whether `tensors` have the names, dtypes and shapes of this copy."""
        return self._layout == _layout(tensors)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of `tensors`; from CUDA asynchronously, on the current stream."""
        for name, here in self.tensors.items():
            here.copy_(tensors[name], non_blocking=tensors[name].is_cuda)


def host_memory(size: int, pinned: bool = False) -> Tensor:
    """Allocate `size` bytes (at least 1) of host memory as a uint8 tensor.

    Unless it is pinned, the memory is a separate mapping, which is returned to the system when it
    is freed. It uses huge pages where available, which reduces the time of the first copy of 1.5 GB
    to a quarter.
    """
    if pinned or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel does not support huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


_Layout = list[tuple[str, torch.dtype, torch.Size]]


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    """Return the tensors in file order: wide dtypes first, so that each is aligned to its size."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    return [(name, tensors[name].dtype, tensors[name].shape) for name in order]


def _stored(path: Path, name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    if entry["dtype"] not in _BY_NAME:
        raise UsageError(
            f"{path}: {name} has dtype {entry['dtype']}, which is not supported; supported are: "
            f"{', '.join(_BY_NAME)}"
        )
    offset = begin + int(entry["data_offsets"][0])
    return StoredTensor(path, offset, _BY_NAME[entry["dtype"]], tuple(entry["shape"]))


def _header(layout: _Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the header: its length, JSON with dtype, shape and offsets of each tensor, padding.

    Offsets are relative to the end of the header.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in layout:
        begin, end = end, end + _size(dtype, shape)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _size(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * math.prod(shape)
