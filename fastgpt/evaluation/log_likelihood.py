"""How well a model predicts: the log-probability of tokens, given those before them.

A text longer than the model's context is read through a window that slides. With a context of C
tokens and a stride of S, window k reads the tokens from k·S on, C of them, and predicts the one
behind each. The first window scores all its predictions, a later one the last S, those that the
window before it did not reach. So each token is scored once, the first C from all that stands
before them, any other from C - S + 1 tokens at least and C at most. (As in "Perplexity of
fixed-length models", https://huggingface.co/docs/transformers/perplexity.)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastgpt.data.token_files import Ids, ShardedIds
from fastgpt.model import GPT

Tokens: TypeAlias = Sequence[int] | Ids | ShardedIds | Tensor
Advance: TypeAlias = Callable[[int], None]  # is told how many more were scored
Item = TypeVar("Item")

MAX_LOGITS = 2**25  # held at once: 128 MB in fp32


@dataclass(frozen=True)
class Scores:
    """What a model makes of a text: `nats` is the sum of -ln p over the `n_tokens` scored.

    n_bytes: the UTF-8 bytes of the text that these tokens stand for, where that is known.
    """

    nats: float
    n_tokens: int
    n_bytes: int | None = None
    seconds: float = math.nan

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`: among how many equally likely tokens the model might as well choose."""
        return math.exp(self.loss) if self.loss < 709 else math.inf  # e^709 is the largest float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which tokenizers can be compared by; NaN if nobody counted."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def tokens_per_s(self) -> float:
        """How fast they were scored."""
        return self.n_tokens / self.seconds if self.seconds else math.inf


class Window(NamedTuple):
    """Tokens `start` to `stop` are read, and what stands behind `first` to `stop` is scored."""

    start: int
    first: int
    stop: int


class LogLikelihood(NamedTuple):
    """Of a continuation: ln p, and whether each token of it was the likeliest."""

    total: float
    greedy: bool


class _Row(NamedTuple):
    """Ids `[n]`, of which all but the last are read and the last `n_scored` are scored."""

    ids: NDArray[np.int64]
    n_scored: int


