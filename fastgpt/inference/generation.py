"""Token generation: `generate` and `stream` for tensors, `complete` for prompts of any lengths.

`fastgpt.inference.text` does the same for text.

The model is a `GPT`, or an `Engine` made from one, which generates the same tokens on a CPU, but
faster. Beyond the context the window slides; see `fastgpt.inference.kv_cache`. The result for a row
depends on its prompt and its seed, not on the other rows of the batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor

from fastgpt.inference.sampling import Sampler, Sampling, TokenIds, as_integer, as_token_ids
from fastgpt.inference.session import GenerationRequest, GenerationSession
from fastgpt.model import GPT

if TYPE_CHECKING:
    from fastgpt.inference.engine import Engine  # it imports this module


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


class GenerationSettings(Sampling, total=False):
    """The keyword arguments of `generate` and `stream`, in addition to those of `Sampler`.

    n: number of continuations of each row (default 1), in consecutive rows of the result; each
    prompt is processed once.
    seed: row i of the result draws from its own generator, seeded with `seed + i`, or with
    `seed[i]` of a list, independently of the rest of the batch; None (default) draws fresh seeds.
    stop_token: ends a row; the rest of the row is filled with it.
    use_cache: if False, the whole window is recomputed for each token, which is the reference
    implementation of the key/value cache (of a `GPT` only).
    """

    n: int
    seed: int | Sequence[int] | None
    stop_token: int | None
    use_cache: bool


def generate(
    model: "GPT | Engine",
    ids: TokenIds,
    max_new_tokens: int,
    **settings: Unpack[GenerationSettings],
) -> Tensor:
    """Continue each row of `ids` and return prompt and continuation, int64 `[B·n, T + new]`.

    model: a `GPT`, or an `Engine`.
    ids: integers `[B, T]`, T at least 1, as a tensor, an array or nested lists. It may be longer
    than the context: the window slides. The result is on the device of `ids`.
    settings: `n`, `seed`, `stop_token`, `use_cache`, see `GenerationSettings`; `temperature`,
    `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`, `frequency_penalty`, see
    `fastgpt.inference.sampling.Sampler`.

    Raises: ValueError for invalid arguments, with the valid range; TypeError for settings that are
        not numbers, or not integers.
    """
    ids = as_token_ids(ids)
    new = list(_stream(model, ids, max_new_tokens, **settings))
    prompts = ids.repeat_interleave(as_integer("n", settings.get("n", 1)), 0)
    return torch.cat([prompts, torch.stack(new, dim=1).to(ids.device)], dim=1) if new else prompts


def stream(
    model: "GPT | Engine",
    ids: TokenIds,
    max_new_tokens: int,
    **settings: Unpack[GenerationSettings],
) -> Iterator[Tensor]:
    """Yield the new tokens one position at a time, int64 `[B·n]`; arguments as for `generate`."""
    ids = as_token_ids(ids)
    steps = _stream(model, ids, max_new_tokens, **settings)
    return (tokens.to(ids.device) for tokens in steps)


def complete(
    model: "GPT | Engine",
    prompts: Sequence[TokenIds] | Tensor,
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
    sampler = Sampler(**sampling)
    request = GenerationRequest(
        prompts, max_new_tokens, sampler, seed, n, use_cache=use_cache, with_logprobs=True
    )
    if not len(prompts):
        return []
    n = request.n
    completions = [Completion() for _ in range(len(prompts) * n)]
    session = model.start_session(request)
    for _, (tokens, logprobs) in copy_to_host(_steps(session, with_logprobs=True)):
        sampled = zip(completions, tokens, logprobs, strict=True)
        for index, (completion, token, logprob) in enumerate(sampled):
            if completion.finish == "stop":
                continue
            if token not in stop_tokens:
                completion.ids.append(int(token))
                completion.logprobs.append(logprob)
            if token in stop_tokens or stop(index, int(token)):
                completion.finish = "stop"
                session.end(index)
        if all(completion.finish == "stop" for completion in completions):
            break
    return [completions[first : first + n] for first in range(0, len(completions), n)]


def copy_to_host(steps: Iterator[Tensor]) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield each tensor together with its values as a Python list.

    For a GPU, a tensor is yielded only after the next one has been requested from `steps`: the GPU
    computes one step ahead while the host processes the values. If the consumer stops, at most one
    step is wasted.
    """
    pending: tuple[Tensor, _AsyncCopy] | None = None
    for tensor in steps:
        copy = _AsyncCopy(tensor)
        if not tensor.is_cuda:
            yield tensor, copy.tolist()
            continue
        if pending is not None:
            yield pending[0], pending[1].tolist()
        pending = tensor, copy
    if pending is not None:
        yield pending[0], pending[1].tolist()


class _AsyncCopy:
    """An asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._event = tensor, None
        if tensor.is_cuda:  # on the current stream: after its computation, before the next step
            self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._values.tolist()
        return values


def _stream(
    model: "GPT | Engine",
    ids: Tensor,
    max_new_tokens: int,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    **sampling: Unpack[Sampling],
) -> Iterator[Tensor]:
    """Implement `stream`, with the tokens on the model's device.

    Arguments are checked here rather than at the first step, as this is not a generator.
    """
    sampler = Sampler(**sampling)
    request = GenerationRequest(ids, max_new_tokens, sampler, seed, n, stop_token, use_cache)
    steps = _steps(model.start_session(request))
    return steps if stop_token is None else _until_all_end(steps, stop_token)


def _steps(session: GenerationSession, with_logprobs: bool = False) -> Iterator[Tensor]:
    """Yield the tokens `[R]` of each step, or tokens and log-probabilities as one fp32 `[2, R]`.

    fp32 represents token ids exactly up to 2^24.
    """
    while (tokens := session.step()) is not None:
        yield torch.stack([tokens.float(), session.logprobs()]) if with_logprobs else tokens


def _until_all_end(steps: Iterator[Tensor], stop_token: int) -> Iterator[Tensor]:
    for tokens, values in copy_to_host(steps):
        yield tokens
        if all(token == stop_token for token in values):  # rows that have ended repeat it
            return
