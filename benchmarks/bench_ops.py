"""Benchmark each operation of `fastgpt.ops`: every backend, plain PyTorch, the compiled reference.

"torch" is the best implementation with PyTorch's own operators: q, k and v split as in nanoGPT, a
contiguous cache that is exactly full, all logits at once. Results and gradients are checked against
the reference formulas in float64 before timing.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import (
    CHAR_RECIPE,
    DEVICES,
    backends,
    char_config,
    check_equal,
    compile_or_skip,
    measure,
)
from fastgpt import ops
from fastgpt.ops import reference

EPS = 1e-5


@dataclass(frozen=True)
class Size:
    """The sizes of a GPT-2 and of a batch, from which the shapes of each operation follow."""

    name: str
    batch: int
    time: int
    n_head: int
    n_embd: int
    vocab_size: int | None  # None: the packaged text's characters
    dtype: torch.dtype = torch.float32


CHAR = Size(
    "char",
    CHAR_RECIPE.batch_size,
    CHAR_RECIPE.block_size,
    CHAR_RECIPE.n_head,
    CHAR_RECIPE.n_embd,
    None,
)
GPT2 = Size("gpt2", batch=2, time=512, n_head=12, n_embd=768, vocab_size=50257)
GPT2_NARROW = replace(GPT2, name="gpt2-128-wide", time=384, n_head=2, n_embd=128)
GPT2_CUDA = replace(GPT2, batch=8, time=1024, dtype=torch.bfloat16)

OPERATIONS = (
    "layer_norm",
    "add_layer_norm",
    "causal_attention",
    "gelu",
    "linear_gelu",
    "linear_cross_entropy",
    "cached_attention",
)
COMPILED = ("add_layer_norm", "causal_attention", "linear_gelu", "linear_cross_entropy")


def sizes(operation: str, device: str) -> tuple[Size, ...]:
    if device == "cuda":
        found: tuple[Size, ...] = (GPT2_CUDA,)
    else:  # with a width of 768, one round of the head takes seconds on two cores
        found = (CHAR, GPT2_NARROW if operation == "linear_cross_entropy" else GPT2)
    if operation == "cached_attention":  # a single sequence, the most common case
        found = tuple(replace(size, batch=1) for size in found)
    return found


def cases() -> Iterator[Any]:
    """Yield (operation, size, direction, device, variant), the variants of a group in sequence."""
    for device in DEVICES:
        for operation in OPERATIONS:
            for size in sizes(operation, device):
                for direction in directions(operation):
                    for variant in variants(operation, size, direction, device):
                        case = (operation, size, direction, device, variant)
                        names = (part.name if isinstance(part, Size) else part for part in case)
                        yield pytest.param(*case, id="-".join(names))


def directions(operation: str) -> tuple[str, ...]:
    """Return the measured directions; cached attention is used without gradients only."""
    return ("forward",) if operation == "cached_attention" else ("forward", "forward+backward")


def variants(operation: str, size: Size, direction: str, device: str) -> tuple[str, ...]:
    """Return the implementations to measure.

    Compilation takes seconds per case, so only operations that a compiler can fuse are compiled.
    """
    compiled = operation in COMPILED and size is not CHAR and direction == "forward+backward"
    return (*backends(device), "torch", *(["compiled reference"] if compiled else []))


@pytest.mark.parametrize(("operation", "size", "direction", "device", "variant"), list(cases()))
def test_operation(
    benchmark: Any, operation: str, size: Size, direction: str, device: str, variant: str
) -> None:
    args, truth = inputs_and_truth(operation, size, device)
    function = implementation(operation, variant)
    args, run = args_for(function, args), RUNS[direction]
    if variant == "compiled reference":
        function = compile_or_skip(function, lambda compiled: run(compiled, args))
    results = run(function, args)
    check_equal(f"{operation} ({variant})", results, truth[: len(results)], size.dtype)
    measure(
        benchmark,
        lambda: run(function, args),
        group=f"{operation}, {size.name}, {direction}, {device}",
        variant=variant if variant == "torch" else f"fastgpt {variant}",
        baseline="torch",
        device=device,
        dtype=str(size.dtype).removeprefix("torch."),
        shapes=[list(arg.shape) for arg in args if isinstance(arg, Tensor)],
    )


def implementation(operation: str, variant: str) -> Callable[..., Any]:
    if variant == "torch":
        return STOCK[operation]
    backend: ModuleType = ops.get("reference" if variant == "compiled reference" else variant)
    return getattr(backend, operation)


@torch.no_grad()
def forward(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    outputs = function(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward_backward(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return outputs and gradients; the output gradient is the output itself, which is dense."""
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [output.detach() for output in outputs])
    return (*(output.detach() for output in outputs), *grads)


