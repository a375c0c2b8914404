"""Writing with a model, in tokens: `generate` and `stream` for tensors, `complete` for prompts of
different lengths. `fastgpt.inference.text` does the same in text.

The model is a `GPT`, or the `Engine` made of one, which generates the same on a CPU, and faster.
Past the context the window slides: see `fastgpt.inference.kv_cache`. The result for a row depends
on its prompt and its seed, not on the other rows of the batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.inference.cuda_graph import Replayed, can_record
from fastgpt.inference.engine import Engine, EngineWriting
from fastgpt.inference.kv_cache import Reader, StepCache, evaluating
from fastgpt.inference.sampling import (
    Draws,
    Sampler,
    Sampling,
    TokenCounts,
    check_prompts,
    seeds_of,
)
from fastgpt.model import GPT

ROOM = 128  # tokens that a text grows by, at least


@dataclass
class Completion:
    """What was written behind a prompt.

    ids: the new tokens, without the one that ended them. logprobs: how likely each was, in nats,
    by the model itself: before penalties, temperature and the like. finish: why it ended.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["length", "stop"] = "length"


def generate(
    model: GPT | Engine,
    ids: Tensor,
    max_new_tokens: int,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """Continue each row of `ids` and return prompt and continuation, int64 `[B·n, T + new]`.

    model: a `GPT`, or an `Engine`.
    ids: int64 `[B, T]`, T from 1; longer than the context is allowed: the window slides.
    n: continuations of each row, one after the other; its prompt is read once.
    seed: row i of the result draws from its own generator, seeded with `seed + i`, or with
    `seed[i]` of a list, whatever else is in the batch; None draws fresh seeds.
    stop_token: ends a row; a row that has ended is filled up with it.
    use_cache: False reads the whole window for each token, the twin of the cache (of a `GPT`).
    sampling: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`,
    `frequency_penalty`; see `fastgpt.inference.sampling.Sampler`.
    Wrong values raise ValueError naming the range.
    """
    steps = _stream(model, ids, max_new_tokens, n, seed, stop_token, use_cache, sampling)
    new = [tokens[:, None] for tokens in steps]
    prompts = ids.repeat_interleave(n, 0)
    return torch.cat([prompts, torch.cat(new, dim=1).to(ids.device)], dim=1) if new else prompts


def stream(
    model: GPT | Engine,
    ids: Tensor,
    max_new_tokens: int,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    **sampling: Unpack[Sampling],
) -> Iterator[Tensor]:
    """Yield the new tokens one position at a time, int64 `[B·n]`; arguments as for `generate`."""
    steps = _stream(model, ids, max_new_tokens, n, seed, stop_token, use_cache, sampling)
    return (tokens.to(ids.device) for tokens in steps)


def complete(
    model: GPT | Engine,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    stop: Callable[[int, int], bool] = lambda row, token: False,
    use_cache: bool = True,
    **sampling: Unpack[Sampling],
) -> list[list[Completion]]:
    """Continue prompts of any lengths (token ids, from one) together; return n for each.

    Row `i · n + j` is completion j of prompt i: in a list of seeds, and for `stop`.
    stop_tokens: any of them ends a completion, and is not part of it.
    stop: is told the row and each new token of it; what it answers True to is the last one.
    The rest is as for `generate`.
    """
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    for row in rows:
        check_prompts(row[None] if row.dim() == 1 else row, model.config.vocab_size)
    _check(model, n, use_cache)
    if not rows:
        return []
    completions = [Completion() for _ in range(len(rows) * n)]
    sampler = Sampler(**sampling)
    writing = (
        model.writing(rows, max_new_tokens, sampler, seed, n)
        if isinstance(model, Engine)
        else Writing(model, rows, max_new_tokens, sampler, seed, n, use_cache)
    )
    for _, (tokens, logprobs) in arrivals(_steps(writing, with_logprobs=True)):
        drawn = zip(completions, tokens, logprobs, strict=True)
        for index, (completion, token, logprob) in enumerate(drawn):
            if completion.finish == "stop":
                continue
            if token not in stop_tokens:
                completion.ids.append(int(token))
                completion.logprobs.append(logprob)
            if token in stop_tokens or stop(index, int(token)):
                completion.finish = "stop"
                writing.end(index)
        if all(completion.finish == "stop" for completion in completions):
            break
    return [completions[first : first + n] for first in range(0, len(completions), n)]


class Writing:
    """The state of writing: what the rows hold, and what draws their next tokens.

    prompts: int64 `[T_i]` on the model's device, at least one token each; there are n rows for each
    of them, one after the other. stop_token: all that is written to a row behind it.
    Wrong values raise ValueError before anything is computed.

    On a GPU, steps that read one token are replayed from a CUDA graph
    (`fastgpt.inference.cuda_graph`): their inputs stay in the same tensors, and the host makes no
    decision in them.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        sampler: Sampler,
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        use_cache: bool = True,
        stop_token: int | None = None,
    ) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        rows = [prompt.to(model.device, torch.int64) for prompt in prompts for _ in range(n)]
        self.model, self.sampler, self.left = model, sampler, max_new_tokens
        self.stop_token = stop_token
        self.lengths = [len(row) for row in rows]
        self.counts = TokenCounts(rows, model.config.vocab_size) if sampler.penalises else None
        longest = max(self.lengths) + max_new_tokens
        self.reader = Reader(model, len(rows), use_cache, copies=n, capacity=longest)
        self.history = pad_sequence(rows, batch_first=True)  # [R, T], with room for some more
        self.ends = torch.tensor(self.lengths, device=model.device)  # where the next tokens go
        self._draws = Draws(seeds_of(seed, len(rows)), model.device)
        self._uniform = torch.zeros(len(rows), device=model.device)
        self._tokens = torch.zeros_like(self.ends)  # the last ones
        self._ended = torch.zeros_like(self.ends, dtype=torch.bool)
        self._replayed = Replayed[Tensor](model.device)
        self._replays: bool | None = None  # known at the first step: by then autocast is on or off

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Write one token to each row, int64 `[R]`; None if `max_new_tokens` are written."""
        if not self.left:
            return None
        self.left -= 1
        if self.sampler.draws:
            self._uniform.copy_(self._draws.next())
        if self._replays is None:
            self._replays = self.reader.cache is not None and can_record(self.model)
        if self._replays and self.reader.has_all_but_last(self.lengths):
            self._logits = self._replayed(self._next, self.left)
            self.reader.count_one_more()
        else:
            logits = self.reader.logits(self.history, self.lengths)
            if logits.device.type == "cpu" and not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are not finite: its weights are damaged")
            self._logits = self._choose(logits)
        self._keep_last()
        return self._tokens.clone()

    def _next(self) -> Tensor:
        """Read the last tokens and choose the next; return their logits `[R, V]`."""
        assert self.reader.cache is not None
        with evaluating(self.model):
            hidden = self.model.hidden(self._tokens[:, None], StepCache(self.reader.cache))
            return self._choose(self.model.logits(hidden[:, -1]))

    def _choose(self, logits: Tensor) -> Tensor:
        """Choose the next tokens by their logits `[R, V]`, which are returned."""
        tokens = self.sampler.draw(logits, self._uniform, self.counts)
        if self.stop_token is not None:
            tokens = tokens.masked_fill(self._ended, self.stop_token)
            self._ended |= tokens == self.stop_token
        if self.counts is not None:
            self.counts.add(tokens)
        self._tokens.copy_(tokens)
        return logits

    def _keep_last(self) -> None:
        if max(self.lengths) == self.history.size(1):
            self.history = F.pad(self.history, (0, max(ROOM, self.history.size(1))))
        self.history.scatter_(1, self.ends[:, None], self._tokens[:, None])
        self.ends += 1
        self.lengths = [length + 1 for length in self.lengths]

    def end(self, row: int) -> None:
        """Say that what is written to a row from now on is not wanted; it is computed anyway."""

    def logprobs(self) -> Tensor:
        """Return how likely the model itself found the last tokens: nats, fp32 `[R]`."""
        return self._logits.float().log_softmax(-1).gather(1, self._tokens[:, None])[:, 0]


def arrivals(steps: Iterator[Tensor]) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield tensors together with their numbers.

    A GPU's are given out when the next has been asked for: it computes while the host looks at
    them, and what is asked for in vain is one step.
    """
    waiting: tuple[Tensor, _Landing] | None = None
    for tensor in steps:
        landing = _Landing(tensor)
        if not tensor.is_cuda:
            yield tensor, landing.numbers()
            continue
        if waiting is not None:
            yield waiting[0], waiting[1].numbers()
        waiting = tensor, landing
    if waiting is not None:
        yield waiting[0], waiting[1].numbers()


class _Landing:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._arrived = tensor, None
        if tensor.is_cuda:  # queued behind what computes it, before what comes next
            self._there = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._there.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def numbers(self) -> list[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[Any] = self._there.tolist()
        return numbers


def _stream(
    model: GPT | Engine,
    ids: Tensor,
    max_new_tokens: int,
    n: int,
    seed: int | Sequence[int] | None,
    stop_token: int | None,
    use_cache: bool,
    sampling: Sampling,
) -> Iterator[Tensor]:
    """`stream`, with the tokens on the model's device. Wrong values raise at once."""
    check_prompts(ids, model.config.vocab_size)
    _check(model, n, use_cache)
    if isinstance(model, Engine):
        return model.stream(ids, max_new_tokens, n=n, seed=seed, stop_token=stop_token, **sampling)
    sampler = Sampler(**sampling)
    writing = Writing(model, list(ids), max_new_tokens, sampler, seed, n, use_cache, stop_token)
    steps = _steps(writing)
    return steps if stop_token is None else _until_all_end(steps, stop_token)


def _steps(writing: "Writing | EngineWriting", with_logprobs: bool = False) -> Iterator[Tensor]:
    """Yield each step's tokens `[R]`, or tokens and logprobs, fp32 `[2, R]` (exact to 2^24)."""
    while (tokens := writing.step()) is not None:
        yield torch.stack([tokens.float(), writing.logprobs()]) if with_logprobs else tokens


def _until_all_end(steps: Iterator[Tensor], stop_token: int) -> Iterator[Tensor]:
    for tokens, numbers in arrivals(steps):
        yield tokens
        if all(token == stop_token for token in numbers):  # a row that has ended repeats it
            return


def _check(model: GPT | Engine, n: int, use_cache: bool) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if isinstance(model, Engine) and not use_cache:
        raise ValueError("an Engine always keeps a cache: use_cache=False is for a GPT")
