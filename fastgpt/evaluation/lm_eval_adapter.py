"""Adapter of fastgpt models to EleutherAI's lm-evaluation-harness, as model type ``fastgpt``.

Importing this module registers the model type; the command `fastgpt.lm_eval` does so. The interface
is described in the harness's ``docs/model_guide.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lm_eval.models  # noqa: F401  # registers its own models, only while no other is registered
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fastgpt import interop
from fastgpt.evaluation.log_likelihood import log_likelihoods
from fastgpt.inference.text import stream_text
from fastgpt.utils.device import find_device
from fastgpt.utils.errors import UsageError
from fastgpt.utils.precision import choose_precision
from fastgpt.utils.progress import CountProgress

MAX_NEW_TOKENS = 256  # default if a task does not set it, as in the harness
BATCH_SIZE = 16  # for batch_size="auto"
Request = tuple[Any, list[int], list[int]]


@register_model("fastgpt")
class FastGPT(TemplateLM):
    """A model and its tokenizer with the interface of the harness.

    pretrained: any source that `fastgpt.interop.load` opens. dtype: precision of matrix products,
    float32, bfloat16 or float16. skip_unknown: drop characters that the tokenizer does not have.
    batch_size: number of sequences per batch, or "auto".
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        ops: str = "auto",
        skip_unknown: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}")
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # the default of the harness's command, also without a GPU
        self._device = find_device(device or "auto")
        (self._precision,) = choose_precision(dtype, self._device)
        self.model, self.gpt_tokenizer = interop.load(str(pretrained), self._device, ops)
        at_once = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = min(at_once, max_batch_size or at_once)
        self._errors: Literal["ignore", "strict"] = "ignore" if skip_unknown else "strict"

    @property
    def eot_token_id(self) -> int:
        """The id of <|endoftext|>, or the tokenizer's start token if it has none."""
        return self.gpt_tokenizer.start_token

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        """A fingerprint that identifies the tokenizer in the harness's caches."""
        return self.gpt_tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Return the token ids of a text; names of special tokens are encoded as ordinary text."""
        return self.gpt_tokenizer.encode(string, errors=self._errors)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, computed over the harness's rolling windows."""
        rows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                rows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._score(rows, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated continuation of each context, up to the task's stop strings."""
        texts = []
        with CountProgress("texts", len(requests), not disable_tqdm) as bar:
            for request in requests:
                context, settings = request.args
                texts.append(self._generate(context, dict(settings)))
                self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
                bar.advance(1)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        answers = self._score(requests, disable_tqdm)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _score(self, requests: Sequence[Request], quiet: bool) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with self._precision.autocast(), CountProgress("answers", len(pairs), not quiet) as bar:
            found = log_likelihoods(
                self.model, pairs, batch_size=self.batch_size, advance=bar.advance
            )
        return [(total, greedy) for total, greedy in found]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        """Continue one context, truncated on the left to leave room, as in the harness."""
        stop, max_new_tokens, sampling = _parse_settings(settings)
        ids = self.tok_encode(context)[-max(1, self.max_length - max_new_tokens) :]
        with self._precision.autocast():
            return "".join(
                stream_text(
                    self.model, self.gpt_tokenizer, ids, max_new_tokens, stop=stop, **sampling
                )
            )


def _parse_settings(settings: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Return the stop strings, the maximum length and the sampling of generation settings.

    Without ``do_sample``, decoding is greedy.
    """
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    length = next((settings[n] for n in names if settings.get(n) is not None), MAX_NEW_TOKENS)
    if not settings.get("do_sample"):
        return stop, int(length), {"temperature": 0.0}
    sampling = {name: settings.get(name) for name in ("top_k", "top_p")}
    return stop, int(length), {"temperature": float(settings.get("temperature", 1.0)), **sampling}
