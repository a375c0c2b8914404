"""Import of llm.c models: files such as ``gpt2_124M.bin`` and ``log124M/model_00019560.bin``.

A file has a header of 256 4-byte integers, followed by the tensors in a fixed order, each stacked
over all layers, in fp32 (version 3) or bfloat16 (version 5). Matrices are `[out, in]`, and the
vocabulary is padded to a multiple of 128. See https://github.com/karpathy/llm.c,
``train_gpt2.py`` (`write_model`).
"""

import math
import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastgpt.checkpoint.tensor_file import StoredTensor
from fastgpt.interop import external
from fastgpt.interop.external import ExternalModel, LazyTensor
from fastgpt.model import GPTConfig
from fastgpt.utils.errors import UsageError

MAGIC = 20240326
_HEADER_BYTES = 1024
_DTYPES = {3: torch.float32, 5: torch.bfloat16}
_OTHERS = {
    20240327: "a debug state, to test an implementation against",
    20240328: "a tokenizer",
    20240520: "training data (token ids): pass the folder to --data",
    20240522: "multiple-choice questions of an evaluation",
    20240527: "an optimizer state; the weights are in the model_*.bin in the same folder",
    20240801: "token ids of Llama 3",
    20240803: "a model of Llama 3",
}


class _Header(NamedTuple):
    magic: int
    version: int
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    padded_vocab_size: int


def recognizes(path: Path) -> bool:
    """Return whether a path is a file of llm.c, judging by its first four bytes."""
    return external.starts_with(
        path, tuple(struct.pack("<i", magic) for magic in (MAGIC, *_OTHERS))
    )


def read(path: Path) -> ExternalModel:
    """Open an llm.c model; UsageError if it is of another kind or its size does not match."""
    header = _read_header(path)
    config = external.make_config(
        path,
        vocab_size=header.vocab_size,
        block_size=header.block_size,
        n_layer=header.n_layer,
        n_head=header.n_head,
        n_embd=header.n_embd,
    )
    tensors = _tensors(path, header, config)
    return ExternalModel(
        path, config, tensors, partial(external.find_tokenizer, path.parent, config.vocab_size)
    )


def _read_header(path: Path) -> _Header:
    """Return the header after checking it against the size of the file."""
    try:
        with path.open("rb") as file:
            begin = file.read(_HEADER_BYTES)
        n_bytes = path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(begin) < _HEADER_BYTES:
        raise UsageError(f"{path} has only {n_bytes:,} bytes: its header is truncated")
    header = _Header(*struct.unpack_from("<8i", begin))
    if header.magic != MAGIC:
        what = _OTHERS.get(header.magic, "an unknown kind of file")
        raise UsageError(f"{path} (magic {header.magic}) is not a model of llm.c, but {what}")
    if header.version not in _DTYPES:
        raise UsageError(
            f"{path} has version {header.version} of llm.c's model format; only 3 (fp32) and 5 "
            "(bfloat16) are supported: write it again with a current train_gpt2.py"
        )
    _check_size(path, header, n_bytes)
    return header


def _check_size(path: Path, header: _Header, n_bytes: int) -> None:
    if min(header) < 1 or header.padded_vocab_size < header.vocab_size:
        raise UsageError(f"{path}: its header is damaged: {header}")
    elements = sum(math.prod(shape) for _, shape, _ in _layout(header))
    expected = _HEADER_BYTES + elements * _DTYPES[header.version].itemsize
    if n_bytes != expected:
        raise UsageError(
            f"{path} has {n_bytes:,} bytes, but its header says {expected:,}: it was truncated or "
            "changed"
        )


def _layout(header: _Header) -> list[tuple[str, tuple[int, ...], bool]]:
    """Return name and shape of the stored tensors in order, and whether they are stacked by layer.

    The first dimension of a stacked tensor is the layer.
    """
    layers, width = header.n_layer, header.n_embd
    per_layer: list[tuple[str, tuple[int, ...]]] = [
        *(("ln_1.weight", (width,)), ("ln_1.bias", (width,))),
        *(("attn.c_attn.weight", (3 * width, width)), ("attn.c_attn.bias", (3 * width,))),
        *(("attn.c_proj.weight", (width, width)), ("attn.c_proj.bias", (width,))),
        *(("ln_2.weight", (width,)), ("ln_2.bias", (width,))),
        *(("mlp.c_fc.weight", (4 * width, width)), ("mlp.c_fc.bias", (4 * width,))),
        *(("mlp.c_proj.weight", (width, 4 * width)), ("mlp.c_proj.bias", (width,))),
    ]
    return [
        ("wte.weight", (header.padded_vocab_size, width), False),
        ("wpe.weight", (header.block_size, width), False),
        *((name, (layers, *shape), True) for name, shape in per_layer),
        *((name, (width,), False) for name in ("ln_f.weight", "ln_f.bias")),
    ]


def _tensors(path: Path, header: _Header, config: GPTConfig) -> dict[str, LazyTensor]:
    """Return the tensors by fastgpt's names, split by layer and without vocabulary padding."""
    dtype = _DTYPES[header.version]
    tensors: dict[str, LazyTensor] = {}
    offset = _HEADER_BYTES
    for name, shape, per_layer in _layout(header):
        part = shape[1:] if per_layer else shape
        for layer in range(config.n_layer if per_layer else 1):
            # only the first rows of the embedding are read, without the padding
            rows = (config.vocab_size, *part[1:]) if name == "wte.weight" else part
            stored = StoredTensor(path, offset, dtype, rows)
            full_name = f"h.{layer}.{name}" if per_layer else name
            tensors[full_name] = LazyTensor(stored.shape, stored.read)
            offset += math.prod(part) * dtype.itemsize
    return tensors
