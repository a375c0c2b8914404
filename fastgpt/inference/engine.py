"""Text generation on a CPU without PyTorch, by the C++ decode loop in csrc/engine.

`Engine` generates what its PyTorch reference implementation `fastgpt.inference.generation`
generates: it uses the same sliding window beyond the context, the same sampling, and the same
random draws for a seed. In ``"float32"`` the text is the same except where logits differ by less
than the rounding error; in ``"bfloat16"`` weights and inputs are rounded to bfloat16.
`fastgpt.inference.quantization` describes ``"int8"`` and ``"int4"``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor

from fastgpt.inference import quantization
from fastgpt.inference.sampling import Sampler, Sampling, check_prompts, expand_seeds
from fastgpt.model import GPT, GPTConfig
from fastgpt.utils.extension import _C

if TYPE_CHECKING:
    from fastgpt.interop import Which
    from fastgpt.tokenizer import BaseTokenizer

Dtype = Literal["float32", "bfloat16", "int8", "int4"]
Seed = int | Sequence[int] | None
MOST = 2**62  # upper limit of max_new_tokens, so that token counts fit in 64 bits


class Engine:
    """A GPT-2 on a CPU that holds its own copy of a model's weights, rounded to `dtype`.

    threads: the number of threads (None: as many as PyTorch would use). Results are bitwise
    independent of it and of the other rows of a batch. group: how many weights share a scale in
    ``"int4"``, 32 or 64. code: the instruction set to use, ``"best"`` or one of
    `_C.engine_codes()`.

    Several Python threads may share an engine; it computes one step at a time.

    Raises: ValueError for non-finite weights.
    """

    def __init__(
        self,
        model: GPT,
        dtype: Dtype = "float32",
        threads: int | None = None,
        *,
        group: int = quantization.GROUP,
        code: str = "best",
    ) -> None:
        threads = _checked(threads)
        tensors = {name: tensor.detach for name, tensor in model.state_dict().items()}
        weights = quantization.QuantizedWeights(model.config, tensors, dtype, group, threads)
        self._start(model.config, dtype, group, threads, code, weights)

    @property
    def threads(self) -> int:
        """The number of threads used."""
        return self._core.threads

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights read per decoding step, which all rows of a batch share."""
        return self._core.bytes_per_token

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: Dtype = "float32",
        threads: int | None = None,
        *,
        checkpoint: "Which" = "best",
        group: int = quantization.GROUP,
        code: str = "best",
    ) -> "tuple[Engine, BaseTokenizer]":
        """Return an engine and the tokenizer, loaded from any source that `fastgpt.load` opens.

        Weights are read and rounded one at a time, so the full-precision model is never held in
        memory.
        """
        from fastgpt.interop import open_weights  # a higher layer: imported on use

        threads = _checked(threads)
        config, tensors, tokenizer = open_weights(source, checkpoint)
        read = {name: tensor.read for name, tensor in tensors.items()}
        weights = quantization.QuantizedWeights(config, read, dtype, group, threads)
        return cls._of(config, dtype, group, threads, code, weights), tokenizer

    def save(self, path: str | Path) -> None:
        """Save the rounded weights to a new safetensors file, for `Engine.load`."""
        names = quantization.weight_names(self.config)
        weights: dict[str, quantization.Weight] = {}
        for name in names.matrices:
            found = self._core.matrix(name)
            weights[name] = (
                quantization.as_tensors(found, quantization.bits(name, self.dtype))
                if isinstance(found, tuple)
                else torch.from_numpy(found)
            )
        for name, shape in names.vectors.items():
            vector = torch.from_numpy(self._core.vector(name))
            weights[name] = vector[: math.prod(shape)].view(shape)
        quantization.save(Path(path), self.config, self.dtype, self.group, weights)

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None, *, code: str = "best") -> "Engine":
        """Load an engine saved by `save`; raises QuantizationError if the file is invalid."""
        threads = _checked(threads)
        config, dtype, group, weights = quantization.load(Path(path))
        try:
            return cls._of(config, dtype, group, threads, code, weights)
        except ValueError as error:
            raise quantization.QuantizationError(f"{path}: {error}") from None

    def prefill(self, ids: Tensor) -> Tensor:
        """Return the next-token logits `[B, V]` (fp32) of each row of `ids` `[B, T]`."""
        generation = self._generation(ids, 1, Sampler(), 0, None)
        return torch.from_numpy(generation.read(self.config.vocab_size))

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` (fp32) at every position, as `GPT` does.

        ids: int64 `[B, T]`, T at most `block_size`.
        """
        check_prompts(ids, self.config.vocab_size)
        rows = [torch.from_numpy(self._core.logits(row)) for row in ids.tolist()]
        return torch.stack(rows)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        seed: Seed = None,
        stop_token: int | None = None,
        on_tokens: Callable[[list[int]], bool | None] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Tensor:
        """Continue each row of `ids` and return prompt and continuation, int64 `[B, T + new]`.

        ids, seed, stop_token, sampling: as for `fastgpt.inference.generation.generate`.
        on_tokens: a callback that receives the new tokens of all rows, one position at a time;
        generation stops after the position for which it returns true. Ctrl-C stops generation
        within one token.
        """
        generation = self._generation(ids, max_new_tokens, Sampler(**sampling), seed, stop_token)
        new = torch.tensor(generation.run(on_tokens), dtype=torch.int64)
        return torch.cat([ids, new.view(-1, ids.size(0)).T.to(ids.device)], dim=1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        n: int = 1,
        seed: Seed = None,
        stop_token: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Iterator[Tensor]:
        """Yield the new tokens one position at a time, int64 `[B·n]`.

        n: the number of continuations of each row. The other arguments are those of `generate`.
        """
        generation = self._generation(ids, max_new_tokens, Sampler(**sampling), seed, stop_token, n)
        return _steps(generation, ids.device)

    def writing(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        sampler: Sampler,
        seed: Seed = None,
        n: int = 1,
    ) -> "EngineSession":
        """Start generating n continuations of each prompt; prompts may have different lengths."""
        begun = self._begin(prompts, max_new_tokens, sampler, seed, None, n, with_logprobs=True)
        return EngineSession(begun)

    @classmethod
    def _of(
        cls,
        config: GPTConfig,
        dtype: Dtype,
        group: int,
        threads: int,
        code: str,
        weights: quantization.Weights,
    ) -> "Engine":
        engine = cls.__new__(cls)
        engine._start(config, dtype, group, threads, code, weights)
        return engine

    def _start(
        self,
        config: GPTConfig,
        dtype: Dtype,
        group: int,
        threads: int,
        code: str,
        weights: quantization.Weights,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.group = group
        self._core = _C.Engine(asdict(config), dtype, group, threads, code, weights)

    def _generation(
        self,
        ids: Tensor,
        max_new_tokens: int,
        sampler: Sampler,
        seed: Seed,
        stop_token: int | None,
        n: int = 1,
    ) -> _C.Generation:
        check_prompts(ids, self.config.vocab_size)
        return self._begin(list(ids), max_new_tokens, sampler, seed, stop_token, n)

    def _begin(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        sampler: Sampler,
        seed: Seed,
        stop_token: int | None,
        n: int = 1,
        with_logprobs: bool = False,
    ) -> _C.Generation:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        settings = asdict(sampler)
        for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            settings[name] = default if settings[name] is None else settings[name]
        size = self.config.vocab_size
        settings["top_k"] = min(settings["top_k"], size)
        # an id outside the vocabulary never occurs, so it cannot end a row
        stop = stop_token if stop_token is not None and 0 <= stop_token < size else None
        max_new_tokens = min(max_new_tokens, MOST)
        ids, seeds = [prompt.tolist() for prompt in prompts], expand_seeds(seed, len(prompts) * n)
        return self._core.generation(ids, n, max_new_tokens, settings, seeds, stop, with_logprobs)


class EngineSession:
    """A generation session of an engine.

    Its interface is that of `fastgpt.inference.generation.GenerationSession`, the one of a `GPT`.
    """

    def __init__(self, generation: _C.Generation) -> None:
        self._generation = generation

    def step(self) -> Tensor | None:
        """Generate one token for each row, int64 `[R]`; return None when the session is done."""
        tokens = self._generation.step()
        return None if tokens is None else torch.tensor(tokens)

    def end(self, row: int) -> None:
        """Stop computing a row."""
        self._generation.end(row)

    def logprobs(self) -> Tensor:
        """Return the model's own log-probabilities of the last tokens in nats, fp32 `[R]`."""
        return torch.tensor(self._generation.logprobs())


def _steps(generation: _C.Generation, device: torch.device) -> Iterator[Tensor]:
    while (tokens := generation.step()) is not None:
        yield torch.tensor(tokens, dtype=torch.int64, device=device)


def _checked(threads: int | None) -> int:
    """Return the number of threads to use; ValueError if it is out of range."""
    if threads is not None and not 1 <= threads <= _C.MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {_C.MOST_THREADS}, not {threads}")
    return threads or torch.get_num_threads()
