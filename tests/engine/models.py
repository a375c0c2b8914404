"""Small models for tests of the engine, and a reference of its rounding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import _C, GPT, GPTConfig
from fastgpt.inference.quantization import bits, dequantize, quantize
from fastgpt.ops.reference import merge_heads, split_heads

INSTRUCTION_SETS = _C.engine_instruction_sets()
DTYPES = ["float32", "bfloat16", "int8", "int4"]


def random_model(config: GPTConfig, seed: int = 1, std: float = 0.3) -> GPT:
    """Return a model far from uniform, so that the most likely token has a clear margin."""
    torch.manual_seed(seed)
    model = GPT(config, ops="native")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.eval()


def small_model(seed: int = 1) -> GPT:
    return random_model(GPTConfig(61, 16, 2, 2, 32), seed)


def prompt(batch: int = 2, time: int = 5, vocab_size: int = 61, seed: int = 3) -> Tensor:
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def round_inputs(x: Tensor, dtype: str, group: int) -> Tensor:
    """Return the rounded inputs of a product in float64."""
    if dtype == "float32":
        return x.double()
    if dtype == "bfloat16":
        return x.bfloat16().double()
    size = 64 if dtype == "int8" else group
    padded = torch.nn.functional.pad(x, (0, -x.size(-1) % size)).unflatten(-1, (-1, size))
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest would round twice
    whole = (padded * inverse).round().nan_to_num(0.0)
    return (whole.double() * (largest.double() / 127)).flatten(-2)[..., : x.size(-1)]


@torch.no_grad()
def emulated_logits(model: GPT, dtype: str, group: int, ids: Tensor) -> Tensor:
    """Return the logits `[B, T, V]` with the engine's rounding, but sums in float64."""

    def rounded(name: str) -> Tensor:
        weight = weights[name]
        if dtype in ("int8", "int4"):
            return dequantize(*quantize(weight, bits(name, dtype), group), weight.shape).double()
        return (weight.bfloat16() if dtype == "bfloat16" else weight).double()

    def linear(name: str, x: Tensor) -> Tensor:
        wide = bits(name, dtype) == 8 if dtype in ("int8", "int4") else False
        product = round_inputs(x, "int8" if wide else dtype, group) @ rounded(name).T
        return (product + weights.get(name.replace("weight", "bias"), 0.0)).float()

    def norm(name: str, x: Tensor) -> Tensor:
        bias = weights.get(f"{name}.bias")
        size, eps = (model.config.n_embd,), model.config.layer_norm_eps
        return F.layer_norm(x, size, weights[f"{name}.weight"], bias, eps)

    weights = model.state_dict()
    x = rounded("wte.weight").float()[ids] + weights["wpe.weight"][: ids.size(1)]
    for i in range(model.config.n_layer):
        qkv = linear(f"h.{i}.attn.c_attn.weight", norm(f"h.{i}.ln_1", x))
        q, k, v = split_heads(qkv, model.config.n_head)
        if dtype != "float32":  # the dtype of the key/value cache
            k, v = k.bfloat16().float(), v.bfloat16().float()
        y = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        x = x + linear(f"h.{i}.attn.c_proj.weight", merge_heads(y).float())
        inner = linear(f"h.{i}.mlp.c_fc.weight", norm(f"h.{i}.ln_2", x))
        x = x + linear(f"h.{i}.mlp.c_proj.weight", F.gelu(inner, approximate="tanh"))
    head = "wte.weight" if model.config.tie_weights else "lm_head.weight"
    return linear(head, norm("ln_f", x))
