"""Run all checks and timings of the kernels on a GPU, in less than nine minutes.

    python benchmarks/gpu_report.py           # writes benchmarks/results/gpu-NAME.json, and .md
    python benchmarks/gpu_report.py --tiny    # a dry run on a CPU, in Triton's interpreter

The report contains the results of the kernels' tests, the error of each implementation against
float64, and the times of each operation, of the optimizer and of the whole training step of GPT-2
124M. The two ceilings, the memory bandwidth of a copy and the throughput of a large matrix product,
are measured in the same run. The measurements of different implementations are interleaved, and
their medians are compared. Every result is written to disk immediately, so that an interrupted run
keeps its results.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.bench_ops import (
    INPUTS,
    STOCK,
    Size,
    forward,
    forward_backward,
    placed,
    stock_cached_attention,
    without_empty_part,
)
from benchmarks.machine import version_of
from benchmarks.peers import StockGPT, copy_weights, make_optimizer
from fastgpt import ops
from fastgpt.kernels.attention import causal_attention_backward, causal_attention_forward
from fastgpt.model import GPT, GPTConfig, meta_model
from fastgpt.ops import native, reference
from fastgpt.training.optimizer import parameter_groups

ROOT = Path(__file__).parents[1]
COPY, PRODUCT = "copy, bytes/s", "bf16 product, FLOP/s"  # the two ceilings
NOMINAL_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bf16, datasheet
RESERVED_SECONDS = 200.0  # for the training step, which matters most
LR, BETAS, WEIGHT_DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0

Work = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """Options of the report."""

    out: Path | None = None
    """JSON file to write; a Markdown file of the same name is written to the same folder."""
    minutes: float = 8.5
    """Time limit. Measurements that would start later are skipped and listed in the report."""
    tests: bool = True
    """Run the kernels' tests first."""
    tiny: bool = False
    """Use small shapes and few rounds: to test this program, not to measure."""


def main(options: Options) -> None:
    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        sys.exit("no CUDA device is visible; use `--tiny` for a dry run on a CPU")
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").replace(" ", "-") if cuda else "none"
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{gpu.lower()}.json"
    report = Report(out, time.monotonic() + 60 * options.minutes)
    bench = Bench(torch.device("cuda" if cuda else "cpu"), options.tiny)
    report.note("environment", environment())
    report.note("ceilings", ceilings(bench))
    if options.tests:
        report.note("tests", run_tests(min(150.0, report.seconds_left / 3)))
    for part in (check_operations, time_operations, time_optimizers, time_training):
        try:
            part(report, bench)
        except Exception as error:  # continue with the next part
            report.row("skipped", what=f"the rest of {part.__name__}: {said(error)}")
        bench.free()
    print(report.markdown())


