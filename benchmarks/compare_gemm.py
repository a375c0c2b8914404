"""Compare the matrix products of fastgpt, PyTorch and NumPy.

    python benchmarks/compare_gemm.py                      # in fp32
    python benchmarks/compare_gemm.py --dtype bfloat16     # on processors with bf16 instructions

The sizes are those of training: GPT-2 124M with 1024 tokens, its head with a chunk of 512, and the
shakespeare-char recipe with 768; for each linear layer, the forward product and the gradients of
the input and the weight. fastgpt and PyTorch alternate after a few products each, so that both are
affected by the same noise. NumPy (OpenBLAS) is shown for orientation and always computes in fp32.
In bf16, PyTorch's operands are bf16 already, while those of fastgpt are fp32 and are rounded while
they are packed, as in training: PyTorch's product does less work.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import interleaved, ratios, seconds
from fastgpt import _C

ROUND_FLOPS = 1e9  # smaller products are repeated within a round to amortize the cost of the timer


@dataclass(frozen=True)
class Options:
    """Compare matrix products."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the operands. Sums are fp32; only PyTorch's results are rounded to bf16."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads. NumPy uses its own number of threads."""
    rounds: int = 11
    """Rounds of each product."""
    peak: float | None = None
    """Peak of one core in GFLOP/s, to print shares of it: with AVX2, 32 times the clock in GHz."""
    only: str = ""
    """Measure only products whose name contains this."""


@dataclass(frozen=True)
class Product:
    """op(a) · op(b), [m, k] · [k, n]."""

    name: str
    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool


def main(options: Options) -> None:
    """Print a line for each product and number of threads."""
    sizes = f"{'product':<22}{'m':>6}{'n':>6}{'k':>6}"
    print(f"{sizes} threads  GFLOP/s: ours  torch  numpy   ours/torch")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for product in products():
            if options.only in product.name:
                print(line(product, threads, options))


def products() -> Iterator[Product]:
    """Yield the three products of each layer in training: y, dx and dW."""
    layers = [
        ("gpt2 c_attn", 1024, 768, 2304),
        ("gpt2 attn c_proj", 1024, 768, 768),
        ("gpt2 c_fc", 1024, 768, 3072),
        ("gpt2 mlp c_proj", 1024, 3072, 768),
        ("gpt2 head", 512, 768, 50257),
        ("char c_attn", 768, 128, 384),
        ("char attn c_proj", 768, 128, 128),
        ("char c_fc", 768, 128, 512),
        ("char mlp c_proj", 768, 512, 128),
        ("char head", 768, 128, 65),
    ]
    for name, tokens, inputs, outputs in layers:
        yield Product(name, tokens, outputs, inputs, False, True)
        yield Product(f"{name}, dx", tokens, inputs, outputs, False, False)
        yield Product(f"{name}, dW", outputs, inputs, tokens, True, False)


def line(product: Product, threads: int, options: Options) -> str:
    """Measure one product and return a line of the table."""
    flops = 2 * product.m * product.n * product.k
    repeats = max(1, round(ROUND_FLOPS / flops))
    works = implementations(product, threads, options.dtype)
    timed = {name: partial(seconds, work, repeats) for name, work in works.items()}
    # NumPy is measured separately, at the end: its threads spin for a while after a product.
    numpy = {"numpy": timed.pop("numpy")}
    times = interleaved(timed, options.rounds) | interleaved(numpy, options.rounds)
    speeds = {name: flops * repeats / median(found) / 1e9 for name, found in times.items()}
    share = f" ({speeds['ours'] / options.peak / threads:4.0%})" if options.peak else ""
    ratio = median(ratios(times["ours"], times["torch"]))
    return (
        f"{product.name:<22}{product.m:>6}{product.n:>6}{product.k:>6}{threads:>8} "
        f"{speeds['ours']:>14.1f}{share} {speeds['torch']:>6.1f} {speeds['numpy']:>6.1f} "
        f"{ratio:>12.2f}"
    )


def implementations(product: Product, threads: int, dtype: str) -> dict[str, Callable[[], object]]:
    """Return the products of fastgpt, PyTorch and NumPy, after checking that they agree."""
    a = torch.randn((product.k, product.m) if product.transpose_a else (product.m, product.k))
    b = torch.randn((product.n, product.k) if product.transpose_b else (product.k, product.n))
    left, right = a.T if product.transpose_a else a, b.T if product.transpose_b else b
    bf16, kind = dtype == "bfloat16", getattr(torch, dtype)
    left_cast, right_cast = left.to(kind), right.to(kind)
    out, torch_out, numpy_out = (
        torch.empty(product.m, product.n, dtype=dtype)
        for dtype in (torch.float32, kind, torch.float32)
    )
    settings = {"transpose_a": product.transpose_a, "transpose_b": product.transpose_b}
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: _C.gemm(a, b, out, threads=threads, bf16=bf16, **settings),
        "torch": lambda: torch.mm(left_cast, right_cast, out=torch_out),
        "numpy": lambda: np.matmul(left.numpy(), right.numpy(), out=numpy_out.numpy()),
    }
    for work in works.values():
        work()
    time.sleep(0.1)  # until NumPy's threads stop spinning
    near = {"rtol": 2e-2, "atol": 0.05 * product.k**0.5} if bf16 else {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(out, torch_out.float(), **near)
    torch.testing.assert_close(out, numpy_out, **near)
    return works


if __name__ == "__main__":
    main(tyro.cli(Options))
