"""Sampling of tokens from logits: penalties, temperature, top-k, top-p and min-p, random draws."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TokenIds: TypeAlias = "Tensor | NDArray[np.integer[Any]] | Sequence[int] | Sequence[Sequence[int]]"

MIN_TEMPERATURE = 1e-30  # lower ones are treated as 0: fp32 logits cannot be divided by them


class Sampling(TypedDict, total=False):
    """The keyword arguments of `Sampler`, which documents them."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


@dataclass(frozen=True)
class Sampler:
    """Samples tokens from logits. The settings, all off by default, apply in this order:

    repetition_penalty: the logits of tokens that occur in the row, including its prompt, are
    divided by it if positive and multiplied by it if negative (Keskar et al. 2019,
    arXiv:1909.05858, section 4.1); 1 disables it.
    frequency_penalty, presence_penalty: subtracted from the logit of a generated token, the first
    once per occurrence, the second once if it occurs; prompts do not count. From -2 to 2, as in
    OpenAI's API.
    temperature: divides the logits; 0 takes the most likely token and ignores the settings below.
    top_k: keep the k most likely tokens (None or 0: all).
    top_p: keep the smallest set of most likely tokens whose total probability reaches this value,
    in (0, 1] (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: keep the tokens whose probability is at least this fraction of the most likely token's,
    in [0, 1] (Nguyen et al. 2024, arXiv:2407.01082).

    Raises: ValueError for a value outside its range; TypeError for a value that is not a number, or
        a `top_k` that is not an integer.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        self._convert()
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 1 (or 0: keep all), not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        if not 1e-9 <= self.repetition_penalty <= 1e9:  # range in which fp32 logits can be divided
            raise ValueError(
                f"repetition_penalty must be from 1e-9 to 1e9, not {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be from -2 to 2, not {getattr(self, name)}")

    def _convert(self) -> None:
        """Replace numbers of other types, such as NumPy's, by an int (`top_k`) and floats."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            convert = as_integer if field.name == "top_k" else as_float
            object.__setattr__(self, field.name, convert(field.name, value))  # self is frozen

    @property
    def uses_penalties(self) -> bool:
        """Whether any penalty is on, so that token counts are needed."""
        return self.repetition_penalty != 1.0 or bool(
            self.presence_penalty or self.frequency_penalty
        )

    @property
    def draws(self) -> bool:
        """Whether sampling is random, rather than greedy."""
        return self.temperature >= MIN_TEMPERATURE

    def draw(
        self,
        logits: Tensor,
        uniform: Tensor,
        counts: "TokenCounts | None" = None,
    ) -> Tensor:
        """Sample one token per row of `logits` `[B, V]`: int64 `[B]`.

        uniform: fp32 `[B]` in [0, 1), a random number for each row; not used at temperature 0.
        counts: the tokens of each row, required for penalties. Does not synchronize with the host.
        """
        if counts is not None and self.uses_penalties:
            logits = self._penalized(logits.float(), counts)
        if not self.draws:
            return logits.argmax(-1)
        # float64 keeps a cumulative sum over 50,257 entries accurate enough; MPS does not have it
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulative = self.probabilities(logits).to(wide).cumsum(-1)
        point = uniform[:, None].to(cumulative) * cumulative[:, -1:]
        # right=True finds the first entry whose cumulative sum exceeds the point; a token of
        # probability 0 does not raise the sum and thus is never drawn
        drawn = torch.searchsorted(cumulative, point, right=True)[:, 0]
        return drawn.clamp(max=logits.size(-1) - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the fp32 probabilities `[B, V]` that `draw` samples from, if temperature > 0."""
        # subtracting the maximum first avoids overflow at very low temperatures
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k and self.top_k < logits.size(-1):
            logits = _keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1.0:
            logits = _keep_top_p(logits, self.top_p)
        if self.min_p:
            logits = logits.masked_fill(logits < math.log(self.min_p), -math.inf)
        return logits.softmax(-1)

    def _penalized(self, logits: Tensor, counts: "TokenCounts") -> Tensor:
        if (factor := self.repetition_penalty) != 1.0:
            repeated = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(counts.present, repeated, logits)
        logits = logits - self.frequency_penalty * counts.generated
        return logits - self.presence_penalty * (counts.generated > 0)


class RandomStreams:
    """Random numbers for a batch; each row has its own generator, initialized with its seed.

    Numbers are drawn on the CPU, which makes them the same on every machine, and in blocks of
    `AHEAD`, which avoids a host-to-device copy per step.
    """

    AHEAD = 64

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._ahead: Iterator[Tensor] = iter(())

    def next(self) -> Tensor:
        """Return the next number of each row, fp32 `[B]` in [0, 1), on the device."""
        drawn = next(self._ahead, None)
        if drawn is None:
            rows = torch.empty(len(self._generators), self.AHEAD, dtype=torch.float32, device="cpu")
            for row, generator in zip(rows, self._generators, strict=True):
                row.uniform_(generator=generator)
            self._ahead = iter(rows.T.to(self._device).unbind())
            drawn = next(self._ahead)
        return drawn


class TokenCounts:
    """The tokens of each of B rows.

    present: bool `[B, V]`, whether the token occurs in the row or its prompt. generated: fp32
    `[B, V]`, how often the token was generated after the prompt.
    """

    def __init__(self, prompts: Sequence[Tensor], vocab_size: int) -> None:
        device = prompts[0].device
        self.present = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        self.generated = torch.zeros(len(prompts), vocab_size, device=device)
        for row, prompt in enumerate(prompts):
            self.present[row, prompt] = True

    def add(self, tokens: Tensor) -> None:
        """Count one generated token per row, int64 `[B]`."""
        self.present.scatter_(1, tokens[:, None], True)
        self.generated.scatter_add_(1, tokens[:, None], torch.ones_like(self.generated[:, :1]))


def expand_seeds(seed: int | Sequence[int] | None, n_rows: int) -> list[int]:
    """Return one seed per row: `seed + row`, or the entries of a list.

    None draws fresh seeds. Raises TypeError for seeds that are not integers, ValueError for seeds
    outside [0, 2^63), or if the number of seeds differs from the number of rows.
    """
    if seed is None:
        seed = torch.Generator().seed() % 2**62
    if isinstance(seed, SupportsIndex):
        first = as_integer("seed", seed)
        seeds = [first + row for row in range(n_rows)]
    else:
        entries = seed if isinstance(seed, Iterable) else [seed]
        seeds = [as_integer("seed", entry) for entry in entries]
    if len(seeds) != n_rows:
        raise ValueError(f"{len(seeds)} seeds for {n_rows} rows: give one per row, or a single one")
    if wrong := [s for s in seeds if not 0 <= s < 2**63]:
        raise ValueError(f"a seed must be from 0 to 2^63 - 1, not {wrong[0]}")
    return seeds


def as_integer(name: str, value: Any) -> int:
    """Return an argument as an int; TypeError, with its name, unless it is an integer.

    Integers are Python's, including bool, and those of NumPy and PyTorch (one element).
    """
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def as_float(name: str, value: Any) -> float:
    """Return an argument as a float; TypeError, with its name, unless it is a number."""
    if not isinstance(value, SupportsFloat):  # a str is none
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def as_token_ids(ids: TokenIds) -> Tensor:
    """Return token ids as an int64 tensor; ValueError if they are not integers in equal rows."""
    try:
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"ids must be a tensor, an array or a list of rows of equal length ({error}); for "
            "prompts of different lengths: fastgpt.inference.generation.complete"
        ) from None
    other = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    if other and tensor.numel():  # an empty list becomes a float tensor
        raise ValueError(f"token ids must be integers, not {tensor.dtype}")
    return tensor.to(torch.int64)


def check_prompts(ids: TokenIds, vocab_size: int) -> Tensor:
    """Return ids `[B, T]`, T at least 1, as int64; ValueError unless the vocabulary has them."""
    ids = as_token_ids(ids)
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"ids must be [batch, tokens] with at least one token, not {list(ids.shape)}; "
            f"for one prompt: [tokenizer.encode(text)]"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    return ids


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Mask all logits except the `top_k` largest.

    Exactly `top_k` are kept, also if others equal the smallest of them.
    """
    kept = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Mask all tokens outside the smallest most likely set whose probability reaches `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    # the total probability of all tokens that are more likely: a token is kept while it is < top_p
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0].zero_()  # the most likely token is always kept
    ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)