class Report:
    """The results so far, written to disk after each change."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline = path, deadline
        self.content: dict[str, Any] = {}

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline, after which no measurement should start."""
        return self.deadline - time.monotonic()

    def note(self, part: str, value: Any) -> None:
        """Set a section of the report."""
        self.content[part] = value
        self.save()

    def row(self, part: str, **row: Any) -> None:
        """Add a row to a table and print it."""
        self.content.setdefault(part, []).append(row)
        print(part, " ".join(f"{name}={shown(value)}" for name, value in row.items()), flush=True)
        self.save()

    def save(self) -> None:
        """Write the report; the JSON file is replaced atomically and is never incomplete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)
        self.path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """Return the report as Markdown."""
        lines = ["# Kernels on a GPU", "", "Generated by `python benchmarks/gpu_report.py`.", ""]
        for part, value in self.content.items():
            lines += [f"## {part}", ""]
            if isinstance(value, dict):
                lines += [f"- {name}: {shown(fact)}" for name, fact in value.items()]
            else:
                names = list(dict.fromkeys(name for row in value for name in row))
                lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
                lines += [
                    "| " + " | ".join(shown(row.get(name, "")) for name in names) + " |"
                    for row in value
                ]
            lines.append("")
        return "\n".join(lines)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Bench:
    """The device and the functions that measure time and memory on it."""

    device: torch.device
    tiny: bool

    def __post_init__(self) -> None:
        size = 2**10 if self.tiny else 2**29  # ten times the largest cache
        self.flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def milliseconds(self, works: dict[str, Work], seconds: float = 1.5) -> dict[str, float]:
        """Return the median time of each work; calls are interleaved for `seconds` in total.

        The caches are flushed before each call. While the flush runs on the device, the host can
        queue the kernels of the call, so the result is the time of the device, unless a work needs
        the host throughout.
        """
        for work in works.values():
            work()
            work()
        times: dict[str, list[float]] = {name: [] for name in works}
        until = time.monotonic() + (0.0 if self.tiny else seconds)
        while not times[next(iter(works))] or time.monotonic() < until:
            for name, work in works.items():
                times[name].append(self.once(work))
        return {name: statistics.median(values) for name, values in times.items()}

    def once(self, work: Work) -> float:
        """Return the time of one call in milliseconds."""
        self.flush.zero_()
        if self.device.type == "cpu":
            began = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def peak_bytes(self, work: Work) -> int:
        """Return the peak memory of a call in bytes, relative to the memory in use before it."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        """Release unused memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def environment() -> dict[str, Any]:
    """Return the versions of packages and the properties of the machine."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu cores": os.cpu_count(),
    }
    for package in ("torch", "triton", "numpy", "liger-kernel", "fastgpt"):
        facts[package] = version_of(package) or "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory, GB": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        }
    return facts


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError as error:
        return str(error)
    return done.stdout.strip()


def ceilings(bench: Bench) -> dict[str, float]:
    """Measure the bandwidth of a copy (bytes read and written) and a large bf16 product."""
    count, size = (2**12, 64) if bench.tiny else (2**31, 8192)
    source = torch.empty(count, dtype=torch.int8, device=bench.device).random_()
    target = torch.empty_like(source)
    a, b = (
        torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )  # random values: with zeros, a GPU uses less power and runs faster
    times = bench.milliseconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {
        COPY: 2 * count / times["copy"] * 1e3,
        PRODUCT: 2 * size**3 / times["product"] * 1e3,
    }


def run_tests(seconds: float) -> dict[str, str]:
    """Run the kernels' tests in parallel processes and return the last line of each.

    Most of the time is spent in Triton's compiler. The tests of attention, which has the most
    kernels, are divided among three processes.
    """
    parts = {"attention": ("head_dims", "dropout", "not head_dims and not dropout")}
    files = [*sorted(ROOT.glob("tests/kernels/test_*.py")), ROOT / "tests/ops/test_triton.py"]
    running = {}
    for file in files:
        if file.stem == "test_compiled":
            continue  # does not need a GPU
        for part in parts.get(file.stem.removeprefix("test_"), ("",)):
            name = f"{file.relative_to(ROOT)} {part}".strip()
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", part],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    until, results = time.monotonic() + seconds, {}
    for name, process in running.items():
        results[name] = last_lines(process, until)
        print(name, results[name], flush=True)
    return results


def last_lines(process: "subprocess.Popen[str]", until: float) -> str:
    """Wait for pytest; return its summary line if all tests passed, else its last 25 lines."""
    try:
        output, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()  # the GPU must be free for the measurements
        return "\n".join(["timed out:", *output.strip().splitlines()[-25:]])
    return "\n".join(output.strip().splitlines()[-1 if not process.returncode else -25 :])


# --- the operations ----------------------------------------------------------------------------


def sizes(bench: Bench, operation: str) -> list[Size]:
    """Return the shapes of GPT-2 124M at several batch sizes."""
    if bench.tiny:
        return [Size("tiny", 1, 16, 1, 16, 50, torch.float32)]
    batches = {"cached_attention": (1, 8, 64), "linear_cross_entropy": (8, 32)}
    whole = Size("gpt2", 8, 1024, 12, 768, 50257, torch.bfloat16)
    found = [replace(whole, batch=batch) for batch in batches.get(operation, (8, 32, 64))]
    if operation == "causal_attention":  # shapes for which `ops="auto"` selects PyTorch's attention
        found += [replace(whole, time=4096), replace(whole, dtype=torch.float32)]
    return found


def make_inputs(operation: str, size: Size, bench: Bench) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return placed(INPUTS[operation](size), bench.device.type, size.dtype)


def implementations(
    operation: str, bench: Bench, compiled: bool = True
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the implementations of an operation, fastgpt's first.

    compiled: whether to include the compiled reference, which takes seconds for every shape.
    """
    for name in ("triton", "native", "reference"):
        yield f"fastgpt {name}", getattr(ops.get(name), operation)
    yield "torch", STOCK[operation]
    if compiled and operation != "cached_attention":
        torch.compiler.reset()
        yield "compiled reference", compile_for(bench, getattr(reference, operation))
    if operation == "causal_attention":
        yield "fastgpt triton, one pass", OnePassAttention.apply
    if operation == "causal_attention" and bench.device.type == "cuda":
        yield "SDPA flash", pinned(SDPBackend.FLASH_ATTENTION)
        yield "SDPA cuDNN", pinned(SDPBackend.CUDNN_ATTENTION)
    if (liger := liger_functional()) and bench.device.type == "cuda":
        if operation == "layer_norm":
            yield "Liger", liger.liger_layer_norm
        if operation == "linear_cross_entropy":
            yield (
                "Liger",
                lambda x, weight, targets: liger.liger_fused_linear_cross_entropy(
                    x.flatten(0, -2), weight, targets.flatten()
                ),
            )


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
        grad_qkv = causal_attention_backward(
            grad, *ctx.saved_tensors, ctx.n_head, deterministic=False
        )
        return grad_qkv, None


