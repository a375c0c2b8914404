"""Text generation on a CPU by the C++ decode loop in csrc/engine, without PyTorch's operators.

`Engine` generates what its PyTorch reference implementation, a `GPT`, generates: it uses the same
sliding window beyond the context, the same sampling, and the same random draws for a seed. In
``"float32"`` the text is the same except where logits differ by less than the rounding error; in
``"bfloat16"`` weights and inputs are rounded to bfloat16. `fastgpt.inference.quantization`
describes ``"int8"`` and ``"int4"``.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from fastgpt.inference import generation, quantization
from fastgpt.inference.generation import GenerationSettings
from fastgpt.inference.quantization import GROUP, Dtype, EngineWeights
from fastgpt.inference.sampling import Sampler, TokenIds, as_token_ids, check_prompts
from fastgpt.inference.session import GenerationRequest
from fastgpt.model import GPT
from fastgpt.utils.extension import _C

if TYPE_CHECKING:
    from fastgpt.interop import Which
    from fastgpt.tokenizer import BaseTokenizer

MOST = 2**62  # upper limit of max_new_tokens, so that token counts fit in 64 bits


class Engine:
    """A GPT-2 on a CPU that holds its own copy of a model's weights, rounded to `dtype`.

    Made by `from_model`, `from_pretrained` or `load`. threads: the number of threads (None: as many
    as PyTorch would use). Results are bitwise independent of it and of the other rows of a batch.
    instruction_set: ``"best"`` or one of `_C.engine_instruction_sets()`.

    Several Python threads may share an engine; it computes one step at a time.

    Raises: ValueError for non-finite weights.
    """

    def __init__(
        self, weights: EngineWeights, threads: int | None = None, *, instruction_set: str = "best"
    ) -> None:
        self.config, self.dtype, self.group = weights.config, weights.dtype, weights.group
        self.device = torch.device("cpu")
        threads = _resolve_threads(threads)
        self._core = _C.Engine(
            asdict(self.config), self.dtype, self.group, threads, instruction_set, weights.tensors
        )

    @classmethod
    def from_model(
        cls,
        model: GPT,
        dtype: Dtype = "float32",
        threads: int | None = None,
        *,
        group: int = GROUP,
        instruction_set: str = "best",
    ) -> "Engine":
        """Return an engine with a rounded copy of a model's weights.

        group: how many weights share a scale in ``"int4"``, 32 or 64.
        """
        tensors = {name: tensor.detach for name, tensor in model.state_dict().items()}
        threads = _resolve_threads(threads)
        weights = quantization.round_weights(model.config, tensors, dtype, group, threads)
        return cls(weights, threads, instruction_set=instruction_set)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: Dtype = "float32",
        threads: int | None = None,
        *,
        checkpoint: "Which" = "best",
        group: int = GROUP,
        instruction_set: str = "best",
    ) -> "tuple[Engine, BaseTokenizer]":
        """Return an engine and the tokenizer, loaded from any source that `fastgpt.load` opens.

        Weights are read and rounded one at a time, so the full-precision model is never held in
        memory.
        """
        from fastgpt.interop import open_weights  # only if needed: it imports all formats

        threads = _resolve_threads(threads)
        config, tensors, tokenizer = open_weights(source, checkpoint)
        read = {name: tensor.read for name, tensor in tensors.items()}
        weights = quantization.round_weights(config, read, dtype, group, threads)
        return cls(weights, threads, instruction_set=instruction_set), tokenizer

    @classmethod
    def load(
        cls, path: str | Path, threads: int | None = None, *, instruction_set: str = "best"
    ) -> "Engine":
        """Load an engine saved by `save`; raises QuantizationError if the file is invalid."""
        threads = _resolve_threads(threads)
        weights = quantization.load(Path(path))
        try:
            return cls(weights, threads, instruction_set=instruction_set)
        except ValueError as error:
            raise quantization.QuantizationError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Save the rounded weights to a new safetensors file, for `Engine.load`."""
        tensors: dict[str, quantization.Weight] = {}
        for name, shape in quantization.weight_shapes(self.config).items():
            if not quantization.is_matrix(name):
                vector = torch.from_numpy(self._core.vector(name))
                tensors[name] = vector[: math.prod(shape)].view(shape)
            elif isinstance(matrix := self._core.matrix(name), tuple):
                tensors[name] = quantization.as_tensors(
                    *matrix, quantization.bits(name, self.dtype)
                )
            else:
                tensors[name] = torch.from_numpy(matrix)
        weights = EngineWeights(self.config, self.dtype, self.group, tensors)
        quantization.save(Path(path), weights)

    @property
    def threads(self) -> int:
        """The number of threads used."""
        return self._core.threads

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights read per decoding step, which all rows of a batch share."""
        return self._core.bytes_per_token

    def prefill(self, ids: TokenIds) -> Tensor:
        """Return the next-token logits `[B, V]` (fp32) of each row of `ids` `[B, T]`."""
        return self.start_session(GenerationRequest(as_token_ids(ids), 1, Sampler(), 0)).prefill()

    def logits(self, ids: TokenIds) -> Tensor:
        """Return the logits `[B, T, V]` (fp32) at every position, as `GPT` does.

        ids: int64 `[B, T]`, T at most `block_size`.
        """
        ids = check_prompts(ids, self.config.vocab_size)
        rows = [torch.from_numpy(self._core.logits(row)) for row in ids.tolist()]
        return torch.stack(rows)

    def generate(
        self, ids: TokenIds, max_new_tokens: int, **settings: Unpack[GenerationSettings]
    ) -> Tensor:
        """Continue `ids` `[B, T]`; see `fastgpt.inference.generation.generate`."""
        return generation.generate(self, ids, max_new_tokens, **settings)

    def stream(
        self, ids: TokenIds, max_new_tokens: int, **settings: Unpack[GenerationSettings]
    ) -> Iterator[Tensor]:
        """Yield the new tokens of `ids`; see `fastgpt.inference.generation.stream`."""
        return generation.stream(self, ids, max_new_tokens, **settings)

    def start_session(self, request: GenerationRequest) -> "EngineSession":
        """Start a generation session; see `fastgpt.inference.session`."""
        return EngineSession(self._core, self.config.vocab_size, request)


class EngineSession:
    """The `fastgpt.inference.session.GenerationSession` of an engine."""

    def __init__(self, core: _C.Engine, vocab_size: int, request: GenerationRequest) -> None:
        if not request.use_cache:
            raise ValueError("an Engine always uses a cache: use_cache=False is for a GPT")
        sampler = {name: x for name, x in asdict(request.sampler).items() if x is not None}
        settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **sampler}
        settings["top_k"] = min(settings["top_k"], vocab_size)
        stop = request.stop_token
        self._vocab_size = vocab_size
        self._generation = core.generation(
            [prompt.tolist() for prompt in request.token_ids(vocab_size)],
            request.n,
            min(request.max_new_tokens, MOST),
            settings,
            request.seeds(),
            # an id outside the vocabulary never occurs, so it cannot end a row
            stop if stop is not None and 0 <= stop < vocab_size else None,
            request.with_logprobs,
        )

    def prefill(self) -> Tensor:
        """See `GenerationSession`. Rows that have ended are left out."""
        return torch.from_numpy(self._generation.read(self._vocab_size))

    def step(self) -> Tensor | None:
        """See `GenerationSession`; the session is done early if all rows have ended."""
        tokens = self._generation.step()
        return None if tokens is None else torch.tensor(tokens)

    def logprobs(self) -> Tensor:
        """See `GenerationSession`."""
        return torch.tensor(self._generation.logprobs())

    def end(self, row: int) -> None:
        """See `GenerationSession`. Nothing more is computed for the row."""
        self._generation.end(row)


def _resolve_threads(threads: int | None) -> int:
    """Return the number of threads to use; ValueError if it is out of range."""
    if threads is not None and not 1 <= threads <= _C.MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {_C.MOST_THREADS}, not {threads}")
    return threads or torch.get_num_threads()