RUNS = {"forward": forward, "forward+backward": forward_backward}


@functools.lru_cache(maxsize=1)  # the cases of an operation at one size run in sequence
def inputs_and_truth(
    operation: str, size: Size, device: str
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Return the arguments of an operation and the outputs and gradients of the reference."""
    torch.manual_seed(0)
    args = placed(make_inputs(operation, size), device, size.dtype)
    return args, forward_backward(
        getattr(reference, operation), placed(args, device, torch.float64)
    )


def placed(args: tuple[Any, ...], device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return arguments on a device, with floating-point tensors as leaves in `dtype`."""
    return tuple(
        arg.detach().to(device, dtype).requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg.to(device)
        if isinstance(arg, Tensor)
        else arg
        for arg in args
    )


def make_inputs(operation: str, size: Size) -> tuple[Any, ...]:
    """Return the arguments of an operation, in fp32 on the CPU."""
    batch, time, width, n_head = size.batch, size.time, size.n_embd, size.n_head
    if operation == "causal_attention":
        return torch.randn(batch, time, 3 * width), n_head
    if operation == "gelu":
        return (torch.randn(batch, time, 4 * width),)
    if operation == "cached_attention":  # one new token per row; the cache is three quarters full
        q = torch.randn(batch, n_head, 1, width // n_head)
        k, v = torch.randn(2, batch, n_head, time, width // n_head)
        return q, k, v, torch.full((batch,), time * 3 // 4)
    x = torch.randn(batch, time, width)
    if operation == "linear_gelu":
        weight = torch.randn(4 * width, width) * width**-0.5
        return x, weight, 0.1 * torch.randn(4 * width)
    if operation == "linear_cross_entropy":
        vocab_size = size.vocab_size or char_config().vocab_size
        weight = 0.02 * torch.randn(vocab_size, width)
        return x, weight, torch.randint(vocab_size, (batch, time))
    weight, bias = 1.0 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)
    residual = (torch.randn_like(x),) if operation == "add_layer_norm" else ()
    return x, *residual, weight, bias, EPS


# --- each operation in plain PyTorch -----------------------------------------------------------


def stock_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def stock_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def stock_causal_attention(qkv: Tensor, n_head: int) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (n_head, -1)).transpose(1, 2)  # [B, H, T, D]
        for part in qkv.split(qkv.size(-1) // 3, dim=-1)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def stock_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def stock_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight).float()  # for bf16, as autocast does before this loss
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def args_for(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments that an implementation takes.

    For PyTorch's attention, the cache is cut to its filled part, as if it grew by concatenation.
    """
    if function is not STOCK["cached_attention"]:
        return args
    q, k, v, lengths = args
    filled = int(lengths.max())
    return q, k[:, :, :filled].contiguous(), v[:, :, :filled].contiguous()


STOCK: dict[str, Callable[..., Any]] = {
    "layer_norm": stock_layer_norm,
    "add_layer_norm": stock_add_layer_norm,
    "causal_attention": stock_causal_attention,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "linear_gelu": stock_linear_gelu,
    "linear_cross_entropy": stock_linear_cross_entropy,
    "cached_attention": F.scaled_dot_product_attention,
}
