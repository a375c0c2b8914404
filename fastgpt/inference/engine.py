"""Text generation on a CPU without PyTorch: the decode loop of csrc/engine.

`Engine` generates what `fastgpt.inference.generation`, its PyTorch reference, generates: the same
window past the context, the same sampling, the same random draws for a seed. In ``"float32"`` the
text is the same except where logits differ by less than rounding; in ``"bfloat16"`` it is that of
weights and inputs rounded to it. `fastgpt.inference.quantization` describes ``"int8"`` and
``"int4"``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor

from fastgpt.inference import quantization
from fastgpt.inference.sampling import Sampler, Sampling, check_prompts, seeds_of
from fastgpt.model import GPT, GPTConfig
from fastgpt.utils.extension import _C

if TYPE_CHECKING:
    from fastgpt.interop import Which
    from fastgpt.tokenizer import BaseTokenizer

Dtype = Literal["float32", "bfloat16", "int8", "int4"]
Seed = int | Sequence[int] | None
MOST = 2**62  # tokens that can be counted


class Engine:
    """A GPT-2 on a CPU, with weights of its own: a copy of a model's, rounded to `dtype`.

    threads: how many compute (None: as many as PyTorch would use); their number changes no bit of
    the result, nor does what else is in a batch. group: how many weights share a scale in
    ``"int4"``, 32 or 64. code: the instructions to use, ``"best"`` or one of
    `_C.engine_codes()`. Several Python threads may use one engine: one step is computed at a time.
    Weights that are not finite raise ValueError.
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
        weights = quantization.Rounded(model.config, tensors, dtype, group, threads)
        self._start(model.config, dtype, group, threads, code, weights)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._core.threads

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that are read for each new token (of all rows together)."""
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
        """Return the engine of what `fastgpt.load` opens, and the tokenizer.

        Weights are read and rounded one at a time: no model is made that holds them all.
        """
        from fastgpt.interop import open_weights  # above this module: imported when used

        threads = _checked(threads)
        config, tensors, tokenizer = open_weights(source, checkpoint)
        read = {name: tensor.read for name, tensor in tensors.items()}
        weights = quantization.Rounded(config, read, dtype, group, threads)
        return cls._of(config, dtype, group, threads, code, weights), tokenizer

    def save(self, path: str | Path) -> None:
        """Write the weights as they are in here to a new safetensors file, for `Engine.load`."""
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
        """Read what `save` wrote; QuantizationError says what is wrong with the file."""
        threads = _checked(threads)
        config, dtype, group, weights = quantization.load(Path(path))
        try:
            return cls._of(config, dtype, group, threads, code, weights)
        except ValueError as error:
            raise quantization.QuantizationError(f"{path}: {error}") from None

    def prefill(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, V]` (fp32) of the token behind each row of `ids` `[B, T]`."""
        generation = self._generation(ids, 1, Sampler(), 0, None)
        return torch.from_numpy(generation.read(self.config.vocab_size))

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` (fp32) behind each token, as `GPT` does.

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
        on_tokens: is called with the new tokens of all rows, one position at a time; what it has
        returned true for is the last. Ctrl-C stops within a token.
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
        """Yield the new tokens one position at a time, int64 `[B·n]`; arguments as for `generate`,
        and n texts behind each row.
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
    ) -> "EngineWriting":
        """Begin to write n texts behind each of some prompts, of any lengths."""
        begun = self._begin(prompts, max_new_tokens, sampler, seed, None, n, with_logprobs=True)
        return EngineWriting(begun)

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
        # an id that no token has ends no row
        stop = stop_token if stop_token is not None and 0 <= stop_token < size else None
        max_new_tokens = min(max_new_tokens, MOST)
        ids, seeds = [prompt.tolist() for prompt in prompts], seeds_of(seed, len(prompts) * n)
        return self._core.generation(ids, n, max_new_tokens, settings, seeds, stop, with_logprobs)


class EngineWriting:
    """An engine's generation session; `fastgpt.inference.generation.Writing` is a model's."""

    def __init__(self, generation: _C.Generation) -> None:
        self._generation = generation

    def step(self) -> Tensor | None:
        """Write one token to each row, int64 `[R]`; None if all is written."""
        tokens = self._generation.step()
        return None if tokens is None else torch.tensor(tokens)

    def end(self, row: int) -> None:
        """Compute nothing more for a row."""
        self._generation.end(row)

    def logprobs(self) -> Tensor:
        """Return how likely the model itself found the last tokens: nats, fp32 `[R]`."""
        return torch.tensor(self._generation.logprobs())


def _steps(generation: _C.Generation, device: torch.device) -> Iterator[Tensor]:
    while (tokens := generation.step()) is not None:
        yield torch.tensor(tokens, dtype=torch.int64, device=device)


def _checked(threads: int | None) -> int:
    """Return how many threads to take."""
    if threads is not None and not 1 <= threads <= _C.MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {_C.MOST_THREADS}, not {threads}")
    return threads or torch.get_num_threads()
