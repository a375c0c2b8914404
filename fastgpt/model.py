"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

This module defines the network only; checkpoints, training and kernels live elsewhere. Every
operation with a fast implementation is called through `fastgpt.ops`, so
`GPT(config, ops="reference")` is the same network computed with plain PyTorch formulas.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import ops as backends
from fastgpt.utils import checks

if TYPE_CHECKING:
    from fastgpt.inference.engine import Engine
    from fastgpt.inference.generation import GenerationSettings
    from fastgpt.inference.kv_cache import KVCache, StepCache
    from fastgpt.inference.quantization import Dtype
    from fastgpt.inference.sampling import TokenIds
    from fastgpt.inference.session import GenerationRequest, TorchSession
    from fastgpt.tokenizer import BaseTokenizer

_LARGEST_SIZE = 1 << 24  # far beyond any model; sizes of its tensors do not overflow 64 bits


@dataclass(frozen=True)
class GPTConfig:
    """Configuration of a GPT-2 model; the defaults are the released 124M model.

    `bias` adds a bias to every linear layer and LayerNorm; `tie_weights` makes the output head
    share the matrix of the token embedding. Values of a wrong type or range raise ValueError.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    tie_weights: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            checks.integer(name, getattr(self, name), least=1, most=_LARGEST_SIZE)
        for name in ("bias", "tie_weights"):
            checks.flag(name, getattr(self, name))
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, but {self.n_embd} is not a multiple of "
                f"{self.n_head}; the nearest that works is n_embd={_nearest_multiple(self)}"
            )
        if not 0.0 <= checks.number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not 0.0 <= checks.number("layer_norm_eps", self.layer_norm_eps) <= 1.0:
            raise ValueError(f"layer_norm_eps must be in [0, 1], not {self.layer_norm_eps}")


class GPT(nn.Module):
    """GPT-2: token and position embeddings, `n_layer` pre-norm blocks, a final norm and the head.

    `ops` names the backend (see `fastgpt.ops`): ``"auto"``, ``"triton"``, ``"native"`` or
    ``"reference"``. Weights are initialized as in GPT-2, independently of the backend. With
    `recompute` set, blocks are checkpointed: they save only their inputs and run again in the
    backward pass (Chen et al. 2016, arXiv:1604.06174), which takes less memory and a third more
    computation.
    """

    def __init__(self, config: GPTConfig, ops: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.use_ops(ops)
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config)
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if self.device.type != "meta":
            self._initialize()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str = "cpu", ops: str = "auto"
    ) -> "GPT":
        """Load a model from a run, another project's folder or file, or a Hugging Face Hub name.

        The model is in fp32 and in evaluation mode (call `train()` to continue training). See
        `fastgpt.interop` for the supported formats and the errors.
        """
        from fastgpt.interop import open_source  # a higher layer: imported on use

        return open_source(source).load_model(device, ops)

    def save_pretrained(self, folder: str | Path, tokenizer: "BaseTokenizer | None" = None) -> None:
        """Save the model to a folder that transformers' `AutoModelForCausalLM` loads.

        The loaded model computes equal logits. If a tokenizer is given, its files are saved too,
        for `AutoTokenizer`. Raises UsageError if the folder cannot be written or already holds a
        model.
        """
        from fastgpt.interop.hugging_face import write

        write(self, Path(folder), tokenizer)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100
    ) -> Tensor:
        """Return the logits `[B, T, vocab_size]` of `ids`, or the mean loss if `targets` are given.

        ids, targets: int64 `[B, T]`, T at most `block_size`. With targets the result is a scalar:
        the mean cross-entropy in nats over the targets that are not `ignore_index`. The full
        logits are then never materialized at once.
        """
        if targets is None:
            return self.logits(self.hidden(ids))
        ops, head = self._backend, self.head_weight
        if self.config.tie_weights:
            tokens, head = ops.tied_embedding(ids, head)
        else:
            tokens = self.wte(ids)
        loss: Tensor = ops.linear_cross_entropy(self._run(tokens), head, targets, ignore_index)
        return loss

    def hidden(self, ids: Tensor, cache: "KVCache | StepCache | None" = None) -> Tensor:
        """Return the last hidden states `[B, T, C]` of `ids` `[B, T]`, after the final norm.

        With a cache, `ids` continue the cached tokens, and their keys and values are appended to
        the cache.
        """
        return self._run(self.wte(ids), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., vocab_size]` of last hidden states `[..., C]`."""
        return F.linear(hidden, self.head_weight)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of last hidden states `[..., C]` against `targets` `[...]`.

        This is the loss that `forward` computes, for callers that need it at some positions only.
        """
        head = self.head_weight
        return self._backend.linear_cross_entropy(hidden, head, targets)  # type: ignore[no-any-return]

    def generate(
        self, ids: "TokenIds", max_new_tokens: int, **settings: "Unpack[GenerationSettings]"
    ) -> Tensor:
        """Continue `ids` `[B, T]` by sampling; see `fastgpt.inference.generation.generate`."""
        from fastgpt.inference.generation import generate  # a higher layer: imported on use

        return generate(self, ids, max_new_tokens, **settings)

    def start_session(self, request: "GenerationRequest") -> "TorchSession":
        """Start generating one token at a time; see `fastgpt.inference.session`."""
        from fastgpt.inference.session import TorchSession

        return TorchSession(self, request)

    def quantize(self, dtype: "Dtype" = "int8", threads: int | None = None) -> "Engine":
        """Return a CPU engine with a copy of the weights in `dtype`; the model is unchanged.

        dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``; see
        `fastgpt.inference.quantization`. threads: number of CPU threads (None: as many as PyTorch
        uses).
        """
        from fastgpt.inference.engine import Engine

        return Engine.from_model(self, dtype, threads)

    @torch.no_grad()
    def crop_vocabulary(self, size: int) -> None:
        """Truncate the vocabulary to `size` rows; a smaller vocabulary is left unchanged."""
        if size >= self.config.vocab_size:
            return
        self.config = replace(self.config, vocab_size=size)
        self.wte = _embedding(size, self.config.n_embd, self.wte.weight[:size])
        if not self.config.tie_weights:
            self.lm_head.weight = nn.Parameter(self.lm_head.weight[:size].clone())
            self.lm_head.out_features = size

    @torch.no_grad()
    def crop_context(self, size: int) -> None:
        """Truncate the position table to `size`; a shorter context is left unchanged."""
        if size < self.config.block_size:
            self.config = replace(self.config, block_size=size)
            self.wpe = _embedding(size, self.config.n_embd, self.wpe.weight[:size])

    def use_ops(self, name: str) -> "GPT":
        """Switch to another backend and return the model; the weights are unchanged."""
        self.ops = backends.check(name)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The weight `[vocab_size, C]` of the head: the token embedding's if they are tied."""
        return self.wte.weight if self.config.tie_weights else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.wte.weight.device

    def num_params(self, *, embeddings: bool = True) -> int:
        """Return the number of parameters.

        With ``embeddings=False`` the position table is not counted, as in nanoGPT.
        """
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - self.wpe.weight.numel()

    @property
    def _backend(self) -> ModuleType:
        width, n_head = self.config.n_embd, self.config.n_head
        fit = backends.kernels_fit(width, n_head, self.wte.weight.dtype)
        return backends.get(self.ops, self.device, fit)

    def _run(self, tokens: Tensor, cache: "KVCache | StepCache | None" = None) -> Tensor:
        """Return the last hidden states of token embeddings, both `[B, T, C]`."""
        ops = self._backend
        positions = self.wpe(self._positions(tokens.size(1), cache))
        x = F.dropout(tokens + positions, self.config.dropout, self.training)
        residual = None
        for layer, block in enumerate(self.h):
            if self.recompute and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, ops, use_reentrant=False)
            else:
                x, residual = block(x, residual, ops, cache and cache.layer(layer))
        return self.ln_f(x, residual, ops)[0]  # type: ignore[no-any-return]

    def _positions(self, time: int, cache: "KVCache | StepCache | None") -> Tensor:
        """Return the positions of the new tokens: `[T]`, or with a cache `[B, T]`, after its own.

        Advances the cache. Raises ValueError if the tokens exceed the model's context.
        """
        limit = self.config.block_size
        steps = torch.arange(time, device=self.device)
        if cache is None:
            if time > limit:
                raise ValueError(
                    f"{time} tokens are more than the model's context of {limit} (block_size); "
                    f"pass at most {limit} at once"
                )
            return steps
        return cache.advance(time)[:, None] + steps

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialize every matrix from N(0, 0.02), residual projections with a smaller deviation.

        2 · n_layer sub-layers add to the residual stream; scaling each of their projections by
        1/√(2 · n_layer) keeps its variance at initialization independent of the depth (section 2.3
        of the paper).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)  # LayerNorm weights
            else:
                writes = name.endswith("c_proj.weight")
                scale = 1.0 / math.sqrt(2 * self.config.n_layer) if writes else 1.0
                parameter.normal_(0.0, 0.02 * scale)


