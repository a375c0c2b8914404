"""Times of the optimizer and of a training step of GPT-2 124M on a GPU, for `gpu_report.py`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_model import NANOGPT, Setting, make_batch, training_step, update
from benchmarks.gpu_measure import COPY, PRODUCT, Bench, Report, Work
from benchmarks.peers import StockGPT, copy_weights
from fastgpt.model import GPT, GPTConfig, meta_model
from fastgpt.training.optimizer import make_optimizer, parameter_groups
from fastgpt.training.recipes import RECIPES, Recipe
from fastgpt.training.throughput import device_peak, flops_per_token


def time_optimizers(report: Report, bench: Bench) -> None:
    """Time AdamW with clipping over the parameters of GPT-2 124M."""
    recipe = RECIPES["gpt2"]
    model = GPT(config(bench)).to(bench.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    n_bytes = 8 * 4 * model.num_params()  # p, g, m, v read; p, m, v written; g for its norm
    works = {
        name: partial(update, model, make(model, recipe), recipe.grad_clip)
        for name, make in OPTIMIZERS.items()
    }
    for name, time_ms in bench.milliseconds(works).items():
        bandwidth = n_bytes / time_ms * 1e3 / report.content["ceilings"][COPY]
        report.row(
            "optimizers", optimizer=name, ms=time_ms, **{"share of copy bandwidth": bandwidth}
        )


def time_training(report: Report, bench: Bench) -> None:
    """Time the whole step of GPT-2 124M at T = 1024, bf16 autocast, AdamW with clipping."""
    for batch in (2,) if bench.tiny else (32, 64):
        works: dict[str, Work] = {}
        for name, make in STEPS.items():
            if report.seconds_left < 45:
                report.row("skipped", what=f"training, batch {batch}, {name}")
                continue
            with report.skip_on_error(f"training, batch {batch}, {name}"):
                works[name] = after_first_call(make(bench, batch))
        # All steps together may need too much memory.
        with report.skip_on_error(f"training, batch {batch}"):
            if works:
                time_steps(report, bench, batch, works)
        works.clear()
        bench.free()


def after_first_call(work: Work) -> Work:
    """Return `work` after calling it once, which compiles it."""
    work()
    return work


def time_steps(report: Report, bench: Bench, batch: int, works: dict[str, Work]) -> None:
    times = bench.milliseconds(works, min(20.0, max(4.0, report.seconds_left / 3)))
    shape = config(bench)
    tokens = batch * shape.block_size
    flop = tokens * flops_per_token(shape, meta_model(shape).num_params(embeddings=False))
    peaks = {"measured": report.content["ceilings"][PRODUCT]}
    peak = device_peak(bench.device, torch.bfloat16)
    if peak and not peak.measured:
        peaks["datasheet"] = peak.flops
    for name, time_ms in times.items():
        row = {"batch": batch, "implementation": name, "ms": time_ms}
        row["tokens/s"] = tokens / time_ms * 1e3
        if NANOGPT in times:
            row["speedup over nanoGPT-style"] = times[NANOGPT] / time_ms
        for kind, flops in peaks.items():
            row[f"MFU of the {kind} peak"] = flop / time_ms * 1e3 / flops
        report.row("training step", **row)


def config(bench: Bench) -> GPTConfig:
    return GPTConfig(50, 16, 1, 1, 16) if bench.tiny else GPTConfig()


def setting_of(bench: Bench, batch: int) -> Setting:
    """Return GPT-2 124M with the optimizer of its recipe.

    In a dry run on a CPU the precision is fp32, because the interpreter does not support bf16.
    """
    shape = config(bench)
    recipe = replace(RECIPES["gpt2"], batch_size=batch, block_size=shape.block_size)
    autocast = torch.bfloat16 if bench.device.type == "cuda" else None
    return Setting("GPT-2 124M", bench.device.type, recipe, lambda: shape, autocast)


def torch_adamw(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return PyTorch's fused AdamW, in a form that a CUDA graph can capture."""
    groups, betas = parameter_groups(model, recipe.weight_decay), (recipe.beta1, recipe.beta2)
    cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True, capturable=cuda)


OPTIMIZERS = {"torch fused + clip": torch_adamw, "fastgpt": make_optimizer}


def our_step(
    bench: Bench,
    batch: int,
    *,
    backend: str = "triton",
    compiled: bool = False,
    graph: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] = torch_adamw,
) -> Work:
    """Return a training step of fastgpt's model."""
    torch.manual_seed(0)
    setting = setting_of(bench, batch)
    model = GPT(setting.config(), ops=backend).to(bench.device)
    network: Any = bench.compile(model) if compiled else model
    step = training_step(network, setting, make_batch(setting), optimizer(model, setting.recipe))
    return recorded(step) if graph and bench.device.type == "cuda" else step


def nanogpt_step(bench: Bench, batch: int, attention: SDPBackend | None = None) -> Work:
    """Return a training step of nanoGPT's model, compiled, with the fused optimizer.

    attention: backend of PyTorch's attention (None: chosen by PyTorch). The vocabulary is padded as
    in nanoGPT: products with 50,257 columns would be slower.
    """
    torch.manual_seed(0)
    setting = setting_of(bench, batch)
    shape = setting.config()
    shape = replace(shape, vocab_size=-(-shape.vocab_size // 64) * 64)
    gpt = GPT(shape)
    # Create a new class: the compiler reuses code for models of the same class and shapes, without
    # regard to the attention backend with which it was compiled.
    model = type("StockGPT", (StockGPT,), {})(shape)
    copy_weights(gpt, model)
    model.to(bench.device)
    cuda = bench.device.type == "cuda"
    step = training_step(bench.compile(model) if cuda else model, setting, make_batch(setting))
    if not (cuda and attention):
        return step

    def step_with_attention() -> None:
        with sdpa_kernel(attention):
            step()

    return step_with_attention


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


# The most important ones come first, because the time limit may be reached.
STEPS: dict[str, Callable[[Bench, int], Work]] = {
    "fastgpt": partial(our_step, compiled=True, optimizer=make_optimizer),  # as in the trainer
    NANOGPT: nanogpt_step,
    "fastgpt, CUDA graph": partial(our_step, compiled=True, graph=True),
    "fastgpt, torch's AdamW": partial(our_step, compiled=True),
    "fastgpt, not compiled": our_step,
    "nanoGPT-style, SDPA flash": partial(nanogpt_step, attention=SDPBackend.FLASH_ATTENTION),
    "nanoGPT-style, SDPA cuDNN": partial(nanogpt_step, attention=SDPBackend.CUDNN_ATTENTION),
    "fastgpt native": partial(our_step, compiled=True, optimizer=make_optimizer, backend="native"),
}
