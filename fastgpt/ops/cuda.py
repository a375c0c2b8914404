"""The backend of `ops="auto"` on CUDA: the Triton kernels, except where PyTorch is faster.

The exceptions were measured on an H200 (benchmarks/results/gpu-h200.md). `ops="triton"` always uses
the kernels.
"""

import torch
from torch import Tensor

from fastgpt.kernels.common import capability, uses_tf32
from fastgpt.ops import native, triton
from fastgpt.ops.triton import add_layer_norm as add_layer_norm
from fastgpt.ops.triton import cached_attention as cached_attention
from fastgpt.ops.triton import gelu as gelu
from fastgpt.ops.triton import layer_norm as layer_norm
from fastgpt.ops.triton import linear as linear
from fastgpt.ops.triton import linear_cross_entropy as linear_cross_entropy
from fastgpt.ops.triton import linear_gelu as linear_gelu
from fastgpt.ops.triton import norm_linear as norm_linear
from fastgpt.ops.triton import norm_mlp as norm_mlp
from fastgpt.ops.triton import tied_embedding as tied_embedding

LONG = 4096  # sequence length from which cuDNN's attention is faster on an H100 or H200


def causal_attention(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: int | None = None
) -> Tensor:
    """`reference.causal_attention`, using PyTorch for full fp32 and for very long sequences."""
    is_long = qkv.size(1) >= LONG
    if dropout_p == 0.0 and _pytorch_is_faster(qkv.dtype, is_long, qkv.device):
        return native.causal_attention(qkv, n_head)
    return triton.causal_attention(qkv, n_head, dropout_p, seed)


def _pytorch_is_faster(dtype: torch.dtype, is_long: bool, device: torch.device) -> bool:
    if dtype == torch.float32:
        return not uses_tf32()
    return is_long and capability(device) == 90


# torch.compile cannot trace these queries of the device, so it treats the result as a constant.
_pytorch_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]
