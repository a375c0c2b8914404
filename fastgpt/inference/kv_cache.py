"""The key/value cache, and incremental evaluation with it: only new tokens are computed.

When prompt and new tokens exceed the model's context (`block_size` S), the window slides by half a
context at a time: the model then sees the last S/2 to S tokens, with positions starting from 0
again. As positions change, the cache must be refilled after each move; with strides of half a
context this happens once every S/2 tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.model import GPT, eval_mode
from fastgpt.ops.reference import merge_heads, split_heads


class KVCache:
    """The keys and values of the tokens processed so far, for every layer.

    Preallocated for `capacity` positions (the model's context unless given): two tensors
    `[n_layer, B, n_head, capacity, D]`. `lengths` is the number of filled positions of each row on
    the device, int64 `[B]`, and `host_lengths` is the same on the host. The tensor `lengths` is
    updated in place and never replaced, so CUDA graphs can refer to it.
    """

    def __init__(self, model: GPT, batch_size: int, capacity: int | None = None) -> None:
        config = model.config
        self.capacity = capacity or config.block_size
        shape = (config.n_layer, batch_size, config.n_head, self.capacity)
        head_dim = config.n_embd // config.n_head
        self.k = model.wte.weight.new_empty(*shape, head_dim)
        self.v = torch.empty_like(self.k)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=self.k.device)
        self.host_lengths = [0] * batch_size

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the number of filled positions of each row; the remaining positions are ignored."""
        self.host_lengths = list(lengths)
        self.lengths.copy_(torch.tensor(self.host_lengths))

    def advance(self, n_new: int) -> Tensor:
        """Reserve `n_new` positions; return the first new position of each row, int64 `[B]`.

        Raises: ValueError if they do not fit the capacity.
        """
        if (longest := max(self.host_lengths)) + n_new > self.capacity:
            raise ValueError(
                f"the cache holds {longest} of {self.capacity} positions: "
                f"{n_new} more do not fit; clear it and process the last part of the text again"
            )
        self.host_lengths = [length + n_new for length in self.host_lengths]
        return _advance(self.lengths, n_new)

    def layer(self, index: int) -> "LayerCache":
        """Return the cache of one layer."""
        end = self.host_lengths[0] if len(set(self.host_lengths)) == 1 else None
        return LayerCache(self.k[index], self.v[index], end, self.lengths)

    def copy_rows(self, source: "KVCache", source_rows: Sequence[int], rows: Sequence[int]) -> None:
        """Copy `source_rows` of a cache, possibly this one, to `rows`, with their lengths."""
        filled, lengths = max(source.host_lengths), list(self.host_lengths)
        to = torch.tensor(rows, device=self.k.device)
        of = torch.tensor(source_rows, device=self.k.device)
        self.k[:, to, :, :filled] = source.k[:, of, :, :filled]
        self.v[:, to, :, :filled] = source.v[:, of, :, :filled]
        for row, source_row in zip(rows, source_rows, strict=True):
            lengths[row] = source.host_lengths[source_row]
        self.set_lengths(lengths)


class StepCache:
    """The interface of a `KVCache` for a step that is captured in a CUDA graph and replayed.

    Row lengths are read and updated on the device only. The caller of the replay must update
    `host_lengths` and make sure that the capacity suffices.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def advance(self, n_new: int) -> Tensor:
        """See `KVCache.advance`."""
        return _advance(self.cache.lengths, n_new)

    def layer(self, index: int) -> "LayerCache":
        """Return the cache of one layer."""
        return LayerCache(self.cache.k[index], self.cache.v[index], None, self.cache.lengths)


def _advance(lengths: Tensor, n_new: int) -> Tensor:
    """Add `n_new` to the lengths `[B]` in place; return the previous lengths."""
    start = lengths.clone()
    lengths += n_new
    return start


@dataclass(frozen=True)
class LayerCache:
    """The keys and values `[B, H, S, D]` of one layer, with the newest positions reserved.

    end: the common length of all rows, if they are equal and the host knows it, else None.
    """

    k: Tensor
    v: Tensor
    end: int | None
    lengths: Tensor

    def attend(self, qkv: Tensor, n_head: int, ops: ModuleType) -> Tensor:
        """Store the keys and values of packed `qkv` `[B, T, 3C]`, then attend: `[B, T, C]`."""
        q, k, v = split_heads(qkv, n_head)
        if self.end is not None:
            new = slice(self.end - q.size(2), self.end)
            self.k[:, :, new] = k
            self.v[:, :, new] = v
        else:
            rows = torch.arange(q.size(0), device=q.device)[:, None]
            steps = torch.arange(q.size(2), device=q.device)
            positions = self.lengths[:, None] - q.size(2) + steps  # [B, T]
            self.k[rows, :, positions] = k.transpose(1, 2)
            self.v[rows, :, positions] = v.transpose(1, 2)
        return merge_heads(ops.cached_attention(q, self.k, self.v, self.lengths, self.end))


class IncrementalDecoder:
    """Computes the logits of the next token of each row, processing only new tokens.

    use_cache: if False, the whole window is processed each time, which is the reference
    implementation. copies: how many consecutive rows start with the same prompt, which is then
    processed once. capacity: the maximum length of a row, limited to the context.
    """

    def __init__(
        self,
        model: GPT,
        n_rows: int,
        use_cache: bool = True,
        copies: int = 1,
        capacity: int | None = None,
    ) -> None:
        self.model, self.copies = model, copies
        capacity = min(capacity or model.config.block_size, model.config.block_size)
        self.cache = KVCache(model, n_rows, capacity) if use_cache else None
        self.starts: list[int | None] = [None] * n_rows  # window start of each row in the cache

    @torch.no_grad()
    def logits(self, history: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the logits `[B, V]` after the first `lengths[b]` tokens of row b of `history`."""
        with eval_mode(self.model):
            return self.model.logits(self._last_hidden(history, lengths))

    def only_last_is_new(self, lengths: Sequence[int]) -> bool:
        """Return whether only the last token of each row is not cached: no window has moved."""
        return self.cache is not None and self._window_starts(lengths) == self.starts

    def increment_lengths(self) -> None:
        """Update the host's lengths after a step that processed a token per row by `StepCache`."""
        assert self.cache is not None
        self.cache.host_lengths = [length + 1 for length in self.cache.host_lengths]

    def _window_starts(self, lengths: Sequence[int]) -> list[int]:
        return [window_start(length, self.model.config.block_size) for length in lengths]

    def _last_hidden(self, history: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the hidden states `[B, C]` of each row's last token."""
        starts = self._window_starts(lengths)
        windows = [
            row[start:length] for row, start, length in zip(history, starts, lengths, strict=True)
        ]
        if self.cache is None:
            return _at_ends(self.model.hidden(pad_sequence(windows, batch_first=True)), windows)
        moved = [row for row, start in enumerate(starts) if start != self.starts[row]]
        self.starts = [*starts]
        if len(moved) == len(windows):
            return self._prefill_all(windows, self.cache)
        if moved:  # refill these rows up to their last token, which joins the common step below
            kept = enumerate(self.cache.host_lengths)
            self.cache.set_lengths([0 if row in moved else length for row, length in kept])
            if rows := [row for row in moved if len(windows[row]) > 1]:
                part, _ = self._prefill([windows[row][:-1] for row in rows])
                self.cache.copy_rows(part, range(len(rows)), rows)
        return self.model.hidden(_last(history, lengths), self.cache)[:, -1]

    def _prefill_all(self, windows: Sequence[Tensor], cache: KVCache) -> Tensor:
        """Fill the cache with every row's window; return the hidden states of the last tokens."""
        copies, self.copies = self.copies, 1  # the copies differ after the prompt
        if copies == 1 and len({len(window) for window in windows}) == 1:
            cache.set_lengths([0] * len(windows))
            return self.model.hidden(torch.stack(list(windows)), cache)[:, -1]
        part, hidden = self._prefill(windows[::copies])
        sources = [row // copies for row in range(len(windows))]
        cache.copy_rows(part, sources, range(len(windows)))
        return hidden[sources]

    def _prefill(self, windows: Sequence[Tensor]) -> tuple[KVCache, Tensor]:
        """Process windows of any lengths; return a new cache and the last hidden states."""
        longest = max(map(len, windows))
        cache = KVCache(self.model, len(windows), longest)
        hidden = self.model.hidden(pad_sequence(list(windows), batch_first=True), cache)
        cache.set_lengths([len(window) for window in windows])
        return cache, _at_ends(hidden, windows)


def window_start(length: int, block_size: int) -> int:
    """Return where the window over a text of `length` tokens starts (see the module docstring)."""
    stride = (block_size + 1) // 2
    return max(0, math.ceil((length - block_size) / stride) * stride)


def _last(history: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the last token `[B, 1]` of each row."""
    if len(set(lengths)) == 1:
        return history[:, lengths[0] - 1 : lengths[0]]
    return history.gather(1, torch.tensor(lengths, device=history.device)[:, None] - 1)


def _at_ends(hidden: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """Select the hidden states `[B, C]` at the ends of padded windows from `[B, T, C]`."""
    rows = torch.arange(len(windows), device=hidden.device)
    ends = torch.tensor([len(window) - 1 for window in windows], device=hidden.device)
    return hidden[rows, ends]