def args_for(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an operation in the form that an implementation expects."""
    return without_empty_part(*args) if function is stock_cached_attention else args


def pinned(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(qkv: Tensor, n_head: int) -> Tensor:
        with sdpa_kernel(backend):
            return native.causal_attention(qkv, n_head)

    return attention


def liger_functional() -> ModuleType | None:
    try:
        import liger_kernel.transformers.functional as functional
    except ImportError:
        return None
    return functional


def check_operations(report: Report, bench: Bench) -> None:
    """Report the error of each implementation against float64, relative to the largest value.

    The kernels guarantee at most twice the error of plain PyTorch in the same precision.
    """
    for operation in INPUTS:
        size = replace(sizes(bench, operation)[0], batch=1)
        args = make_inputs(operation, size, bench)
        exact = placed(args, bench.device.type, torch.float64)
        run = forward if operation == "cached_attention" else forward_backward
        truth = run(getattr(reference, operation), exact)
        for name, function in implementations(operation, bench):
            row = {"operation": operation, "implementation": name}
            try:
                results = run(function, args_for(function, args))
            except Exception as error:  # an implementation that fails is a result; continue
                report.row("errors", **row, failed=said(error))
                continue
            errors = [
                ((ours.double() - true).abs().max() / true.abs().max()).item()
                for ours, true in zip(results, truth, strict=True)
            ]
            report.row(
                "errors", **row, largest=max(errors), each=[float(f"{e:.1e}") for e in errors]
            )
        bench.free()


def time_operations(report: Report, bench: Bench) -> None:
    """Time each operation, forward and with its backward, for all implementations."""
    for operation in INPUTS:
        for size in sizes(bench, operation):
            args = make_inputs(operation, size, bench)
            for run in (
                (forward,) if operation == "cached_attention" else (forward, forward_backward)
            ):
                if report.seconds_left < RESERVED_SECONDS and not bench.tiny:
                    report.row("skipped", what=f"{operation}, batch {size.batch}, {run.__name__}")
                    continue
                time_operation(report, bench, operation, size, run, args)
            del args
            bench.free()


def time_operation(
    report: Report,
    bench: Bench,
    operation: str,
    size: Size,
    run: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    works, peaks = {}, {}
    first = size == sizes(bench, operation)[0]
    for name, function in implementations(operation, bench, first and run is forward_backward):
        if name == "fastgpt reference" and not first:
            continue  # needs gigabytes for the scores and is far slower
        work = partial(run, function, args_for(function, args))
        try:
            work()
            peaks[name] = bench.peak_bytes(work)
        except Exception as error:  # an implementation that fails is a result; continue
            report.row("skipped", what=f"{operation}, {name}: {said(error)}")
        else:
            works[name] = work
    moved, computed = floors(operation, size, run is forward_backward)
    times = bench.milliseconds(works) if works else {}
    ours = times.get("fastgpt triton")
    for name, time_ms in times.items():
        shares = {
            "share of copy bandwidth": moved / report.content["ceilings"][COPY],
            "share of matrix peak": computed / report.content["ceilings"][PRODUCT],
        }
        report.row(
            "operations",
            operation=operation,
            batch=size.batch,
            time=size.time,
            dtype=str(size.dtype).removeprefix("torch."),
            direction="forward" if run is forward else "forward+backward",
            implementation=name,
            ms=time_ms,
            **({"speedup of fastgpt triton": time_ms / ours} if ours else {}),
            **{share: floor / time_ms * 1e3 for share, floor in shares.items() if floor},
            **{"peak MB": peaks[name] / 1e6},
        )


def said(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


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
    return (
        forward_bytes + backward * backward_bytes,
        forward_flop + backward * backward_flop,
    )


# --- the optimizer and the whole step ----------------------------------------------------------


def config(bench: Bench) -> GPTConfig:
    return GPTConfig(50, 16, 1, 1, 16) if bench.tiny else GPTConfig()


def time_optimizers(report: Report, bench: Bench) -> None:
    """Time AdamW with clipping over the parameters of GPT-2 124M."""
    model = GPT(config(bench)).to(bench.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    bytes_moved = 8 * 4 * model.num_params()  # p, g, m, v read; p, m, v written; g for its norm
    works = {name: make(model)[1] for name, make in OPTIMIZERS.items()}
    times = bench.milliseconds(works)
    for name, time_ms in times.items():
        bandwidth = bytes_moved / time_ms * 1e3 / report.content["ceilings"][COPY]
        report.row(
            "optimizers", optimizer=name, ms=time_ms, **{"share of copy bandwidth": bandwidth}
        )
    del model, works
    bench.free()


def torch_adamw(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Work]:
    """Return PyTorch's fused AdamW and a function that clips the gradients and steps."""
    cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(
        parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=BETAS, fused=True, capturable=cuda
    )

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return optimizer, step


def our_adamw(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Work]:
    """Return fastgpt's AdamW, whose step includes clipping."""
    from fastgpt.training.fused_adamw import FusedAdamW

    optimizer = FusedAdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=BETAS, max_norm=CLIP)
    return optimizer, optimizer.step