def perplexity(
    model: GPT,
    tokens: Tokens,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    start_token: int | None = None,
    advance: Advance = lambda n: None,
) -> Scores:
    """Score a row of token ids through a window that slides (see the module's text).

    tokens: ids `[n]`, in memory or mapped from files; context: tokens read at once, by default
    and at most the model's `block_size`; stride: by default half of it; batch_size: windows at
    once, which changes the speed only. start_token: read before the first token, so that this one
    is scored, too (GPT-2's texts begin behind an ``<|endoftext|>``). `advance` is told how many
    tokens were scored. Under `torch.autocast` products are in its dtype.

    Raises: ValueError for a window that cannot be, ids outside the vocabulary, nothing to score.
    """
    context, stride = check_window(model, context, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    shift = 0 if start_token is None else 1
    n_rows = len(tokens) + shift
    if n_rows < 2:
        raise ValueError(
            f"{len(tokens)} tokens leave nothing to score: each is scored from those before it"
        )
    nats, began = 0.0, time.perf_counter()
    with _measuring(model):
        for batch in _batches(windows(n_rows, context, stride), batch_size):
            rows = [_cut(tokens, window, start_token) for window in batch]
            n_scored = sum(row.n_scored for row in rows)
            nats += model.loss(*_last_hidden(model, rows)).item() * n_scored
            advance(n_scored)
    return Scores(nats, n_rows - 1, seconds=time.perf_counter() - began)


def check_window(model: GPT, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return context and stride, the defaults filled in; ValueError names the range."""
    limit = model.config.block_size
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise ValueError(f"context must be from 1 to {limit}, the model's own, not {context}")
    stride = (context + 1) // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to the context of {context}, not {stride}")
    return context, stride


def windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows over a row of tokens, by which each but the first is scored once."""
    start = first = 0
    while first < n_tokens - 1:
        stop = min(start + context, n_tokens - 1)
        yield Window(start, first, stop)
        start, first = start + stride, stop


def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    advance: Advance = lambda n: None,
) -> list[LogLikelihood]:
    """Return ln p of each continuation given its context, and whether a greedy choice makes it.

    pairs: ids of a context and of its continuation, neither empty. What does not fit the model's
    context is cut off at the left; a continuation that alone does not fit is scored half a context
    at a time. The head's product is in fp32, whatever `torch.autocast` says: of two likely tokens
    one must be the likeliest. `advance` is told how many pairs were scored.

    Raises: ValueError for an empty context or continuation, or ids outside the vocabulary.
    """
    size = model.config.block_size
    rows = [(i, row) for i, pair in enumerate(pairs) for row in _pieces(*pair, size)]
    rows.sort(key=lambda row: len(row[1].ids), reverse=True)  # those of a batch: of like lengths
    left = Counter(i for i, _ in rows)
    totals, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    with _measuring(model):
        for batch in _batches(rows, batch_size):
            found = _token_log_probs(model, [row for _, row in batch])
            for (i, _), (log_probs, likeliest) in zip(batch, found, strict=True):
                totals[i] += log_probs.sum()
                greedy[i] &= likeliest.all()
                left[i] -= 1
                advance(left[i] == 0)
    return [LogLikelihood(float(t), bool(g)) for t, g in zip(totals, greedy, strict=True)]


# --- helpers ---------------------------------------------------------------------------------


@contextmanager
def _measuring(model: GPT) -> Iterator[None]:
    """Have the model without dropout and gradients within the block, then as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _cut(tokens: Tokens, window: Window, start_token: int | None) -> _Row:
    """Return a window's ids, of a row that `start_token`, if there is one, stands before."""
    start, first, stop = window
    shift = 0 if start_token is None else 1
    ids = np.asarray(tokens[max(0, start - shift) : stop + 1 - shift], np.int64)
    if start_token is not None and start == 0:
        ids = np.concatenate([[start_token], ids])
    return _Row(ids, stop - first)


def _pieces(context: Sequence[int], continuation: Sequence[int], block_size: int) -> Iterator[_Row]:
    """Yield the rows that score a continuation: one, unless it is longer than the context."""
    if not len(context) or not len(continuation):
        raise ValueError("neither a context nor its continuation can be empty")
    ids = np.array([*context, *continuation], np.int64)
    most = len(continuation) if len(continuation) <= block_size else (block_size + 1) // 2
    for first in range(len(context), len(ids), most):
        stop = min(first + most, len(ids))
        yield _Row(ids[max(0, stop - 1 - block_size) : stop], stop - first)


def _last_hidden(model: GPT, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """Return the last hidden states `[N, C]` that predict what is scored, and that: `[N]`.

    Rows are filled up at their ends, which no position before can see.
    """
    longest = max(len(row.ids) for row in rows) - 1
    inputs = np.zeros((len(rows), longest), np.int64)
    places, targets = [], []
    for number, (ids, n_scored) in enumerate(rows):
        _check_ids(ids, model.config.vocab_size)
        last = len(ids) - 1
        inputs[number, :last] = ids[:-1]
        places.append(number * longest + np.arange(last - n_scored, last))
        targets.append(ids[-n_scored:])
    to = model.device
    hidden = model.hidden(torch.from_numpy(inputs).to(to)).flatten(0, 1)  # [B · T, C]
    scored = torch.from_numpy(np.concatenate(places)).to(to)
    return hidden[scored], torch.from_numpy(np.concatenate(targets)).to(to)


def _token_log_probs(
    model: GPT, rows: Sequence[_Row]
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return, for each row, ln p of each token that is scored and whether it was the likeliest."""
    hidden, targets = _last_hidden(model, rows)
    at_once = max(1, MAX_LOGITS // model.config.vocab_size)
    log_probs, likeliest = [], []
    with torch.autocast(model.device.type, enabled=False):
        head = _wide(model.head_weight)
        for part, target in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            logits = F.linear(_wide(part), head)
            log_probs.append(-F.cross_entropy(logits, target, reduction="none"))
            likeliest.append(logits.argmax(-1) == target)
    ends = np.cumsum([row.n_scored for row in rows])[:-1]
    by_row = np.split(torch.cat(log_probs).cpu().double().numpy(), ends)
    return list(zip(by_row, np.split(torch.cat(likeliest).cpu().numpy(), ends), strict=True))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
