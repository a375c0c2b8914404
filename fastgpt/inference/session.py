"""Generation sessions: the state of a running generation, advanced by one token per step.

`GPT.start_session` and `Engine.start_session` start a session for a `GenerationRequest`. Both kinds
have the interface `GenerationSession`, on which `fastgpt.inference.generation` is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.inference.cuda_graph import GraphRunner, can_capture
from fastgpt.inference.kv_cache import IncrementalDecoder, StepCache
from fastgpt.inference.sampling import (
    RandomStreams,
    Sampler,
    TokenCounts,
    TokenIds,
    as_integer,
    as_token_ids,
    check_prompts,
    expand_seeds,
)
from fastgpt.model import GPT, eval_mode

ROOM = 128  # the token buffer grows by at least this many positions


@dataclass(frozen=True)
class GenerationRequest:
    """What a session generates: n continuations of each prompt, in consecutive rows.

    prompts: token ids `[T_i]`, at least one for each prompt, or `[B, T]`. seed: see `expand_seeds`.
    stop_token: ends a row, and fills the rest of it. use_cache: if False, the whole window is
    recomputed for each token (of a `GPT` only). with_logprobs: required for
    `GenerationSession.logprobs`.

    Raises: ValueError for invalid values, TypeError for those that are not integers, before
        anything is computed.
    """

    prompts: Sequence[TokenIds] | Tensor
    max_new_tokens: int
    sampler: Sampler
    seed: int | Sequence[int] | None = None
    n: int = 1
    stop_token: int | None = None
    use_cache: bool = True
    with_logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n", "stop_token"):
            if (value := getattr(self, name)) is not None or name != "stop_token":
                object.__setattr__(self, name, as_integer(name, value))  # self is frozen
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {self.max_new_tokens}")

    def token_ids(self, vocab_size: int) -> list[Tensor]:
        """Return each prompt, int64 `[T_i]`; ValueError unless the vocabulary has all its ids."""
        if isinstance(self.prompts, Tensor):  # of equal lengths: checked at once
            return list(check_prompts(self.prompts, vocab_size))
        rows = (as_token_ids(prompt)[None] for prompt in self.prompts)
        return [check_prompts(row, vocab_size)[0] for row in rows]

    def seeds(self) -> list[int]:
        """Return one seed per row."""
        return expand_seeds(self.seed, len(self.prompts) * self.n)


class GenerationSession(Protocol):
    """A running generation of R rows."""

    def prefill(self) -> Tensor:
        """Process all pending tokens; return the logits `[R, V]` of the next token of each row.

        `step` does this itself. Calling it again before the next step computes nothing.
        """

    def step(self) -> Tensor | None:
        """Generate one token for each row, int64 `[R]`; return None when the session is done."""

    def logprobs(self) -> Tensor:
        """Return the model's own log-probabilities of the last tokens in nats, fp32 `[R]`."""

    def end(self, row: int) -> None:
        """Stop generating a row; the tokens that `step` returns for it have no meaning."""


class TorchSession:
    """The `GenerationSession` of a `GPT`: tokens, key/value cache and sampling state of all rows.

    On a GPU, steps that process one token per row are replayed from a CUDA graph
    (`fastgpt.inference.cuda_graph`): their inputs are always in the same tensors, and they do not
    depend on decisions made by the host.
    """

    def __init__(self, model: GPT, request: GenerationRequest) -> None:
        device, sampler = model.device, request.sampler
        prompts = request.token_ids(model.config.vocab_size)
        rows = [prompt.to(device) for prompt in prompts for _ in range(request.n)]
        self.model, self.sampler, self.stop_token = model, sampler, request.stop_token
        self.steps_left = request.max_new_tokens
        self.lengths = [len(row) for row in rows]
        self.counts = TokenCounts(rows, model.config.vocab_size) if sampler.uses_penalties else None
        self.decoder = IncrementalDecoder(
            model,
            len(rows),
            request.use_cache,
            copies=request.n,
            capacity=max(self.lengths) + request.max_new_tokens,
        )
        self.history = pad_sequence(rows, batch_first=True)  # [R, capacity], grown as needed
        self.ends = torch.tensor(self.lengths, device=device)  # where the next tokens are put
        self._streams = RandomStreams(request.seeds(), device)
        self._uniform = torch.zeros(len(rows), device=device)
        self._tokens = torch.zeros_like(self.ends)  # the latest token of each row
        self._ended = torch.zeros_like(self.ends, dtype=torch.bool)
        self._prefilled: Tensor | None = None  # the logits of `prefill`, until a step uses them
        self._graph = GraphRunner[Tensor](device)
        self._uses_graph: bool | None = None  # set in the first step, when autocast is on or off

    def prefill(self) -> Tensor:
        """See `GenerationSession`."""
        if self._prefilled is None:
            self._prefilled = self.decoder.logits(self.history, self.lengths)
        return self._prefilled

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """See `GenerationSession`; the session is done after `max_new_tokens` tokens."""
        if not self.steps_left:
            return None
        self.steps_left -= 1
        if self.sampler.draws:
            self._uniform.copy_(self._streams.next())
        if self._uses_graph is None:
            self._uses_graph = self.decoder.cache is not None and can_capture(self.model)
        decodes = self._prefilled is None and self.decoder.only_last_is_new(self.lengths)
        if self._uses_graph and decodes:
            self._logits = self._graph(self._decode_step, self.steps_left)
            self.decoder.increment_lengths()
        else:
            logits = self.prefill()
            if logits.device.type == "cpu" and not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are not finite: its weights are damaged")
            self._logits = self._sample(logits)
        self._prefilled = None
        self._append_tokens()
        return self._tokens.clone()

    def logprobs(self) -> Tensor:
        """See `GenerationSession`."""
        return self._logits.float().log_softmax(-1).gather(1, self._tokens[:, None])[:, 0]

    def end(self, row: int) -> None:
        """See `GenerationSession`. The row is still computed with the others."""

    def _decode_step(self) -> Tensor:
        """Run the model on the last tokens and sample the next ones; return the logits `[R, V]`.

        This is the function that is captured in a CUDA graph.
        """
        assert self.decoder.cache is not None
        with eval_mode(self.model):
            hidden = self.model.hidden(self._tokens[:, None], StepCache(self.decoder.cache))
            return self._sample(self.model.logits(hidden[:, -1]))

    def _sample(self, logits: Tensor) -> Tensor:
        """Sample the next tokens from the logits `[R, V]`; return the logits."""
        tokens = self.sampler.draw(logits, self._uniform, self.counts)
        if self.stop_token is not None:
            tokens = tokens.masked_fill(self._ended, self.stop_token)
            self._ended |= tokens == self.stop_token
        if self.counts is not None:
            self.counts.add(tokens)
        self._tokens.copy_(tokens)  # in place: a captured step reads this tensor
        return logits

    def _append_tokens(self) -> None:
        if max(self.lengths) == self.history.size(1):
            self.history = F.pad(self.history, (0, max(ROOM, self.history.size(1))))
        self.history.scatter_(1, self.ends[:, None], self._tokens[:, None])
        self.ends += 1
        self.lengths = [length + 1 for length in self.lengths]
