"""Weight quantization to 8 and 4 bits for the engine, and the file format of quantized weights.

Quantization is symmetric: a weight is an integer times a scale.

- ``"int8"``: integers from -127 to 127, one scale per output (row) of a matrix.
- ``"int4"``: integers from -8 to 7, one scale per `group` weights of a row, rounded to bfloat16.
  The scale may be negative; it is the one of twelve candidates around the largest weight that has
  the smallest squared error. The embedding and the head, which are the most sensitive to rounding,
  have 8 bits.

Weights are rounded to the nearest integer, ties to even, in ``csrc/engine/weights.cpp``.

The inputs of products are quantized dynamically to -127 to 127, with one scale per 64 values
(``"int4"``: `group` values) of a token, so that a few outliers affect only the precision of their
own group. Norms, biases and positions stay in fp32. Keys and values are stored in bfloat16 in every
dtype except ``"float32"``.

Files are safetensors files. A quantized matrix `NAME` is stored as `NAME` (int8, or uint8 with two
4-bit weights per byte, each with 8 added, the first in the low half) and `NAME.scales` (float32).
The metadata is JSON under the key ``fastgpt``: format, dtype, group, config, and the checksum of
these and of all tensors (`_checksum`). Files of format 1 have no checksum.
"""

import json
import math
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.checkpoint.tensor_file import bytes_of, utf8_path
from fastgpt.model import GPTConfig, meta_weights
from fastgpt.utils.errors import UsageError
from fastgpt.utils.extension import _C
from fastgpt.utils.files import atomic_file

GROUP = 64
FORMAT = 2
Dtype = Literal["float32", "bfloat16", "int8", "int4"]
Weight = Tensor | tuple[Tensor, Tensor]


