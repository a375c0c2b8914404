"""Errors and times of each operation on a GPU, for `gpu_report.py`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_ops import (
    GPT2_CUDA,
    OPERATIONS,
    RUNS,
    Size,
    args_for,
    directions,
    implementation,
    inputs_and_truth,
    make_inputs,
    placed,
)
from benchmarks.gpu_measure import COPY, PRODUCT, Bench, Report, one_line
from benchmarks.suite import relative_error
from fastgpt.kernels.attention import causal_attention_backward, causal_attention_forward
from fastgpt.ops import native

RESERVED_SECONDS = 200.0  # for the training step, which matters most


def check_operations(report: Report, bench: Bench) -> None:
    """Report the error of each implementation against float64, relative to the largest value.

    The kernels guarantee at most twice the error of plain PyTorch in the same precision.
    """
    for operation in OPERATIONS:
        size = replace(sizes(bench, operation)[0], batch=1)
        args, truth = inputs_and_truth(operation, size, bench.device.type)
        run = RUNS[directions(operation)[-1]]
        for name, function in implementations(operation, bench):
            row = {"operation": operation, "implementation": name}
            try:
                results = run(function, args_for(function, args))
            except Exception as error:  # an implementation that fails is a result; continue
                report.row("errors", **row, failed=one_line(error))
                continue
            pairs = zip(results, truth[: len(results)], strict=True)
            errors = [relative_error(*pair) for pair in pairs]
            each = [float(f"{error:.1e}") for error in errors]
            report.row("errors", **row, largest=max(errors), each=each)
        bench.free()


def time_operations(report: Report, bench: Bench) -> None:
    """Time each operation, forward and with its backward, for all implementations."""
    for operation in OPERATIONS:
        for size in sizes(bench, operation):
            torch.manual_seed(0)
            args = placed(make_inputs(operation, size), bench.device.type, size.dtype)
            for direction in directions(operation):
                if report.seconds_left < RESERVED_SECONDS:
                    report.row("skipped", what=f"{operation}, batch {size.batch}, {direction}")
                else:
                    time_operation(report, bench, operation, size, direction, args)
            del args
            bench.free()


def time_operation(
    report: Report,
    bench: Bench,
    operation: str,
    size: Size,
    direction: str,
    args: tuple[Any, ...],
) -> None:
    works, peaks = {}, {}
    first, backward = size == sizes(bench, operation)[0], direction != "forward"
    for name, function in implementations(operation, bench, compiled=first and backward):
        if name == "fastgpt reference" and not first:
            continue  # needs gigabytes for the scores and is far slower
        work = partial(RUNS[direction], function, args_for(function, args))
        with report.skip_on_error(f"{operation}, {name}"):
            work()
            peaks[name] = bench.peak_bytes(work)
            works[name] = work
    times = bench.milliseconds(works) if works else {}
    ours = times.get("fastgpt triton")
    n_bytes, flop = floors(operation, size, backward)
    shares = {
        "share of copy bandwidth": n_bytes / report.content["ceilings"][COPY],
        "share of matrix peak": flop / report.content["ceilings"][PRODUCT],
    }
    for name, time_ms in times.items():
        row = {"operation": operation, "batch": size.batch, "time": size.time}
        row |= {"dtype": str(size.dtype).removeprefix("torch."), "direction": direction}
        row |= {"implementation": name, "ms": time_ms}
        if ours:
            row["speedup of fastgpt triton"] = time_ms / ours
        row |= {share: floor / time_ms * 1e3 for share, floor in shares.items() if floor}
        report.row("operations", **row, **{"peak MB": peaks[name] / 1e6})


def sizes(bench: Bench, operation: str) -> list[Size]:
    """Return the shapes of GPT-2 124M at several batch sizes."""
    if bench.tiny:
        return [Size("tiny", 1, 16, 1, 16, 50, torch.float32)]
    batches = {"cached_attention": (1, 8, 64), "linear_cross_entropy": (8, 32)}
    found = [replace(GPT2_CUDA, batch=batch) for batch in batches.get(operation, (8, 32, 64))]
    if operation == "causal_attention":  # shapes for which `ops="auto"` selects PyTorch's attention
        found += [replace(GPT2_CUDA, time=4096), replace(GPT2_CUDA, dtype=torch.float32)]
    return found


def implementations(
    operation: str, bench: Bench, compiled: bool = True
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the implementations of an operation, fastgpt's first.

    compiled: whether to include the compiled reference, which takes seconds for every shape.
    """
    cuda = bench.device.type == "cuda"
    for name in ("triton", "native", "reference"):
        yield f"fastgpt {name}", implementation(operation, name)
    yield "torch", implementation(operation, "torch")
    if compiled and operation != "cached_attention":
        torch.compiler.reset()
        yield "compiled reference", bench.compile(implementation(operation, "reference"))
    if operation == "causal_attention":
        yield "fastgpt triton, one pass", OnePassAttention.apply
    if operation == "causal_attention" and cuda:
        yield "SDPA flash", pinned(SDPBackend.FLASH_ATTENTION)
        yield "SDPA cuDNN", pinned(SDPBackend.CUDNN_ATTENTION)
    if cuda and find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        if operation == "layer_norm":
            yield "Liger", liger.liger_layer_norm
        if operation == "linear_cross_entropy":
            yield "Liger", partial(liger_cross_entropy, liger.liger_fused_linear_cross_entropy)


def liger_cross_entropy(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor
) -> Tensor:
    return function(x.flatten(0, -2), weight, targets.flatten())


class OnePassAttention(torch.autograd.Function):
    """fastgpt's attention with the single-pass backward, which uses atomic additions."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        """Return the attention `[B, T, C]`."""
        out, lse = causal_attention_forward(qkv, n_head)
        ctx.save_for_backward(qkv, out, lse)
        ctx.n_head = n_head
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of qkv."""
        saved = (*ctx.saved_tensors, ctx.n_head)
        return causal_attention_backward(grad, *saved, deterministic=False), None


def pinned(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(qkv: Tensor, n_head: int) -> Tensor:
        with sdpa_kernel(backend):
            return native.causal_attention(qkv, n_head)

    return attention


def floors(operation: str, size: Size, backward: bool) -> tuple[float, float]:
    """Return the minimum number of bytes moved and of FLOP computed by an operation.

    Each input is read once and each result is written once; reads of the backward are counted in
    addition. Causal attention needs half of the matrix of scores, and its backward has 2.5 times
    the products of the forward.
    """
    rows, width = size.batch * size.time, size.n_embd
    one = rows * width * size.dtype.itemsize  # [B, T, C]
    square = 2.0 * rows * size.time * width  # two products of [T, T] by D, half of them masked
    vocab = size.vocab_size or 0
    table: dict[str, tuple[float, float, float, float]] = {  # forward, backward: bytes, FLOP
        "layer_norm": (2 * one, 3 * one, 0, 0),
        "add_layer_norm": (4 * one, 4 * one, 0, 0),
        "causal_attention": (4 * one, 8 * one, square, 2.5 * square),
        "gelu": (8 * one, 12 * one, 0, 0),
        "linear_gelu": (5 * one, 13 * one, 8 * rows * width**2, 16 * rows * width**2),
        "linear_cross_entropy": (one, 2 * one, 2 * rows * width * vocab, 4 * rows * width * vocab),
        "cached_attention": (2 * one * 3 / 4, 0, 0, 0),
    }
    forward_bytes, backward_bytes, forward_flop, backward_flop = table[operation]
    return forward_bytes + backward * backward_bytes, forward_flop + backward * backward_flop