OPTIMIZERS = {"torch fused + clip": torch_adamw, "fastgpt": our_adamw}


def time_training(report: Report, bench: Bench) -> None:
    """Time the whole step of GPT-2 124M at T = 1024, bf16 autocast, AdamW with clipping."""
    for batch in (2,) if bench.tiny else (32, 64):
        works = {}
        for name, make in STEPS.items():
            if report.seconds_left < 45 and not bench.tiny:
                report.row("skipped", what=f"training, batch {batch}, {name}")
                continue
            try:
                works[name] = make(bench, batch)
                works[name]()
            except Exception as error:
                works.pop(name, None)
                report.row("skipped", what=f"training, batch {batch}, {name}: {said(error)}")
        if not works:
            continue
        try:
            times = bench.milliseconds(works, seconds=min(20.0, max(4.0, report.seconds_left / 3)))
        except Exception as error:  # for example too little memory for all of them together
            report.row("skipped", what=f"training, batch {batch}: {said(error)}")
            times = {}
        for name, time_ms in times.items():
            note_step(report, bench, batch, name, time_ms, times)
        works.clear()
        bench.free()


def note_step(
    report: Report, bench: Bench, batch: int, name: str, time_ms: float, times: dict[str, float]
) -> None:
    shape = config(bench)
    tokens = batch * shape.block_size
    n_params = meta_model(shape).num_params()
    # 6N + 12LCT per token: products with weights and those of attention, without the causal mask
    flop = tokens * (6 * n_params + 12 * shape.n_layer * shape.n_embd * shape.block_size)
    gpu = report.content["environment"].get("gpu", "")
    nanogpt = times.get(NANOGPT)
    peaks = {"measured": report.content["ceilings"][PRODUCT]}
    if gpu in NOMINAL_FLOPS:
        peaks["datasheet"] = NOMINAL_FLOPS[gpu]
    report.row(
        "training step",
        batch=batch,
        implementation=name,
        ms=time_ms,
        **{"tokens/s": tokens / time_ms * 1e3},
        **({"speedup over nanoGPT-style": nanogpt / time_ms} if nanogpt else {}),
        **{
            f"MFU of the {which} peak": flop / time_ms * 1e3 / peak for which, peak in peaks.items()
        },
    )


