"""Writing with a model, in tokens: `generate` and `stream` for tensors, `complete` for prompts of
different lengths. `fastgpt.text_generation` does the same in text.

The model is a `GPT`, or the `Engine` made of one, which writes the same on a CPU and faster. Past
the context the window slides: see `fastgpt.kv_cache`. What a row writes depends on its prompt and
its seed, and not on what else is in the batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.engine import Engine
from fastgpt.kv_cache import Reader
from fastgpt.model import GPT
from fastgpt.sampling import Sampler, Sampling, TokenCounts, check_prompts, generators

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
    `frequency_penalty`; see `fastgpt.sampling.Sampler`.
    Wrong values raise ValueError naming the range.
    """
    tokens = stream(
        model,
        ids,
        max_new_tokens,
        n=n,
        seed=seed,
        stop_token=stop_token,
        use_cache=use_cache,
        **sampling,
    )
    return torch.cat([ids.repeat_interleave(n, 0), *(new[:, None] for new in tokens)], dim=1)


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
    check_prompts(ids, model.config.vocab_size)
    _check(model, n, use_cache)
    if isinstance(model, Engine):
        ids = ids.repeat_interleave(n, 0)
        return model.stream(ids, max_new_tokens, seed=seed, stop_token=stop_token, **sampling)
    writing = Writing(model, list(ids), max_new_tokens, Sampler(**sampling), seed, n, use_cache)
    return _stream(writing, stop_token, ids.device)


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
    while not all(completion.finish == "stop" for completion in completions):
        if (tokens := writing.step()) is None:
            break
        drawn = zip(completions, tokens.tolist(), writing.logprobs().tolist(), strict=True)
        for index, (completion, token, logprob) in enumerate(drawn):
            if completion.finish == "stop":
                continue
            if token not in stop_tokens:
                completion.ids.append(token)
                completion.logprobs.append(logprob)
            if token in stop_tokens or stop(index, token):
                completion.finish = "stop"
                writing.end(index)
    return [completions[first : first + n] for first in range(0, len(completions), n)]


class Writing:
    """The state of writing: what the rows hold, and what draws their next tokens.

    prompts: int64 `[T_i]` on the model's device, at least one token each; there are n rows for each
    of them, one after the other. Wrong values raise ValueError before anything is computed.
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
    ) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        rows = [prompt.to(model.device, torch.int64) for prompt in prompts for _ in range(n)]
        self.sampler, self.left = sampler, max_new_tokens
        self.generators = generators(seed, len(rows))
        self.lengths = [len(row) for row in rows]
        self.counts = TokenCounts(rows, model.config.vocab_size) if sampler.penalises else None
        self.reader = Reader(model, len(rows), use_cache, copies=n)
        self.history = pad_sequence(rows, batch_first=True)  # [R, T], with room for some more
        self.ends = torch.tensor(self.lengths, device=model.device)  # where the next tokens go

    @torch.no_grad()
    def step(self, ended: Tensor | None = None, filling: int = 0) -> Tensor | None:
        """Write one token to each row, int64 `[R]`; None if `max_new_tokens` are written.

        ended: rows, bool `[R]`, that get the token `filling`.
        """
        if not self.left:
            return None
        self.left -= 1
        self._logits = self.reader.logits(self.history, self.lengths)
        tokens = self.sampler.draw(self._logits, self.generators, self.counts)
        if ended is not None:
            tokens = tokens.masked_fill(ended, filling)
        if self.counts is not None:
            self.counts.add(tokens)
        if max(self.lengths) == self.history.size(1):
            self.history = F.pad(self.history, (0, max(ROOM, self.history.size(1))))
        self.history.scatter_(1, self.ends[:, None], tokens[:, None])
        self.ends = self.ends + 1
        self.lengths = [length + 1 for length in self.lengths]
        self._tokens = tokens
        return tokens

    def end(self, row: int) -> None:
        """Say that what is written to a row from now on is not wanted; it is computed anyway."""

    def logprobs(self) -> Tensor:
        """Return how likely the model itself found the last tokens: nats, fp32 `[R]`."""
        return self._logits.float().log_softmax(-1).gather(1, self._tokens[:, None])[:, 0]


def _stream(writing: Writing, stop_token: int | None, device: torch.device) -> Iterator[Tensor]:
    if stop_token is None:
        while (tokens := writing.step()) is not None:
            yield tokens.to(device)
        return
    ended = torch.zeros_like(writing.ends, dtype=torch.bool)
    while (tokens := writing.step(ended, stop_token)) is not None:
        ended = ended | (tokens == stop_token)
        yield tokens.to(device)
        if bool(ended.all()):
            return


def _check(model: GPT | Engine, n: int, use_cache: bool) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if isinstance(model, Engine) and not use_cache:
        raise ValueError("an Engine always keeps a cache: use_cache=False is for a GPT")
