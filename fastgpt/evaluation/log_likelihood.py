"""Perplexity and log-likelihoods: the log-probability of tokens given the preceding tokens.

A text longer than the model's context is evaluated with a sliding window. With a context of C
tokens and a stride of S, window k consists of C tokens starting at k·S, and predicts the token
after each of them. The first window scores all its predictions. A later window scores only the last
S, which the previous window did not cover. Each token is thus scored once: the first C given all
tokens before them, the others given at least C - S + 1 and at most C tokens. (See "Perplexity of
fixed-length models", https://huggingface.co/docs/transformers/perplexity.)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastgpt import ops
from fastgpt.data.token_files import Ids, ShardedIds
from fastgpt.inference.sampling import check_prompts
from fastgpt.model import GPT, eval_mode

Tokens: TypeAlias = Sequence[int] | Ids | ShardedIds | Tensor
Advance: TypeAlias = Callable[[int], None]  # progress callback: receives the number newly scored
Item = TypeVar("Item")


@dataclass(frozen=True)
class Scores:
    """The scores of a text: `nats` is the sum of -ln p over the `n_tokens` scored tokens.

    n_bytes: the number of UTF-8 bytes that these tokens encode, if known. seconds: the time taken.
    """

    nats: float
    n_tokens: int
    n_bytes: int | None = None
    seconds: float = math.nan

    @property
    def loss(self) -> float:
        """The mean loss in nats per token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """The perplexity per token, `exp(loss)`."""
        return math.exp(self.loss) if self.loss < 709 else math.inf  # e^709 is the largest float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable across tokenizers; NaN if `n_bytes` is unknown or 0."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def tokens_per_s(self) -> float:
        """The number of tokens scored per second."""
        return self.n_tokens / self.seconds if self.seconds else math.inf


class Window(NamedTuple):
    """The model reads tokens `start` to `stop`; the tokens after `first` to `stop` are scored."""

    start: int
    first: int
    stop: int


class LogLikelihood(NamedTuple):
    """The log-likelihood of a continuation, and whether greedy decoding would generate it."""

    total: float
    greedy: bool


class _Row(NamedTuple):
    """Token ids `[n]`: the model reads all except the last; the last `n_scored` are scored."""

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
    """Score a sequence of token ids with a sliding window (see the module docstring).

    tokens: ids `[n]`, in memory or mapped from files.
    context: tokens per window, by default and at most the model's `block_size`.
    stride: tokens by which the window moves, by default half the context.
    batch_size: windows per batch; affects the speed only.
    start_token: a token prepended to the sequence, so that its first token is scored too (in
    GPT-2's training data, texts follow an ``<|endoftext|>``).
    advance: a callback that receives the number of newly scored tokens.
    Under `torch.autocast`, products have its dtype.

    Raises: ValueError for an invalid window, ids outside the vocabulary, or nothing to score.
    """
    context, stride = check_window(model, context, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    shift = 0 if start_token is None else 1
    n_rows = len(tokens) + shift
    if n_rows < 2:
        raise ValueError(
            f"{len(tokens)} tokens leave nothing to score: a token is scored given those before it"
        )
    nats, began = 0.0, time.perf_counter()
    with eval_mode(model), torch.no_grad():
        for batch in _batches(windows(n_rows, context, stride), batch_size):
            rows = [_cut(tokens, window, start_token) for window in batch]
            n_scored = sum(row.n_scored for row in rows)
            nats += model.loss(*_last_hidden(model, rows)).item() * n_scored
            advance(n_scored)
    return Scores(nats, n_rows - 1, seconds=time.perf_counter() - began)


def check_window(model: GPT, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return context and stride with defaults filled in; ValueError if they are out of range."""
    limit = model.config.block_size
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise ValueError(f"context must be from 1 to the model's {limit}, not {context}")
    stride = (context + 1) // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to the context of {context}, not {stride}")
    return context, stride


def windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows over `n_tokens` tokens that score each token except the first once."""
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
    """Return the log-likelihood of each continuation given its context, and whether it is greedy.

    pairs: token ids of a context and of its continuation, neither empty. Contexts are truncated on
    the left to fit the model's context. A continuation longer than the model's context is scored
    half a context at a time.
    batch_size: sequences per batch.
    advance: a callback that receives the number of newly scored pairs.
    The head's product is computed in fp32 even under `torch.autocast`, because rounded logits can
    have ties for the most likely token.

    Raises: ValueError for an empty context or continuation, or ids outside the vocabulary.
    """
    size = model.config.block_size
    rows = [(i, row) for i, pair in enumerate(pairs) for row in _pieces(*pair, size)]
    rows.sort(key=lambda row: len(row[1].ids), reverse=True)  # similar lengths: little padding
    left = Counter(i for i, _ in rows)
    totals, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    with eval_mode(model), torch.no_grad():
        for batch in _batches(rows, batch_size):
            found = _token_log_probs(model, [row for _, row in batch])
            for (i, _), (log_probs, likeliest) in zip(batch, found, strict=True):
                totals[i] += log_probs.sum()
                greedy[i] &= likeliest.all()
                left[i] -= 1
                advance(left[i] == 0)
    return [LogLikelihood(float(t), bool(g)) for t, g in zip(totals, greedy, strict=True)]


# --- helpers ---------------------------------------------------------------------------------


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _cut(tokens: Tokens, window: Window, start_token: int | None) -> _Row:
    """Return the ids of a window over the tokens, with `start_token` prepended if there is one."""
    start, first, stop = window
    shift = 0 if start_token is None else 1
    ids = np.asarray(tokens[max(0, start - shift) : stop + 1 - shift], np.int64)
    if start_token is not None and start == 0:
        ids = np.concatenate([[start_token], ids])
    return _Row(ids, stop - first)


def _pieces(context: Sequence[int], continuation: Sequence[int], block_size: int) -> Iterator[_Row]:
    """Yield the rows that score a continuation: one, unless it exceeds the model's context."""
    if not len(context) or not len(continuation):
        raise ValueError("neither a context nor its continuation can be empty")
    ids = np.array([*context, *continuation], np.int64)
    most = len(continuation) if len(continuation) <= block_size else (block_size + 1) // 2
    for first in range(len(context), len(ids), most):
        stop = min(first + most, len(ids))
        yield _Row(ids[max(0, stop - 1 - block_size) : stop], stop - first)


def _last_hidden(model: GPT, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """Return the last hidden states `[N, C]` that predict the scored tokens, and those ids `[N]`.

    Rows are padded at the end, which does not affect earlier positions under causal attention.
    """
    longest = max(len(row.ids) for row in rows) - 1
    inputs = np.zeros((len(rows), longest), np.int64)
    places, targets = [], []
    for number, (ids, n_scored) in enumerate(rows):
        check_prompts(torch.from_numpy(ids)[None], model.config.vocab_size)
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
    """Return for each row ln p of each scored token, and whether it was the most likely token."""
    hidden, targets = _last_hidden(model, rows)
    at_once = max(1, ops.MAX_LOGITS // model.config.vocab_size)
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
