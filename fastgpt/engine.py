"""Writing text on a CPU without PyTorch: the decode loop of csrc/engine.

What `Engine` writes is what `fastgpt.generation` writes, its twin in PyTorch: the same window past
the context, the same sampling, the same draws for a seed. In ``"float32"`` the same text, but for
logits that are closer together than rounding; in ``"bfloat16"`` that of weights and inputs rounded
to it. ``"int8"`` and ``"int4"`` are described in `fastgpt.quantization`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastgpt import quantization
from fastgpt.compiled import _C
from fastgpt.model import GPT, GPTConfig

Dtype = Literal["float32", "bfloat16", "int8", "int4"]
Seed = int | Sequence[int] | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: penalties, temperature, top-k, top-p, min-p, then a draw.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens (None or 0: all); of equal ones the first.
    top_p: keep the smallest set of likeliest tokens that holds this much probability, in (0, 1]
    (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: keep tokens at least this times as probable as the likeliest, in [0, 1] (Nguyen et al.
    2024, arXiv:2407.01082).
    repetition_penalty: divides positive logits, multiplies negative ones, of tokens in the prompt
    or the new text (Keskar et al. 2019, arXiv:1909.05858); above 0.
    presence_penalty, frequency_penalty: are taken off the logits of tokens in the new text, once,
    and as often as they stand there (OpenAI's API).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 1 (or 0: keep all), not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")


class Engine:
    """A GPT-2 on a CPU, with weights of its own: a copy of a model's, rounded to `dtype`.

    threads: how many compute (None: as many as PyTorch would use); their number changes no bit of
    the result, nor does what else is in a batch. group: how many weights share a scale in
    ``"int4"``, 32 or 64. code: the instructions to use, ``"best"`` or one of
    `_C.engine_codes()`. Several Python threads may use one engine: one step is computed at a time.
    Weights that are not finite raise ValueError.
    """

    def __init__(
        self,
        model: GPT,
        dtype: Dtype = "float32",
        threads: int | None = None,
        *,
        group: int = quantization.GROUP,
        code: str = "best",
    ) -> None:
        threads = threads or torch.get_num_threads()
        weights = quantization.round_weights(model, dtype, group, threads)
        self._start(model.config, dtype, group, threads, code, weights)

    def _start(
        self,
        config: GPTConfig,
        dtype: Dtype,
        group: int,
        threads: int,
        code: str,
        weights: quantization.Weights,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.group = group
        self._core = _C.Engine(asdict(config), dtype, group, threads, code, weights)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._core.threads

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that are read for each new token (of all rows together)."""
        return self._core.bytes_per_token

    def save(self, path: Path) -> None:
        """Write the weights as they are in here to a new safetensors file, for `Engine.load`."""
        names = quantization.weight_names(self.config)
        weights: quantization.Weights = {}
        for name in names.matrices:
            found = self._core.matrix(name)
            weights[name] = (
                quantization.as_tensors(found, quantization.bits(name, self.dtype))
                if isinstance(found, tuple)
                else torch.from_numpy(found)
            )
        for name, shape in names.vectors.items():
            vector = torch.from_numpy(self._core.vector(name))
            weights[name] = vector[: math.prod(shape)].view(shape)
        quantization.save(path, self.config, self.dtype, self.group, weights)

    @classmethod
    def load(cls, path: Path, threads: int | None = None, *, code: str = "best") -> "Engine":
        """Read what `save` wrote; QuantizationError says what is wrong with the file."""
        config, dtype, group, weights = quantization.load(path)
        engine = cls.__new__(cls)
        try:
            engine._start(config, dtype, group, threads or torch.get_num_threads(), code, weights)
        except ValueError as error:
            raise quantization.QuantizationError(f"{path}: {error}") from None
        return engine

    def prefill(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, V]` (fp32) of the token behind each row of `ids` `[B, T]`."""
        generation = self._generation(ids, 1, Sampling(), 0, None)
        return torch.from_numpy(generation.read(self.config.vocab_size))

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` (fp32) behind each token, as `GPT` does.

        ids: int64 `[B, T]`, T at most `block_size`.
        """
        _check_ids(ids, self.config.vocab_size)
        rows = [torch.from_numpy(self._core.logits(row)) for row in ids.tolist()]
        return torch.stack(rows)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        seed: Seed = None,
        stop_token: int | None = None,
        on_tokens: Callable[[list[int]], bool | None] | None = None,
        **sampling: float | None,
    ) -> Tensor:
        """Continue each row of `ids` and return prompt and continuation, int64 `[B, T + new]`.

        ids, seed, stop_token: as for `fastgpt.generation.generate`; sampling: see `Sampling`.
        on_tokens: is called with the new tokens of all rows, one position at a time; what it has
        returned true for is the last. Ctrl-C stops within a token.
        """
        generation = self._generation(ids, max_new_tokens, _sampling_of(sampling), seed, stop_token)
        new = torch.tensor(generation.run(on_tokens), dtype=torch.int64)
        return torch.cat([ids, new.view(-1, ids.size(0)).T.to(ids.device)], dim=1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        seed: Seed = None,
        stop_token: int | None = None,
        **sampling: float | None,
    ) -> Iterator[Tensor]:
        """Yield the new tokens one position at a time, int64 `[B]`; arguments as for `generate`."""
        generation = self._generation(ids, max_new_tokens, _sampling_of(sampling), seed, stop_token)
        return _steps(generation, ids.device)

    def _generation(
        self,
        ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        seed: Seed,
        stop_token: int | None,
    ) -> _C.Generation:
        _check_ids(ids, self.config.vocab_size)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        settings = asdict(sampling)
        for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            settings[name] = default if settings[name] is None else settings[name]
        seeds = _seeds(seed, ids.size(0))
        # an id that no token has ends no row
        stop = stop_token if stop_token is not None and stop_token >= 0 else None
        return self._core.generation(ids.tolist(), max_new_tokens, settings, seeds, stop)


def _steps(generation: _C.Generation, device: torch.device) -> Iterator[Tensor]:
    while (tokens := generation.step()) is not None:
        yield torch.tensor(tokens, dtype=torch.int64, device=device)


def _sampling_of(settings: dict[str, float | None]) -> Sampling:
    return Sampling(**settings)  # type: ignore[arg-type]


def _seeds(seed: Seed, batch_size: int) -> list[int]:
    """Return a seed for each row: see `fastgpt.generation.generate`."""
    if seed is None:
        seed = torch.Generator().seed() % 2**62
    seeds = [seed + row for row in range(batch_size)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch_size:
        raise ValueError(f"{len(seeds)} seeds for {batch_size} rows: give one each, or one in all")
    if wrong := [s for s in seeds if not 0 <= s < 2**63]:
        raise ValueError(f"a seed must be from 0 to 2^63 - 1, not {wrong[0]}")
    return seeds


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"ids must be [batch, tokens] with at least one token, not {list(ids.shape)}; "
            f"for one prompt: torch.tensor([tokenizer.encode(text)])"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
