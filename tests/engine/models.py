"""Small models whose choices show a wrong context, and what an engine is held against."""

import torch
from torch import Tensor

from fastgpt import _C, GPT, GPTConfig

CODES = _C.engine_codes()
DTYPES = ["float32", "bfloat16", "int8", "int4"]


def random_model(config: GPTConfig, seed: int = 1, std: float = 0.3) -> GPT:
    """Far from uniform, so that the likeliest token leads the next one clearly."""
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
    """Return what a product's inputs are rounded to, float64."""
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
