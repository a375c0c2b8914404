"""Token generation: `generate` and `stream` for tensors, `complete` for prompts of any lengths.

`fastgpt.inference.text` does the same for text.

The model is a `GPT`, or an `Engine` made from one, which generates the same tokens on a CPU, but
faster. Beyond the context the window slides; see `fastgpt.inference.kv_cache`. The result for a row
depends on its prompt and its seed, not on the other rows of the batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.inference.cuda_graph import GraphRunner, can_capture
from fastgpt.inference.engine import Engine, EngineSession
from fastgpt.inference.kv_cache import Reader, StepCache, evaluating
from fastgpt.inference.sampling import (
    RandomStreams,
    Sampler,
    Sampling,
    TokenCounts,
    check_prompts,
    expand_seeds,
)
from fastgpt.model import GPT

ROOM = 128  # the token buffer grows by at least this many positions


@dataclass
class Completion:
    """The continuation of a prompt.

    ids: the new tokens, without the stop token that ended them. logprobs: the log-probability of
    each token in nats, according to the unmodified logits, before penalties, temperature and
    filters. finish: why generation ended.
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
    ids: int64 `[B, T]`, T at least 1. It may be longer than the context: the window slides.
    n: number of continuations of each row, in consecutive rows of the result; each prompt is
    processed once.
    seed: row i of the result draws from its own generator, seeded with `seed + i`, or with
    `seed[i]` of a list, independently of the rest of the batch; None draws fresh seeds.
    stop_token: ends a row; the rest of the row is filled with it.
    use_cache: if False, the whole window is recomputed for each token, which is the reference
    implementation of the key/value cache (of a `GPT` only).
    sampling: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`,
    `frequency_penalty`; see `fastgpt.inference.sampling.Sampler`.

    Raises: ValueError for invalid arguments, with the valid range.
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
    """Continue a batch of prompts of any lengths; return n completions for each.

    prompts: token ids, at least one per prompt.
    n: number of completions of each prompt. Completion j of prompt i has the row number
    `i · n + j`, in a list of seeds and for `stop`.
    stop_tokens: each of them ends a completion and is not part of it.
    stop: a function that is called with the row number and each new token of the row; the row ends
    with the token for which it returns True.
    The other arguments are those of `generate`.
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
        else GenerationSession(model, rows, max_new_tokens, sampler, seed, n, use_cache)
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


class GenerationSession:
    """A generation session: the tokens of all rows, the key/value cache and the sampling state.

    prompts: int64 `[T_i]`, at least one token each; each prompt has n consecutive rows.
    stop_token: ends a row, and fills the rest of it.

    Raises: ValueError for invalid arguments, before anything is computed.

    On a GPU, steps that process one token per row are replayed from a CUDA graph
    (`fastgpt.inference.cuda_graph`): their inputs are always in the same tensors, and they do not
    depend on decisions made by the host.
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
        self.counts = TokenCounts(rows, model.config.vocab_size) if sampler.uses_penalties else None
        longest = max(self.lengths) + max_new_tokens
        self.reader = Reader(model, len(rows), use_cache, copies=n, capacity=longest)
        self.history = pad_sequence(rows, batch_first=True)  # [R, capacity], grown as needed
        self.ends = torch.tensor(self.lengths, device=model.device)  # where the next tokens are put
        self._draws = RandomStreams(expand_seeds(seed, len(rows)), model.device)
        self._uniform = torch.zeros(len(rows), device=model.device)
        self._tokens = torch.zeros_like(self.ends)  # the latest token of each row
        self._ended = torch.zeros_like(self.ends, dtype=torch.bool)
        self._replayed = GraphRunner[Tensor](model.device)
        self._replays: bool | None = None  # set in the first step, when autocast is on or off

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Generate one token for each row, int64 `[R]`; None after `max_new_tokens` tokens."""
        if not self.left:
            return None
        self.left -= 1
        if self.sampler.draws:
            self._uniform.copy_(self._draws.next())
        if self._replays is None:
            self._replays = self.reader.cache is not None and can_capture(self.model)
        if self._replays and self.reader.only_last_is_new(self.lengths):
            self._logits = self._replayed(self._next, self.left)
            self.reader.increment_lengths()
        else:
            logits = self.reader.logits(self.history, self.lengths)
            if logits.device.type == "cpu" and not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are not finite: its weights are damaged")
            self._logits = self._choose(logits)
        self._keep_last()
        return self._tokens.clone()

    def _next(self) -> Tensor:
        """Run the model on the last tokens and choose the next ones; return the logits `[R, V]`.

        This is the function that is captured in a CUDA graph.
        """
        assert self.reader.cache is not None
        with evaluating(self.model):
            hidden = self.model.hidden(self._tokens[:, None], StepCache(self.reader.cache))
            return self._choose(self.model.logits(hidden[:, -1]))

    def _choose(self, logits: Tensor) -> Tensor:
        """Choose the next tokens from the logits `[R, V]`; return the logits."""
        tokens = self.sampler.draw(logits, self._uniform, self.counts)
        if self.stop_token is not None:
            tokens = tokens.masked_fill(self._ended, self.stop_token)
            self._ended |= tokens == self.stop_token
        if self.counts is not None:
            self.counts.add(tokens)
        self._tokens.copy_(tokens)  # in place: a captured step reads this tensor
        return logits

    def _keep_last(self) -> None:
        if max(self.lengths) == self.history.size(1):
            self.history = F.pad(self.history, (0, max(ROOM, self.history.size(1))))
        self.history.scatter_(1, self.ends[:, None], self._tokens[:, None])
        self.ends += 1
        self.lengths = [length + 1 for length in self.lengths]

    def end(self, row: int) -> None:
        """Mark a row as finished. A `GPT` keeps computing it; the caller ignores its tokens."""

    def logprobs(self) -> Tensor:
        """Return the model's own log-probabilities of the last tokens in nats, fp32 `[R]`."""
        return self._logits.float().log_softmax(-1).gather(1, self._tokens[:, None])[:, 0]


def arrivals(steps: Iterator[Tensor]) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield each tensor together with its values as a Python list.

    For a GPU, a tensor is yielded only after the next one has been requested from `steps`: the GPU
    computes one step ahead while the host processes the values. If the consumer stops, at most one
    step was computed in vain.
    """
    waiting: tuple[Tensor, _HostCopy] | None = None
    for tensor in steps:
        landing = _HostCopy(tensor)
        if not tensor.is_cuda:
            yield tensor, landing.numbers()
            continue
        if waiting is not None:
            yield waiting[0], waiting[1].numbers()
        waiting = tensor, landing
    if waiting is not None:
        yield waiting[0], waiting[1].numbers()


class _HostCopy:
    """An asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._arrived = tensor, None
        if tensor.is_cuda:  # on the current stream: after its computation, before the next step
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
    """Implement `stream`, with the tokens on the model's device.

    Arguments are checked here rather than at the first step, as this is not a generator.
    """
    check_prompts(ids, model.config.vocab_size)
    _check(model, n, use_cache)
    if isinstance(model, Engine):
        return model.stream(ids, max_new_tokens, n=n, seed=seed, stop_token=stop_token, **sampling)
    sampler = Sampler(**sampling)
    writing = GenerationSession(
        model, list(ids), max_new_tokens, sampler, seed, n, use_cache, stop_token
    )
    steps = _steps(writing)
    return steps if stop_token is None else _until_all_end(steps, stop_token)


def _steps(
    writing: "GenerationSession | EngineSession", with_logprobs: bool = False
) -> Iterator[Tensor]:
    """Yield the tokens `[R]` of each step, or tokens and log-probabilities as one fp32 `[2, R]`.

    fp32 represents token ids exactly up to 2^24.
    """
    while (tokens := writing.step()) is not None:
        yield torch.stack([tokens.float(), writing.logprobs()]) if with_logprobs else tokens


def _until_all_end(steps: Iterator[Tensor], stop_token: int) -> Iterator[Tensor]:
    for tokens, numbers in arrivals(steps):
        yield tokens
        if all(token == stop_token for token in numbers):  # rows that have ended repeat it
            return


def _check(model: GPT | Engine, n: int, use_cache: bool) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if isinstance(model, Engine) and not use_cache:
        raise ValueError("an Engine always uses a cache: use_cache=False is for a GPT")
