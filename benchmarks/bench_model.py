"""Benchmark the whole network: fastgpt on each backend, compiled, and `benchmarks.peers`.

The jobs are evaluation (loss without gradients), forward and backward, a training step, and
generation with and without a key/value cache. All variants use the same weights, batch, dtype and
threads. Their results are checked against the reference backend in float64 before timing.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.suite import (
    CHAR_RECIPE,
    DEVICES,
    backends,
    char_config,
    check_equal,
    compile_or_skip,
    measure,
)
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.fused_adamw import FusedAdamW
from fastgpt.training.optimizer import make_optimizer
from fastgpt.training.recipes import RECIPES, Recipe

NANOGPT, ENCODER = "nanoGPT-style", "nn.TransformerEncoder"
PEERS: dict[str, type[peers.Peer]] = {
    NANOGPT: peers.StockGPT,
    ENCODER: peers.TransformerEncoderGPT,
}
COMPILED = " compiled"

Batch = tuple[Tensor, Tensor]  # inputs and targets [B, T]
Work = Callable[[], object]

JOBS = ("evaluate", "forward+backward", "training step")
PROMPT, NEW_TOKENS = 16, 48


@dataclass(frozen=True)
class Setting:
    """A network and a batch; `recipe` has the optimizer settings, `config` returns the network."""

    name: str
    device: str
    recipe: Recipe
    config: Callable[[], GPTConfig]
    autocast: torch.dtype | None = None
    jobs: tuple[str, ...] = JOBS
    compiled: tuple[str, ...] = ()  # variants whose training step is measured compiled, too

    def precision(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the model."""
        return torch.autocast(self.device, self.autocast) if self.autocast else nullcontext()


# Compilation takes half a minute on a CPU, for which nanoGPT's README disables it.
CHAR = Setting("shakespeare-char", "cpu", CHAR_RECIPE, char_config, compiled=("native",))
# GPT-2's vocabulary, which dominates the time of a small model, with few and narrow layers
SMALL = Setting(
    "4 layers of 256",
    "cpu",
    replace(RECIPES["gpt2"], batch_size=2, block_size=256),
    lambda: GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256),
    jobs=("evaluate", "training step"),  # half a minute less
)
GPT2 = Setting(
    "GPT-2 124M",
    "cuda",
    replace(RECIPES["gpt2"], batch_size=8),
    GPTConfig,
    torch.bfloat16,
    compiled=("native", NANOGPT),
)
SETTINGS = [setting for setting in (CHAR, SMALL, GPT2) if setting.device in DEVICES]


def cases() -> list[Any]:
    """Return (setting, job, variant) for pytest, with the variants of a group in sequence."""
    return [
        pytest.param(setting, job, variant, id=f"{setting.name}-{job}-{variant}")
        for setting in SETTINGS
        for job in setting.jobs
        for variant in variants(setting, job)
    ]


def variants(setting: Setting, job: str) -> tuple[str, ...]:
    """Return the backends of fastgpt, the peers, and the compiled variants."""
    compiled = setting.compiled if job == "training step" else ()
    return (*backends(setting.device), *PEERS, *(name + COMPILED for name in compiled))


# --- evaluation and training -------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "job", "variant"), cases())
def test_network(benchmark: Any, setting: Setting, job: str, variant: str) -> None:
    check_same_network(setting, variant.removesuffix(COMPILED))
    model = make_model(setting, variant).to(setting.device)
    batch = make_batch(setting)
    make_work = dict(zip(JOBS, (evaluation, forward_backward, training_step), strict=True))[job]
    if variant.endswith(COMPILED):
        model = compile_or_skip(model, lambda m: make_work(m, setting, batch)())
    measure(
        benchmark,
        make_work(model, setting, batch),
        group=f"{setting.name}: {job}, {setting.device}",
        tokens=batch[0].numel(),
        batch=list(batch[0].shape),
        **description(setting, variant, model),
    )


def evaluation(model: nn.Module, setting: Setting, batch: Batch) -> Work:
    model.eval()

    def work() -> Tensor:
        with torch.no_grad(), setting.precision():
            return model(*batch)

    return work


def forward_backward(model: nn.Module, setting: Setting, batch: Batch) -> Work:
    model.train()

    def work() -> Tensor:
        model.zero_grad()
        with setting.precision():
            loss = model(*batch)
        loss.backward()
        return loss.detach()

    return work


def training_step(
    model: nn.Module,
    setting: Setting,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
) -> Work:
    """Return a training step, by default with the optimizer of the loop of fastgpt or nanoGPT."""
    recipe = setting.recipe
    if optimizer is None and isinstance(original(model), GPT):
        optimizer = make_optimizer(model, recipe)
    elif optimizer is None:
        betas = (recipe.beta1, recipe.beta2)
        optimizer = peers.make_optimizer(model, recipe.lr, betas, recipe.weight_decay)
    run = forward_backward(model, setting, batch)

    def work() -> None:
        run()
        update(model, optimizer, recipe.grad_clip)

    return work