@contextmanager
def eval_mode(model: GPT) -> Iterator[None]:
    """Switch the model to evaluation mode, and restore its previous mode on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def meta_model(config: GPTConfig, ops: str = "auto") -> GPT:
    """Return a model on the meta device: weights with shapes but no memory, to be assigned."""
    with torch.device("meta"):
        return GPT(config, ops)


def meta_weights(config: GPTConfig) -> dict[str, Tensor]:
    """Return the weights of a meta model by name, in the order of its `state_dict`.

    Only one layer is built and its weights are repeated under the names of all layers, because
    building the largest model takes a quarter of a second.
    """
    one = meta_model(replace(config, n_layer=1)).state_dict()
    layer = {name: weight for name, weight in one.items() if name.startswith("h.0.")}
    layers = {
        name.replace("h.0.", f"h.{i}.", 1): weight
        for i in range(config.n_layer)
        for name, weight in layer.items()
    }
    weights: dict[str, Tensor] = {}
    for name, weight in one.items():
        weights |= layers if name in layer else {name: weight}
    return weights


class Block(nn.Module):
    """One pre-norm transformer block: attention, then the MLP.

    The residual stream is passed as a pair: `residual`, and `x`, the output of the last sub-layer
    that has not been added to it yet. Each addition thus happens in the norm that follows it, and a
    fused kernel does both in one pass. `residual` is None before the first block.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = Norm(config)
        self.attn = Attention(config)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, ops: ModuleType, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the block to `(x, residual)` and return the new pair, all `[B, T, C]`."""
        x, residual = self.attn(x, residual, self.ln_1, ops, cache)
        return self.mlp(x, residual, self.ln_2, ops)  # type: ignore[no-any-return]


class Norm(nn.Module):
    """LayerNorm, preceded by the addition of the residual.

    Blocks do not call it: they pass its weights to the operation that fuses the norm with the layer
    that follows it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor, residual: Tensor | None, ops: ModuleType) -> tuple[Tensor, Tensor]:
        """Return the norm of ``x + residual``, and the sum itself, both `[B, T, C]`."""
        total, normed = ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
        return normed, total


