"""Beam search: a deterministic search for the most likely continuations, instead of sampling.

Follows transformers' `generate` with `num_beams` and otherwise default settings; the tests compare
the two.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.inference.kv_cache import KVCache
from fastgpt.inference.sampling import TokenIds, as_integer, as_token_ids, check_prompts
from fastgpt.model import GPT, eval_mode


@dataclass(frozen=True)
class Beam:
    """A continuation found by beam search.

    ids: its tokens, including a stop token that ended it. score: its log-probability divided by its
    length to the power of `length_penalty`; a stop token counts in both.
    """

    ids: list[int]
    score: float


@torch.no_grad()
def beam_search(
    model: GPT,
    ids: TokenIds,
    max_new_tokens: int,
    *,
    n_beams: int = 4,
    length_penalty: float = 1.0,
    stop_token: int | None = None,
    n: int = 1,
) -> list[Beam]:
    """Return the n best continuations of one prompt `ids` `[T]` or `[1, T]`, best first.

    Each step keeps the `n_beams` most likely unfinished sequences. A sequence that `stop_token`
    ends is moved to the finished ones. The search ends when the best unfinished sequence scores no
    higher than the worst of `n_beams` finished ones, or after `max_new_tokens`.

    length_penalty: values above 0 favor longer sequences.

    Raises: ValueError for invalid arguments, or if prompt and new tokens exceed the context;
        TypeError for numbers that are not integers.
    """
    ids, max_new_tokens = as_token_ids(ids), as_integer("max_new_tokens", max_new_tokens)
    n_beams, n = as_integer("n_beams", n_beams), as_integer("n", n)
    _check(model, ids, max_new_tokens, n_beams, n)
    search = _Search(model, ids.reshape(-1), n_beams, length_penalty, stop_token)
    for step in range(1, max_new_tokens + 1):
        if search.step(step):
            break
    return search.best(max_new_tokens)[:n]


class _Search:
    def __init__(
        self, model: GPT, prompt: Tensor, n_beams: int, penalty: float, stop_token: int | None
    ) -> None:
        self.model, self.n_beams = model, n_beams
        self.penalty, self.stop_token = penalty, stop_token
        self.finished: list[Beam] = []
        self.texts: list[list[int]] = [[]] * n_beams
        # All beams start as the same prompt. Only the first has a finite score, so that the first
        # step takes n_beams different tokens from it instead of duplicates from every beam.
        self.scores = torch.tensor([0.0] + [-math.inf] * (n_beams - 1), device=model.device)
        self.cache = KVCache(model, n_beams)
        self.unread = prompt.to(model.device).expand(n_beams, -1)

    def step(self, length: int) -> bool:
        """Extend each sequence by one token, to `length` tokens; return whether to stop."""
        with eval_mode(self.model):
            logits = self.model.logits(self.model.hidden(self.unread, self.cache)[:, -1])
        scores = self.scores[:, None] + logits.float().log_softmax(-1)  # [beams, V]
        # Each beam has one stop token, so at most n_beams of the candidates end here, and at least
        # n_beams of 2 * n_beams continue.
        found = scores.reshape(-1).topk(min(2 * self.n_beams, scores.numel()))
        parents = (found.indices // scores.size(1)).tolist()
        tokens = (found.indices % scores.size(1)).tolist()
        return self._keep(list(zip(parents, tokens, found.values.tolist(), strict=True)), length)

    def best(self, length: int) -> list[Beam]:
        """Return the finished sequences and the unfinished ones of `length` tokens, best first."""
        running = [
            self._beam(text, score, len(text))
            for text, score in zip(self.texts, self.scores.tolist(), strict=True)
            if math.isfinite(score) and len(text) == length
        ]
        everything = self.finished + running
        return sorted(everything, key=lambda beam: -beam.score)

    def _keep(self, candidates: list[tuple[int, int, float]], length: int) -> bool:
        """Split candidates (beam, token, log-probability) into finished and unfinished sequences.

        Candidates are sorted, best first. A candidate may only finish if it is among the best
        `n_beams`. Returns whether the search is over.
        """
        running: list[tuple[int, int, float]] = []
        for rank, (parent, token, score) in enumerate(candidates):
            if token != self.stop_token:
                running.append((parent, token, score))
            elif rank < self.n_beams and math.isfinite(score):  # -inf: a duplicate of beam 0
                self.finished.append(self._beam([*self.texts[parent], token], score, length))
        running = running[: self.n_beams]
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.n_beams]
        self._update_beams(running)
        best = running[0][2] / length**self.penalty
        return len(self.finished) == self.n_beams and self.finished[-1].score >= best

    def _update_beams(self, running: list[tuple[int, int, float]]) -> None:
        """Make the unfinished sequences the beams, and reorder the key/value cache to match."""
        running += [(0, 0, -math.inf)] * (self.n_beams - len(running))  # if the vocabulary is tiny
        parents, tokens, scores = zip(*running, strict=True)
        device = self.model.device
        self.texts = [[*self.texts[p], t] for p, t in zip(parents, tokens, strict=True)]
        self.scores = torch.tensor(scores, device=device)
        self.unread = torch.tensor(tokens, device=device)[:, None]
        self.cache.copy_rows(self.cache, parents, range(self.n_beams))

    def _beam(self, ids: list[int], score: float, length: int) -> Beam:
        return Beam(ids, score / max(length, 1) ** self.penalty)


def _check(model: GPT, ids: Tensor, max_new_tokens: int, n_beams: int, n: int) -> None:
    check_prompts(ids[None] if ids.dim() == 1 else ids, model.config.vocab_size)
    if ids.dim() == 2 and ids.size(0) != 1:
        raise ValueError(
            f"beam search takes one prompt, not {ids.size(0)}: pass one row, such as ids[0]"
        )
    if not 1 <= n <= n_beams:
        raise ValueError(f"n must be from 1 to n_beams ({n_beams}), not {n}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    size, length = model.config.block_size, ids.size(-1)
    if length + max_new_tokens > size:
        raise ValueError(
            f"{length} prompt tokens and {max_new_tokens} new tokens exceed the model's context of "
            f"{size}, and beam search has no sliding window: shorten the prompt or lower "
            "max_new_tokens"
        )
