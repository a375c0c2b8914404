"""Writing text with a model: sampling, the key/value cache, and the window that slides.

When prompt and new tokens outgrow the model's context (`block_size` S), the oldest tokens fall away
half a context at a time: the model then sees the last S/2 to S tokens, numbered from position 0
again. Moving in half-context strides means the cache is refilled once every S/2 tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastgpt.model import GPT
from fastgpt.ops.reference import merge_heads, split_heads


def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of `ids` and return prompt and continuation, int64 `[B, T + new]`.

    ids: int64 `[B, T]`, T from 1; longer than the context is allowed (see the module's text).
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens (None or 0: all).
    top_p: keep the smallest set of likeliest tokens that holds this much probability, in (0, 1]
    (Holtzman et al. 2020, arXiv:1904.09751).
    seed: row i draws from its own generator, seeded with `seed + i`, or with `seed[i]` of a list,
    whatever else is in the batch; None draws fresh seeds.
    stop_token: ends a row; a row that has ended is filled up with it.
    Wrong values raise ValueError naming the range.
    """
    tokens = stream(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token=stop_token,
        use_cache=use_cache,
    )
    return torch.cat([ids, *(new[:, None] for new in tokens)], dim=1)


def stream(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the new tokens one position at a time, int64 `[B]`; arguments as for `generate`."""
    _check_ids(ids, model.config.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    sampler = Sampler(temperature, top_k, top_p)
    generators = _generators(seed, ids.size(0))
    return _stream(model, ids, max_new_tokens, sampler, generators, stop_token, use_cache)


@torch.no_grad()
def _stream(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    sampler: "Sampler",
    generators: list[torch.Generator],
    stop_token: int | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    history = torch.empty(
        (ids.size(0), ids.size(1) + max_new_tokens), dtype=torch.int64, device=model.device
    )
    history[:, : ids.size(1)] = ids
    ended = torch.zeros(ids.size(0), dtype=torch.bool, device=model.device)
    reader = _Reader(model, ids.size(0), use_cache)
    for length in range(ids.size(1), history.size(1)):
        new = sampler.draw(reader.logits(history[:, :length]), generators)
        if stop_token is not None:
            new = new.masked_fill(ended, stop_token)
            ended |= new == stop_token
        history[:, length] = new
        yield new.to(ids.device)
        if stop_token is not None and bool(ended.all()):
            return


@dataclass(frozen=True)
class Sampler:
    """Turns logits into tokens: temperature, then top-k, then top-p, then a draw."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 1 (or 0: keep all), not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw one token per row of `logits` `[B, V]`: int64 `[B]`."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        # float64 keeps a running sum over 50,257 entries exact enough; MPS has none
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulative = self.probabilities(logits).to(wide).cumsum(-1)
        uniform = torch.stack([torch.rand((1,), generator=g) for g in generators])
        point = uniform.to(cumulative) * cumulative[:, -1:]
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
        return logits.softmax(-1)


class KVCache:
    """The keys and values of what a model has read so far, for every layer.

    Preallocated for `capacity` positions (the model's context unless given): two tensors
    `[n_layer, B, n_head, capacity, D]`. All rows hold the same number of positions, `length`.
    """

    def __init__(self, model: GPT, batch_size: int, capacity: int | None = None) -> None:
        config = model.config
        self.capacity = capacity or config.block_size
        shape = (config.n_layer, batch_size, config.n_head, self.capacity)
        head_dim = config.n_embd // config.n_head
        self.k = model.wte.weight.new_empty(*shape, head_dim)
        self.v = torch.empty_like(self.k)
        self.clear()

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0
        self.lengths = torch.zeros(self.k.size(1), dtype=torch.int64, device=self.k.device)

    def advance(self, n_new: int) -> Tensor:
        """Make room for `n_new` positions; return where they start in each row, int64 `[B]`."""
        if self.length + n_new > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} positions: "
                f"{n_new} more do not fit; clear it and read the last part of the text again"
            )
        start = self.lengths
        self.length += n_new
        self.lengths = start + n_new
        return start

    def layer(self, index: int) -> "LayerCache":
        """Return the part that belongs to one layer."""
        return LayerCache(self.k[index], self.v[index], self.length, self.lengths)


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values `[B, H, S, D]`, with room made for the newest positions."""

    k: Tensor
    v: Tensor
    length: int
    lengths: Tensor

    def attend(self, qkv: Tensor, n_head: int, ops: ModuleType) -> Tensor:
        """Add the keys and values of packed `qkv` `[B, T, 3C]`, then attend: `[B, T, C]`."""
        q, k, v = split_heads(qkv, n_head)
        new = slice(self.length - q.size(2), self.length)
        self.k[:, :, new] = k
        self.v[:, :, new] = v
        return merge_heads(ops.cached_attention(q, self.k, self.v, self.lengths))


class _Reader:
    """Gives the logits of the next token, reading only what is new when it keeps a cache."""

    def __init__(self, model: GPT, batch_size: int, use_cache: bool) -> None:
        self.model = model
        self.cache = KVCache(model, batch_size) if use_cache else None
        self.start = 0  # where in the history the window that the cache holds begins

    def logits(self, history: Tensor) -> Tensor:
        """Return the logits `[B, V]` of the token behind `history` `[B, T]`."""
        start = window_start(history.size(1), self.model.config.block_size)
        if self.cache is None:
            unread = history[:, start:]
        else:
            if start != self.start:
                self.cache.clear()
                self.start = start
            unread = history[:, start + self.cache.length :]
        training = self.model.training
        self.model.eval()
        try:
            return self.model.logits(self.model.hidden(unread, self.cache)[:, -1])
        finally:
            self.model.train(training)


def window_start(length: int, block_size: int) -> int:
    """Return where the visible part of a text of `length` tokens begins: see the module's text."""
    stride = (block_size + 1) // 2
    return max(0, math.ceil((length - block_size) / stride) * stride)


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Mask all but the `top_k` largest; of equal ones the first are kept."""
    kept = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Mask all but the smallest set of likeliest tokens whose probability reaches `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0  # the likeliest token always stays
    ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)


def _generators(seed: int | Sequence[int] | None, batch_size: int) -> list[torch.Generator]:
    if seed is None:
        seed = torch.Generator().seed() % 2**62
    seeds = [seed + row for row in range(batch_size)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch_size:
        raise ValueError(f"{len(seeds)} seeds for {batch_size} rows: give one each, or one in all")
    if wrong := [s for s in seeds if not 0 <= s < 2**63]:
        raise ValueError(f"a seed must be from 0 to 2^63 - 1, not {wrong[0]}")
    return [torch.Generator().manual_seed(s) for s in seeds]


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
