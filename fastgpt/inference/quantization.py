"""Weight quantization to 8 and 4 bits for the engine, and the file format of quantized weights.

Quantization is symmetric: a weight is an integer times a scale.

- ``"int8"``: integers from -127 to 127, one scale per output (row) of a matrix.
- ``"int4"``: integers from -8 to 7, one bfloat16 scale per `group` weights of a row. The scale may
  be negative; it is the one of twelve candidates around the largest weight that has the smallest
  squared error. The embedding and the head, which are the most sensitive to rounding, have 8 bits.

The inputs of products are quantized dynamically to -127 to 127, with one scale per 64 values
(``"int4"``: `group` values) of a token, so that a few outliers affect only the precision of their
own group. Norms, biases and positions stay in fp32. Keys and values are stored in bfloat16 in every
dtype except ``"float32"``.

Files are safetensors files. A quantized matrix `NAME` is stored as `NAME` (int8, or uint8 with two
4-bit weights per byte, each with 8 added, the first in the low half) and `NAME.scales`. The
metadata is JSON under the key ``fastgpt``: format, dtype, group, config.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.model import GPTConfig, meta_weights
from fastgpt.utils.errors import UsageError
from fastgpt.utils.extension import _C

GROUP = 64
FORMAT = 1
DTYPES = ("float32", "bfloat16", "int8", "int4")
Weight = Tensor | tuple[Tensor, Tensor]
Weights = Mapping[str, Weight]


class QuantizationError(UsageError, ValueError):
    """Raised if a file of engine weights is missing, damaged or of another kind."""


@dataclass(frozen=True)
class Names:
    """The shapes of a model's weights by name: the matrices of products, and all others."""

    matrices: dict[str, tuple[int, int]]
    vectors: dict[str, tuple[int, ...]]


def weight_names(config: GPTConfig) -> Names:
    """Return the names and shapes of a model's weights, as in its `state_dict`."""
    shapes = {name: tuple(t.shape) for name, t in meta_weights(config).items()}
    matrices = {n: s for n, s in shapes.items() if len(s) == 2 and n != "wpe.weight"}
    vectors = {n: s for n, s in shapes.items() if n not in matrices}
    return Names(matrices, vectors)


class QuantizedWeights(Mapping[str, "Weight"]):
    """A lazy mapping of a model's weights, converted for an engine when they are accessed.

    Matrices are in fp32 (which the engine rounds further for ``"bfloat16"``) or pairs of integers
    and scales. tensors: functions that return each weight, by name.

    Raises: ValueError for an unknown dtype or group, and on access for non-finite weights.
    """

    def __init__(
        self,
        config: GPTConfig,
        tensors: Mapping[str, Callable[[], Tensor]],
        dtype: str,
        group: int,
        threads: int,
    ) -> None:
        check(dtype, group)
        self._matrices = weight_names(config).matrices
        self._tensors, self._dtype, self._group, self._threads = tensors, dtype, group, threads

    def __getitem__(self, name: str) -> "Weight":
        plain = self._tensors[name]().detach().to("cpu", torch.float32).contiguous()
        if name not in self._matrices or self._dtype not in ("int8", "int4"):
            return plain
        return quantize(plain, bits(name, self._dtype), self._group, self._threads, name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
    return as_tensors(rounded, n_bits)


def as_tensors(
    rounded: tuple[NDArray[np.uint8], NDArray[np.float32]], n_bits: int
) -> tuple[Tensor, Tensor]:
    """Convert a matrix quantized by the compiled module to the tensors described in `quantize`."""
    integers, scales = map(torch.from_numpy, rounded)
    return (
        (integers.view(torch.int8), scales[:, 0].contiguous())
        if n_bits == 8
        else (integers, scales)
    )


def dequantize(integers: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the fp32 matrix `[N, K]` represented by the integers and scales of `quantize`."""
    if integers.dtype == torch.int8:
        return integers.float() * scales[:, None]
    nibbles = torch.stack([integers & 15, integers >> 4], -1).flatten(1).float() - 8
    grouped = nibbles.view(*scales.shape, -1) * scales[..., None]
    return grouped.flatten(1)[:, : shape[1]].contiguous()


def check(dtype: str, group: int) -> None:
    """Raise ValueError for a dtype or group size that the engine does not support."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if group not in (32, 64):
        raise ValueError(f"group must be 32 or 64, not {group}")


def save(path: Path, config: GPTConfig, dtype: str, group: int, weights: Weights) -> None:
    """Save an engine's weights in the format of the module docstring.

    Raises: UsageError if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    matrices = weight_names(config).matrices
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            narrow = dtype == "bfloat16" and name in matrices
            tensors[name] = weight.to(torch.bfloat16) if narrow else weight.contiguous()
        else:
            tensors[name], tensors[f"{name}.scales"] = weight
    about = {"format": FORMAT, "dtype": dtype, "group": group, "config": asdict(config)}
    try:
        save_file(tensors, path, {"fastgpt": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from None


def load(path: Path) -> tuple[GPTConfig, Any, int, Weights]:
    """Load a file written by `save`: return config, dtype, group and weights.

    Raises: QuantizationError if the file cannot be read, or if tensors are missing, unexpected or
        of another dtype or shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = _read_about(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise QuantizationError(f"{path} cannot be read: {error}") from None
    config, dtype, group = about
    names = weight_names(config)
    expected = _expected(names, dtype, group)
    for name, (kind, shape) in expected.items():
        if name not in tensors:
            raise QuantizationError(f"{path}: {name} is missing")
        found = (tensors[name].dtype, tuple(tensors[name].shape))
        if found != (kind, shape):
            raise QuantizationError(f"{path}: {name} is {found}, not {(kind, shape)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise QuantizationError(f"{path}: {unknown[0]} is not a weight of this model")
    weights: dict[str, Weight] = {}
    for name in (*names.matrices, *names.vectors):
        pair = f"{name}.scales" in expected
        weights[name] = (
            (tensors[name], tensors[f"{name}.scales"]) if pair else tensors[name].float()
        )
    return config, dtype, group, weights


def _read_about(path: Path, metadata: dict[str, str] | None) -> tuple[GPTConfig, str, int]:
    try:
        about = json.loads((metadata or {})["fastgpt"])
        if about["format"] != FORMAT:
            raise QuantizationError(
                f"{path} has format {about['format']}, but this version reads format {FORMAT}"
            )
        config = GPTConfig(**about["config"])
        if {field.name for field in fields(GPTConfig)} != about["config"].keys():
            raise ValueError("incomplete config")
        check(about["dtype"], about["group"])
        return config, about["dtype"], about["group"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, QuantizationError):
            raise
        raise QuantizationError(f"{path} does not hold engine weights: {error!r}") from None


def _expected(
    names: Names, dtype: str, group: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the expected dtype and shape of each tensor in a file."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.float32, shape) for name, shape in names.vectors.items()
    }
    for name, (rows, columns) in names.matrices.items():
        if dtype in ("float32", "bfloat16"):
            expected[name] = (getattr(torch, dtype), (rows, columns))
        elif bits(name, dtype) == 8:
            expected[name] = (torch.int8, (rows, columns))
            expected[f"{name}.scales"] = (torch.float32, (rows,))
        else:
            groups = math.ceil(columns / group)
            expected[name] = (torch.uint8, (rows, groups * group // 2))
            expected[f"{name}.scales"] = (torch.float32, (rows, groups))
    return expected