def our_step(
    bench: Bench,
    batch: int,
    *,
    backend: str = "triton",
    compiled: bool = False,
    graph: bool = False,
    optimizer: Callable[..., Any] = torch_adamw,
) -> Work:
    """Return a training step of fastgpt's model."""
    torch.manual_seed(0)
    model: Any = GPT(config(bench), ops=backend).to(bench.device)
    network = compile_for(bench, model) if compiled else model
    step = training_step(network, *optimizer(model), *batch_of(bench, batch), bench.device)
    return recorded(step) if graph and bench.device.type == "cuda" else step


def nanogpt_step(bench: Bench, batch: int, attention: SDPBackend | None = None) -> Work:
    """Return a training step of nanoGPT's model, compiled, with the fused optimizer.

    attention: backend of PyTorch's attention (None: chosen by PyTorch). The vocabulary is padded as
    in nanoGPT: products with 50,257 columns would be slower.
    """
    torch.manual_seed(0)
    shape = config(bench)
    shape = replace(shape, vocab_size=-(-shape.vocab_size // 64) * 64)
    gpt = GPT(shape)
    # Create a new class: the compiler reuses code for models of the same class and shapes, without
    # regard to the attention backend with which it was compiled.
    model = type("StockGPT", (StockGPT,), {})(shape)
    copy_weights(gpt, model)
    model.to(bench.device)
    optimizer = make_optimizer(model, LR, BETAS, WEIGHT_DECAY)
    cuda = bench.device.type == "cuda"
    network = compile_for(bench, model) if cuda else model

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    inputs = batch_of(bench, batch)
    pinned_attention = partial(sdpa_kernel, attention) if cuda and attention else nullcontext
    return training_step(network, optimizer, update, *inputs, bench.device, pinned_attention)


def compile_for(bench: Bench, work: Any) -> Any:
    """Compile `work`; in a dry run without code generation, which takes minutes on a CPU."""
    return torch.compile(work, dynamic=False, backend="aot_eager" if bench.tiny else "inductor")


def training_step(
    network: Any,
    optimizer: torch.optim.Optimizer,
    update: Work,
    ids: Tensor,
    targets: Tensor,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Work:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with context():
            # fp32 on a CPU, for a dry run: the interpreter does not support bf16
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = network(ids, targets)
            loss.backward()
        update()

    return step


def batch_of(bench: Bench, batch: int) -> tuple[Tensor, Tensor]:
    shape = config(bench)
    ids = torch.randint(shape.vocab_size, (2, batch, shape.block_size), device=bench.device)
    return ids[0], ids[1]


def recorded(step: Work) -> Work:
    """Capture a step in a CUDA graph and return a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


NANOGPT = "nanoGPT-style"  # the baseline of the training steps

# The most important ones come first, because the time limit may be reached.
STEPS: dict[str, Callable[[Bench, int], Work]] = {
    "fastgpt": partial(our_step, compiled=True, optimizer=our_adamw),  # as the trainer does it
    NANOGPT: nanogpt_step,
    "fastgpt, CUDA graph": partial(our_step, compiled=True, graph=True),
    "fastgpt, torch's AdamW": partial(our_step, compiled=True),
    "fastgpt, not compiled": our_step,
    "nanoGPT-style, SDPA flash": partial(nanogpt_step, attention=SDPBackend.FLASH_ATTENTION),
    "nanoGPT-style, SDPA cuDNN": partial(nanogpt_step, attention=SDPBackend.CUDNN_ATTENTION),
    "fastgpt native": partial(our_step, compiled=True, optimizer=our_adamw, backend="native"),
}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