class QuantizationError(UsageError, ValueError):
    """Raised if a file of engine weights is missing, damaged or of another kind."""


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights by name, as in its `state_dict`."""
    return {name: tuple(weight.shape) for name, weight in meta_weights(config).items()}


def is_matrix(name: str) -> bool:
    """Return whether a weight is the matrix of a product; the position table is not."""
    linear = ".c_" in name and name.endswith(".weight")
    return linear or name in ("wte.weight", "lm_head.weight")


@dataclass(frozen=True)
class EngineWeights:
    """The weights of an engine by name, rounded to `dtype`, with all that describes them.

    Matrices are fp32 tensors (bfloat16's too: the engine rounds them), or pairs of integers and
    scales.
    """

    config: GPTConfig
    dtype: Dtype
    group: int
    tensors: Mapping[str, Weight]


def round_weights(
    config: GPTConfig,
    tensors: Mapping[str, Callable[[], Tensor]],
    dtype: Dtype,
    group: int,
    threads: int,
) -> EngineWeights:
    """Return the weights of a model, each of which is rounded when it is accessed.

    tensors: functions that return each weight, by name.

    Raises: ValueError for an unknown dtype or group, and on access for non-finite weights.
    """
    check(dtype, group)

    def convert(name: str) -> Weight:
        plain = tensors[name]().detach().to("cpu", torch.float32).contiguous()
        if not is_matrix(name) or dtype not in ("int8", "int4"):
            return plain
        return quantize(plain, bits(name, dtype), group, threads, name)

    functions = {name: partial(convert, name) for name in tensors}
    return EngineWeights(config, dtype, group, _LazyDict(functions))


class _LazyDict(UserDict[str, Any]):
    """A dict of functions without arguments, which are called when an item is read."""

    def __getitem__(self, name: str) -> Any:
        return self.data[name]()


def bits(name: str, dtype: str) -> int:
    """Return the number of bits of a quantized matrix, which depends on its name."""
    return 8 if dtype == "int8" or name in ("wte.weight", "lm_head.weight") else 4


def quantize(
    weight: Tensor, n_bits: int, group: int = GROUP, threads: int = 1, name: str = "weights"
) -> tuple[Tensor, Tensor]:
    """Quantize an fp32 matrix `[N, K]` to integers and fp32 scales.

    8 bits: int8 `[N, K]` and scales `[N]`. 4 bits: uint8 `[N, G · group / 2]` and scales `[N, G]`,
    where G is K / group rounded up. Raises ValueError, with `name`, for non-finite weights.
    """
    dtype = "int8" if n_bits == 8 else "int4"
    rounded = _C.quantize(weight.contiguous(), weight.size(0), dtype, group, threads, name)
    return as_tensors(*rounded, n_bits)


def as_tensors(
    integers: NDArray[np.uint8], scales: NDArray[np.float32], n_bits: int
) -> tuple[Tensor, Tensor]:
    """Convert a matrix quantized by the compiled module to the tensors described in `quantize`."""
    if n_bits == 8:
        return torch.from_numpy(integers.view(np.int8)), torch.from_numpy(scales[:, 0].copy())
    return torch.from_numpy(integers), torch.from_numpy(scales)


def dequantize(integers: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the fp32 matrix `[N, K]` represented by the integers and scales of `quantize`."""
    if integers.dtype == torch.int8:
        return integers.float() * scales[:, None]
    nibbles = torch.stack([integers & 15, integers >> 4], -1).flatten(1).float() - 8
    grouped = nibbles.view(*scales.shape, -1) * scales[..., None]
    return grouped.flatten(1)[:, : shape[1]].contiguous()


def check(dtype: str, group: int) -> None:
    """Raise ValueError for a dtype or group size that the engine does not support."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, not {dtype!r}")
    if group not in (32, 64):
        raise ValueError(f"group must be 32 or 64, not {group}")


def save(path: Path, weights: EngineWeights) -> None:
    """Save an engine's weights in the format of the module docstring.

    Raises: UsageError if the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in weights.tensors.items():
        if isinstance(weight, Tensor):
            narrow = weights.dtype == "bfloat16" and is_matrix(name)
            stored[name] = weight.to(torch.bfloat16) if narrow else weight.contiguous()
        else:
            stored[name], stored[f"{name}.scales"] = weight
    about: dict[str, Any] = {
        "format": FORMAT,
        "dtype": weights.dtype,
        "group": weights.group,
        "config": asdict(weights.config),
    }
    about["crc32c"] = _checksum(about, stored)
    try:
        with atomic_file(path) as temporary:
            save_file(stored, temporary, {"fastgpt": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from None


def load(path: Path) -> EngineWeights:
    """Load a file written by `save`.

    Raises: QuantizationError if the file cannot be read, if the checksum differs, or if tensors are
        missing, unexpected or of another dtype or shape.
    """
    try:
        with utf8_path(path) as opened, safe_open(opened, framework="pt") as file:
            about = _read_about(path, file.metadata())
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise QuantizationError(f"{path} cannot be read: {error}") from None
    checksum = about.pop("crc32c", None)
    if not (about["format"] == 1 and checksum is None) and checksum != _checksum(about, stored):
        raise QuantizationError(
            f"{path} is damaged: its checksum differs; copy it again, or create it with Engine.save"
        )
    config, dtype, group, shapes = _read_settings(path, about, len(stored))
    _check_tensors(path, stored, _expected(shapes, dtype, group))
    tensors: dict[str, Weight] = {}
    for name in shapes:
        scales = stored.get(f"{name}.scales")
        tensors[name] = stored[name].float() if scales is None else (stored[name], scales)
    return EngineWeights(config, dtype, group, tensors)


def _checksum(about: Mapping[str, Any], stored: Mapping[str, Tensor]) -> str:
    """Return the CRC32C, in hexadecimal, of the settings and of the names and bytes of the tensors.

    It reads 6 GB/s, so that a file of a 124M model in int8 loads 20 ms later. With SHA-256, which
    would reveal no more accidental damage, it would be 130 ms.
    """
    crc = _C.crc32c(json.dumps(about, sort_keys=True).encode())
    for name in sorted(stored):
        crc = _C.crc32c(name.encode(), crc)
        crc = _C.crc32c(bytes_of(stored[name]), crc)
    return f"{crc:08x}"


def _read_about(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Return the metadata of a file, as `save` wrote it, if its format is known."""
    try:
        about: dict[str, Any] = json.loads((metadata or {})["fastgpt"])
        found = about["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise QuantizationError(f"{path} does not hold engine weights: {error!r}") from None
    if found not in (1, FORMAT):
        raise QuantizationError(
            f"{path} has format {found}, but this version reads formats 1 to {FORMAT}"
        )
    return about


def _read_settings(
    path: Path, about: Mapping[str, Any], n_tensors: int
) -> tuple[GPTConfig, Dtype, int, Mapping[str, tuple[int, ...]]]:
    """Return config, dtype, group and the shapes of the weights of a file of `n_tensors`."""
    try:
        config = GPTConfig(**about["config"])
        if {field.name for field in fields(GPTConfig)} != about["config"].keys():
            raise ValueError("incomplete config")
        check(about["dtype"], about["group"])
        if config.n_layer > n_tensors:  # before the shapes of an absurd number are made
            raise ValueError(f"too few tensors for {config.n_layer:,} layers")
        return config, about["dtype"], about["group"], weight_shapes(config)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise QuantizationError(f"{path} does not hold engine weights: {error!r}") from None


def _check_tensors(
    path: Path,
    stored: Mapping[str, Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Raise QuantizationError for a tensor that is missing, unexpected or of another kind."""
    for name, required in expected.items():
        if name not in stored:
            raise QuantizationError(f"{path}: {name} is missing")
        found = (stored[name].dtype, tuple(stored[name].shape))
        if found != required:
            raise QuantizationError(f"{path}: {name} is {found}, not {required}")
    if unknown := sorted(stored.keys() - expected.keys()):
        raise QuantizationError(f"{path}: {unknown[0]} is not a weight of this model")


def _expected(
    shapes: Mapping[str, tuple[int, ...]], dtype: Dtype, group: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the expected dtype and shape of each tensor in a file."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if not is_matrix(name):
            expected[name] = (torch.float32, shape)
        elif dtype in ("float32", "bfloat16"):
            expected[name] = (getattr(torch, dtype), shape)
        elif bits(name, dtype) == 8:
            expected[name] = (torch.int8, shape)
            expected[f"{name}.scales"] = (torch.float32, shape[:1])
        else:
            groups = math.ceil(shape[1] / group)
            expected[name] = (torch.uint8, (shape[0], groups * group // 2))
            expected[f"{name}.scales"] = (torch.float32, (shape[0], groups))
    return expected
