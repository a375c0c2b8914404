"""From logits to tokens: penalties, temperature, what is kept of the distribution, and the draw."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex, TypedDict

import torch
from torch import Tensor

COLDEST = 1e-30  # what is below is zero, or so near to it that fp32 cannot divide by it


class Sampling(TypedDict, total=False):
    """The settings of `Sampler`, which says what they mean."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


@dataclass(frozen=True)
class Sampler:
    """Turns logits into tokens; all off by default. In this order:

    repetition_penalty: the logits of tokens that the row holds already, its prompt's too, are
    divided by it where positive and multiplied where negative (Keskar et al. 2019,
    arXiv:1909.05858, section 4.1); 1 for none.
    frequency_penalty, presence_penalty: taken from the logit of a token that was written, so many
    times as it was, and once; prompts do not count. From -2 to 2, as in OpenAI's interface.
    temperature: divides the logits; 0 takes the likeliest token, and the rest says nothing.
    top_k: keep the k likeliest tokens (None or 0: all).
    top_p: keep the smallest set of likeliest tokens that holds this much probability, in (0, 1]
    (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: keep the tokens that are at least this share of the likeliest one's probability, in
    [0, 1] (Nguyen et al. 2024, arXiv:2407.01082).

    A value outside its range raises ValueError.
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
        if not 1e-9 <= self.repetition_penalty <= 1e9:  # fp32 can divide logits by it
            raise ValueError(
                f"repetition_penalty must be from 1e-9 to 1e9, not {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name} must be from -2 to 2, not {getattr(self, name)}")

    @property
    def penalises(self) -> bool:
        """Whether what a row holds changes what comes next."""
        return self.repetition_penalty != 1.0 or bool(
            self.presence_penalty or self.frequency_penalty
        )

    @property
    def draws(self) -> bool:
        """Whether it is chance that decides."""
        return self.temperature >= COLDEST

    def draw(
        self,
        logits: Tensor,
        uniform: Tensor,
        counts: "TokenCounts | None" = None,
    ) -> Tensor:
        """Draw one token per row of `logits` `[B, V]`: int64 `[B]`.

        uniform: fp32 `[B]` in [0, 1), a draw of each row, which temperature 0 does not look at.
        counts: what each row holds, if there are penalties. The host waits for nothing.
        """
        if counts is not None and self.penalises:
            logits = self._penalised(logits.float(), counts)
        if not self.draws:
            return logits.argmax(-1)
        # float64 keeps a running sum over 50,257 entries exact enough; MPS has none
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulative = self.probabilities(logits).to(wide).cumsum(-1)
        point = uniform[:, None].to(cumulative) * cumulative[:, -1:]
        # right=True: the first entry whose sum exceeds the point, so never one of probability 0
        drawn = torch.searchsorted(cumulative, point, right=True)[:, 0]
        return drawn.clamp(max=logits.size(-1) - 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities `[B, V]` (fp32) that `draw` draws from, for temperature > 0."""
        # subtracting the maximum first keeps a tiny temperature from overflowing
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k and self.top_k < logits.size(-1):
            logits = _keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1.0:
            logits = _keep_top_p(logits, self.top_p)
        if self.min_p:
            logits = logits.masked_fill(logits < math.log(self.min_p), -math.inf)
        return logits.softmax(-1)

    def _penalised(self, logits: Tensor, counts: "TokenCounts") -> Tensor:
        if (factor := self.repetition_penalty) != 1.0:
            repeated = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(counts.held, repeated, logits)
        logits = logits - self.frequency_penalty * counts.written
        return logits - self.presence_penalty * (counts.written > 0)


class Draws:
    """Random numbers for some rows, each from a generator of its own that is seeded with its seed.

    They are drawn on the CPU, where every machine draws the same, and many at a time, so that a GPU
    is not kept waiting for each.
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
    """What each of B rows holds: `held` (bool `[B, V]`), and `written` (fp32 `[B, V]`), how often
    each token was written since the prompt.
    """

    def __init__(self, prompts: Sequence[Tensor], vocab_size: int) -> None:
        device = prompts[0].device
        self.held = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        self.written = torch.zeros(len(prompts), vocab_size, device=device)
        for row, prompt in enumerate(prompts):
            self.held[row, prompt] = True

    def add(self, tokens: Tensor) -> None:
        """Note one more token `[B]` of each row."""
        self.held.scatter_(1, tokens[:, None], True)
        self.written.scatter_add_(1, tokens[:, None], torch.ones_like(self.written[:, :1]))


def seeds_of(seed: int | Sequence[int] | None, n_rows: int) -> list[int]:
    """Return a seed for each row: `seed + row`, or its entry of a list.

    None draws fresh seeds. ValueError for a wrong seed, or not as many as there are rows.
    """
    if seed is None:
        seed = torch.Generator().seed() % 2**62
    if isinstance(seed, SupportsIndex):  # NumPy's whole numbers, too
        seeds = [index(seed) + row for row in range(n_rows)]
    else:
        seeds = list(seed)
    if len(seeds) != n_rows:
        raise ValueError(f"{len(seeds)} seeds for {n_rows} rows: give one each, or one in all")
    if wrong := [s for s in seeds if not 0 <= s < 2**63]:
        raise ValueError(f"a seed must be from 0 to 2^63 - 1, not {wrong[0]}")
    return seeds


def check_prompts(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids are whole numbers `[B, T]`, T from 1, all in the vocabulary."""
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"ids must be [batch, tokens] with at least one token, not {list(ids.shape)}; "
            f"for one prompt: torch.tensor([tokenizer.encode(text)])"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be whole numbers, not {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Mask all but the `top_k` largest; of equal ones the first are kept."""
    kept = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Mask all but the smallest set of likeliest tokens whose probability reaches `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0].zero_()  # the likeliest token always stays
    ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)
