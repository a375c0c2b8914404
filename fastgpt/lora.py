"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank matrices trained next to frozen weights.

A linear layer with the weight W `[out, in]` computes ``x W' + scale · (x A') B'``, where A is
`[rank, in]`, B is `[out, rank]` and W is frozen. B is initialized with zeros, so at the start the
model computes what it computed before. After training, the weights can be merged into
``W + scale · B A``, which gives a plain GPT.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.model import GPT, MLP, Attention, Block, GPTConfig, Norm
from fastgpt.utils import checks

Targets: TypeAlias = Literal["all", "attention", "mlp"]

A, B = "lora_a", "lora_b"  # names of the parameters added to a linear layer


@dataclass(frozen=True)
class Lora:
    """LoRA settings.

    rank: the rank of the matrices. alpha: their product is scaled by ``alpha / rank``. dropout: the
    dropout probability of their input. targets: the layers that are adapted. Values of a wrong type
    or range raise ValueError.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: Targets = "all"

    def __post_init__(self) -> None:
        checks.integer("rank", self.rank, least=1, most=1 << 24)
        if not math.isfinite(checks.number("alpha", self.alpha)):
            raise ValueError(f"alpha must be finite, not {self.alpha}")
        if not 0.0 <= checks.number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.targets not in get_args(Targets):
            raise ValueError(f"targets must be one of {get_args(Targets)}, not {self.targets!r}")

    @property
    def scale(self) -> float:
        """The factor of the product of the two matrices, ``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def of_attention(self) -> bool:
        """Whether the linear layers of attention are adapted."""
        return self.targets != "mlp"

    @property
    def of_mlp(self) -> bool:
        """Whether the linear layers of the MLPs are adapted."""
        return self.targets != "attention"

    def params_of_block(self, width: int) -> int:
        """Return the number of LoRA parameters in a block of the given width (`n_embd`)."""
        attention = (width + 3 * width) + (width + width)
        mlp = 2 * (width + 4 * width)
        return self.rank * (attention * self.of_attention + mlp * self.of_mlp)

    def n_params(self, config: GPTConfig) -> int:
        """Return the number of LoRA parameters in a model."""
        return config.n_layer * self.params_of_block(config.n_embd)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as stored in a checkpoint; `Lora(**values)` restores them."""
        return asdict(self)


def add_lora(model: GPT, lora: Lora) -> None:
    """Freeze a model and add trainable LoRA matrices to it, in place.

    The model's output does not change, because B is initialized with zeros. A is drawn from
    N(0, 1/in) with the CPU generator.
    """
    model.requires_grad_(False)
    for block in model.h:
        assert isinstance(block, Block)
        if lora.of_attention:
            block.attn = LoraAttention(block.attn, lora)
        if lora.of_mlp:
            block.mlp = LoraMLP(block.mlp, lora)


def merge_lora(tensors: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Merge the LoRA matrices in a model's tensors and return the weights of the plain model.

    Raises: ValueError if their rank is not that of the settings.
    """
    plain = dict(tensors)
    for layer in [name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}")]:
        a, b = plain.pop(f"{layer}.{A}"), plain.pop(f"{layer}.{B}")
        if (rank := a.size(0)) != lora.rank:
            raise ValueError(f"{layer} has matrices of rank {rank}, but lora.rank is {lora.rank}")
        product = b @ a
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + lora.scale * product
    return plain


class LoraAttention(Attention):
    """`Attention` with LoRA matrices in both linear layers."""

    def __init__(self, plain: Attention, lora: Lora) -> None:
        nn.Module.__init__(self)
        self.n_head, self.dropout, self.lora = plain.n_head, plain.dropout, lora
        self.c_attn = _with_matrices(plain.c_attn, lora)
        self.c_proj = _with_matrices(plain.c_proj, lora)

    def forward(
        self, x: Tensor, residual: Tensor | None, norm: Norm, ops: ModuleType, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """See `Attention`."""
        normed, total = norm(x, residual, ops)
        qkv = _cast(_linear(normed, self.c_attn, self, ops))  # [B, T, 3C]
        if cache is None:
            y = ops.causal_attention(qkv, self.n_head, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(qkv, self.n_head, ops)
        y = _linear(y, self.c_proj, self, ops)
        return F.dropout(y, self.dropout, self.training), total


class LoraMLP(MLP):
    """`MLP` with LoRA matrices in both linear layers."""

    def __init__(self, plain: MLP, lora: Lora) -> None:
        nn.Module.__init__(self)
        self.dropout, self.lora = plain.dropout, lora
        self.c_fc = _with_matrices(plain.c_fc, lora)
        self.c_proj = _with_matrices(plain.c_proj, lora)

    def forward(
        self, x: Tensor, residual: Tensor | None, norm: Norm, ops: ModuleType
    ) -> tuple[Tensor, Tensor]:
        """See `MLP`."""
        normed, total = norm(x, residual, ops)
        y = ops.gelu(_linear(normed, self.c_fc, self, ops))  # [B, T, 4C]
        y = _linear(y, self.c_proj, self, ops)
        return F.dropout(y, self.dropout, self.training), total


def _with_matrices(layer: nn.Linear, lora: Lora) -> nn.Linear:
    """Register the two LoRA matrices as parameters of a layer, and return the layer."""
    weight = layer.weight
    device = "meta" if weight.device.type == "meta" else "cpu"
    a = torch.randn(lora.rank, layer.in_features, device=device) * layer.in_features**-0.5
    b = torch.zeros(layer.out_features, lora.rank, device=device)
    for name, matrix in ((A, a), (B, b)):
        layer.register_parameter(name, nn.Parameter(matrix.to(weight.device, weight.dtype)))
    return layer


def _linear(
    x: Tensor, layer: nn.Linear, module: LoraAttention | LoraMLP, ops: ModuleType
) -> Tensor:
    """Apply a linear layer with its LoRA matrices to `x`: `[..., in]` to `[..., out]`."""
    x, lora = _cast(x), module.lora
    narrow = ops.linear(
        F.dropout(x, lora.dropout, module.training), layer.lora_a, None
    )  # [..., rank]
    added = ops.linear(_cast(narrow), layer.lora_b, None)
    y: Tensor = ops.linear(x, layer.weight, layer.bias) + lora.scale * added
    return y


def _cast(x: Tensor) -> Tensor:
    """Cast the input of a product to autocast's dtype, if autocast is on.

    Casting once here avoids a separate cast in each product that uses `x`. It also gives the C++
    CPU kernels the dtype that they require.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