class Attention(nn.Module):
    """Multi-head causal self-attention with packed queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None, norm: Norm, ops: ModuleType, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Apply attention to the norm of ``x + residual``.

        With a cache, queries also attend to the cached keys and values. Returns the attention
        output and the sum ``x + residual``, both `[B, T, C]`.
        """
        total, qkv = ops.norm_linear(
            *(x, residual, norm.weight, norm.bias),
            *(self.c_attn.weight, self.c_attn.bias, norm.eps),
        )  # [B, T, C], [B, T, 3C]
        if cache is None:
            y = ops.causal_attention(qkv, self.n_head, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(qkv, self.n_head, ops)
        y = ops.linear(y, self.c_proj.weight, self.c_proj.bias)
        return F.dropout(y, self.dropout, self.training), total


class MLP(nn.Module):
    """The feed-forward network of a block: C to 4C, GELU, 4C to C."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None, norm: Norm, ops: ModuleType
    ) -> tuple[Tensor, Tensor]:
        """Apply the MLP to the norm of ``x + residual``, independently at each position.

        Returns the output of the MLP and the sum ``x + residual``, both `[B, T, C]`.
        """
        total, y = ops.norm_mlp(
            *(x, residual, norm.weight, norm.bias),
            *(self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, norm.eps),
        )
        return F.dropout(y, self.dropout, self.training), total


def _embedding(n_rows: int, width: int, rows: Tensor | None = None) -> nn.Embedding:
    """Return an embedding `[n_rows, width]` with a copy of `rows`, or uninitialized memory.

    Passing `_weight` skips PyTorch's own initialization, which `GPT._initialize` would overwrite
    (and which is slow on the meta device).
    """
    weight = torch.empty(n_rows, width) if rows is None else rows.detach().clone()
    return nn.Embedding(n_rows, width, _weight=weight)


def _nearest_multiple(config: GPTConfig) -> int:
    return max(1, round(config.n_embd / config.n_head)) * config.n_head