def update(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip the gradients, unless the optimizer does it, and update the weights."""
    if not isinstance(optimizer, FusedAdamW):
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


# --- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "variant"),
    [
        pytest.param(setting, variant, id=f"{setting.name}-{variant}")
        for setting in SETTINGS
        for variant in (*backends(setting.device), "native without cache", *PEERS)
    ],
)
def test_generation(benchmark: Any, setting: Setting, variant: str) -> None:
    backend = variant.removesuffix(" without cache")
    model = make_model(setting, backend).to(setting.device).eval()
    cache = {"use_cache": backend == variant} if isinstance(model, GPT) else {}
    new_tokens = min(NEW_TOKENS, model.config.block_size - PROMPT)
    prompt = make_batch(setting)[0][:1, :PROMPT]
    check_same_text(setting, backend, cache)

    def work() -> Tensor:
        with setting.precision():
            return model.generate(prompt, new_tokens, temperature=1.0, **cache)

    measure(
        benchmark,
        work,
        group=f"{setting.name}: generate {new_tokens} tokens, {setting.device}",
        tokens=new_tokens,
        prompt=PROMPT,
        **description(setting, variant, model),
    )


# --- models and checks -------------------------------------------------------------------------


def make_model(setting: Setting, variant: str) -> nn.Module:
    """Return the model `variant` on the CPU; all models of a setting have the same weights."""
    torch.manual_seed(0)
    name = variant.removesuffix(COMPILED)
    gpt = GPT(setting.config(), ops="reference" if name in PEERS else name)
    if name not in PEERS:
        return gpt
    peer = PEERS[name](gpt.config)
    peers.copy_weights(gpt, peer)
    return peer


def make_batch(setting: Setting) -> Batch:
    """Return inputs and targets `[B, T]` on the setting's device."""
    torch.manual_seed(1)
    vocab_size, recipe = setting.config().vocab_size, setting.recipe
    ids = torch.randint(vocab_size, (2, recipe.batch_size, recipe.block_size))
    inputs, targets = ids.to(setting.device)
    return inputs, targets


@functools.cache  # once is enough for all jobs
def check_same_network(setting: Setting, variant: str) -> None:
    """Compare the loss and all gradients with those of the reference on a small batch."""
    mine, exact = models_to_check(setting, variant)
    inputs, targets = (ids[:2, :32] for ids in make_batch(setting))
    losses = [mine(inputs, targets), exact(inputs, targets)]
    for loss in losses:
        loss.backward()
    pairs = list(parameter_pairs(mine, exact))
    check_equal(
        f"{variant} at {setting.name}",
        [losses[0].detach(), *(p.grad for p, _ in pairs)],
        [losses[1].detach(), *(p.grad for _, p in pairs)],
        losses[0].dtype,
    )


def check_same_text(setting: Setting, variant: str, cache: dict[str, bool]) -> None:
    """Compare the greedy continuation with that of the reference."""
    mine, exact = models_to_check(setting, variant)
    prompt = make_batch(setting)[0][:2, :PROMPT]
    text = mine.generate(prompt, 8, temperature=0.0, **cache)
    true = exact.generate(prompt, 8, temperature=0.0, use_cache=False)
    assert torch.equal(text, true), f"{variant} at {setting.name} generates a different text"


def models_to_check(setting: Setting, variant: str) -> tuple[nn.Module, GPT]:
    """Return the model `variant` and the reference in float64, both without dropout.

    A peer is converted to float64 as well, and to GPT-2's tanh GELU, so that rounding cannot hide a
    difference.
    """
    mine = make_model(setting, variant).to(setting.device).eval()
    exact = make_model(setting, "reference").to(setting.device).double().eval()
    if isinstance(mine, peers.Peer):
        peers.use_tanh_gelu(mine.double())
    return mine, exact


def parameter_pairs(model: nn.Module, gpt: GPT) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    if isinstance(model, peers.Peer):
        return model.pairs(gpt)
    return zip(model.parameters(), gpt.parameters(), strict=True)


def original(model: nn.Module) -> nn.Module:
    """Return the module that a compiled one wraps."""
    return getattr(model, "_orig_mod", model)


def description(setting: Setting, variant: str, model: nn.Module) -> dict[str, Any]:
    """Return the properties that are recorded with the results of every case."""
    dtype = setting.autocast or torch.float32
    peer = variant.removesuffix(COMPILED) in PEERS
    return {
        "variant": variant if peer else f"fastgpt {variant}",
        "baseline": NANOGPT,
        "device": setting.device,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
