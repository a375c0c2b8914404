"""Compare a training step of fastgpt's Trainer with that of a nanoGPT-style loop.

    python benchmarks/compare_step.py                           # the shakespeare-char recipe
    python benchmarks/compare_step.py --model nanogpt-char      # nanoGPT's character model for CPUs
    python benchmarks/compare_step.py --model 124m --batch 4 --context 256 --rounds 6 --steps 1

Both sides train the same network from the same initial weights on the same text, with the same
batch size and learning rates. fastgpt's side runs the steps of a `Trainer`. The other side is
nanoGPT's training loop: its network (`benchmarks/peers.py`), random windows and its AdamW, eager
and in fp32 on a CPU.

Each side runs in its own process, because fastgpt's trainer changes how its process handles freed
memory, and fastgpt's commands change how threads wait, while the other side must run as it does for
its users. The two processes alternate after each round of steps, so that both are affected by the
same noise. The pair of processes is restarted several times, so that the memory layout of a single
process does not determine the result.

The overhead of the trainer is the part of a step outside of forward, backward and update: loading
data, the learning rate schedule, and the metrics on the screen and in metrics.jsonl.
"""

import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import ratios, seconds, spread
from benchmarks.peers import StockGPT, copy_weights, make_optimizer
from benchmarks.suite import model_config
from fastgpt.data.batches import gather
from fastgpt.data.corpus import Corpus, load_corpus
from fastgpt.data.token_files import Tokens
from fastgpt.model import GPT
from fastgpt.training.optimizer import learning_rate
from fastgpt.training.recipes import Recipe, get_recipe
from fastgpt.training.trainer import Trainer
from fastgpt.utils import cli
from fastgpt.utils.progress import Progress

SIDES = ("fastgpt", "nanogpt")
MODELS = {
    "shakespeare-char": {},
    # config/train_shakespeare_char.py with the options that nanoGPT's README gives for a CPU
    "nanogpt-char": {
        **{"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "bias": False},
        **{"batch_size": 12, "dropout": 0.0, "lr": 1e-3, "min_lr": 1e-4, "beta2": 0.99},
        **{"max_steps": 2000, "warmup_steps": 100, "grad_clip": 1.0, "weight_decay": 0.1},
    },
    "124m": {
        **{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "bias": True},
        **{"batch_size": 4, "lr": 6e-4, "beta2": 0.95, "tokenizer": "gpt2"},
    },
}
LOG_INTERVAL = 10  # nanoGPT's default: the steps between two synchronizations to read the loss
VALIDATION_TOKENS = 8192


@dataclass(frozen=True)
class Options:
    """Compare a training step of fastgpt with that of a nanoGPT-style loop."""

    model: Literal["shakespeare-char", "nanogpt-char", "124m"] = "shakespeare-char"
    """Model to train on the packaged text: the shakespeare-char recipe, nanoGPT's character model
    for CPUs, or GPT-2 124M."""
    batch: int | None = None
    """Sequences per batch (default: depends on the model)."""
    context: int | None = None
    """Tokens per sequence (default: depends on the model)."""
    warm_up: int = 10
    """Steps before the first round."""
    rounds: int = 30
    """Rounds of each side."""
    steps: int = 10
    """Steps per round."""
    pairs: int = 3
    """Number of pairs of processes among which the rounds are divided."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""


def main(options: Options) -> None:
    """Run the comparison and print the results."""
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    report: dict[str, Any] = {}
    rounds = -(-options.rounds // options.pairs)
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            recipe = replace(recipe_of(options), out=f"{folder}/run")
            workers = {side: start_worker(side, recipe, options.warm_up) for side in SIDES}
            for turn in range(rounds):
                for side in SIDES if turn % 2 == 0 else reversed(SIDES):  # alternate the order
                    times[side].append(workers[side].submit(time_steps, options.steps).result())
            report = {side: worker.submit(describe).result() for side, worker in workers.items()}
            for worker in workers.values():
                worker.shutdown()
    print_table(times, report, options)


def start_worker(side: str, recipe: Recipe, warm_up: int) -> ProcessPoolExecutor:
    """Return the process of one side after the warm-up; fastgpt's has its commands' environment."""
    with patch.dict(os.environ, cli.environment() if side == "fastgpt" else {}):
        worker = ProcessPoolExecutor(1, get_context("spawn"), set_up, (side, recipe))
        worker.submit(time_steps, warm_up).result()  # starts the process
    return worker


def print_table(times: dict[str, list[float]], report: dict[str, Any], options: Options) -> None:
    """Print milliseconds per step, tokens per second, and the ratio of neighboring rounds."""
    facts = report["fastgpt"]
    print(
        f"{options.model} on {options.device}, {facts['threads']} threads, "
        f"torch {torch.__version__}: "
        f"{len(times['fastgpt'])} rounds of {options.steps} steps, "
        f"{facts['tokens']:,} tokens per step; median [quartiles]\n"
    )
    print(f"{'':10}{'ms/step':>26}{'tokens/s':>10}{'peak MB':>10}", end="")
    n_steps = options.warm_up + len(times["fastgpt"]) // options.pairs * options.steps
    print(f"{f'loss at step {n_steps}':>20}")
    for side in SIDES:
        ms = [1e3 * s / options.steps for s in times[side]]
        rate = facts["tokens"] / median(ms) * 1e3
        peak, loss = report[side]["peak_mb"], report[side]["loss"]
        print(f"{side:10}{spread(ms):>26}{rate:>10,.0f}{peak:>10,.0f}{loss:>20.3f}")
    speedups = ratios(times["fastgpt"], times["nanogpt"])
    print(f"\nspeedup of fastgpt: {spread(speedups)}", end="")
    print(f", with {facts['peak_mb'] / report['nanogpt']['peak_mb']:.0%} of the memory")
    if options.device == "cpu":  # on a GPU, the calls return before the work is done
        print(f"overhead of fastgpt's trainer: {facts['overhead']:.2%} of a step")


def recipe_of(options: Options) -> Recipe:
    """Return the recipe that both sides train."""
    settings: dict[str, Any] = {**MODELS[options.model], "device": options.device}
    if options.batch is not None:
        settings["batch_size"] = options.batch
    if options.context is not None:
        settings["block_size"] = options.context
    return replace(get_recipe("shakespeare-char"), **settings)


# --- inside a worker's process -----------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A model in training.

    Attributes:
        run: `run(n)` performs n steps.
        spent: seconds of each forward and backward and of each update of fastgpt's side.
        overheads: for each call of `run`, the fraction of its time that is not in `spent`.
        opened: what stays open until the process ends.
    """

    recipe: Recipe
    model: nn.Module
    corpus: Corpus
    run: Callable[[int], None]
    spent: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)
    opened: ExitStack = field(default_factory=ExitStack)


side: Side  # of this process


def set_up(name: str, recipe: Recipe) -> None:
    """Create the side of this process."""
    global side
    side = (fastgpt_side if name == "fastgpt" else nanogpt_side)(recipe)


def time_steps(steps: int) -> float:
    """Return the time of `steps` steps in seconds, synchronized with the device."""

    def work() -> None:
        side.run(steps)
        if side.recipe.device == "cuda":
            torch.cuda.synchronize()

    side.spent.clear()
    taken = seconds(work)
    side.overheads.append(1.0 - sum(side.spent) / taken)
    return taken


@torch.no_grad()
def describe() -> dict[str, Any]:
    """Return the loss on the first part of the validation text, and properties of the run."""
    # Read the peak memory before the evaluation, which is not part of the steps.
    recipe, tokens = side.recipe, side.corpus.val
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    size = recipe.block_size
    starts = np.arange(0, len(tokens) - size, size)[: max(1, VALIDATION_TOKENS // size)]
    side.model.eval()
    losses = []
    for some in np.array_split(starts, -(-len(starts) // recipe.batch_size)):
        inputs, targets = gather(tokens, some, size)
        losses.append(side.model(inputs.to(recipe.device), targets.to(recipe.device)).item())
    return {
        "loss": sum(losses) / len(losses),
        "peak_mb": peak_mb,
        "tokens": recipe.grad_accum * recipe.batch_size * recipe.block_size,
        "threads": torch.get_num_threads(),
        "overhead": median(side.overheads),
    }


def fastgpt_side(recipe: Recipe) -> Side:
    """Return fastgpt's trainer, whose steps include the data feed and the log."""
    trainer = Trainer(recipe)
    learner = trainer.learner
    opened = ExitStack()
    opened.callback(trainer.close)
    opened.enter_context(trainer.writer.opened(recipe, trainer.step))  # metrics.jsonl
    trainer._loader = opened.enter_context(learner.loader(trainer.step))
    spent: list[float] = []
    learner.backward = timed(learner.backward, spent)  # type: ignore[method-assign]
    learner.updater.step = timed(learner.updater.step, spent)  # type: ignore[method-assign]
    progress = Progress(0, recipe.max_steps)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer._step()
            progress.stepped(trainer.step, trainer.step_tokens)
            if progress.due():
                trainer._log(progress)

    return Side(recipe, trainer.model, learner.corpus, run, spent, opened=opened)


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Return `function` with its time in seconds appended to `spent` in each call."""

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        spent.append(time.perf_counter() - began)
        return result

    return call


def nanogpt_side(recipe: Recipe) -> Side:
    """Return the nanoGPT-style model with nanoGPT's training loop.

    As in nanoGPT, the model is compiled on a GPU but not on a CPU. The tokens are in memory, while
    nanoGPT maps a file for every batch; this slightly favors this side.
    """
    corpus = load_corpus(recipe.data, recipe.tokenizer, recipe.val_fraction)
    model: Any = initial_model(recipe, corpus.tokenizer.vocab_size)
    betas = (recipe.beta1, recipe.beta2)
    optimizer = make_optimizer(model, recipe.lr, betas, recipe.weight_decay)
    precision: Any = nullcontext()
    if recipe.device == "cuda":
        model, precision = torch.compile(model), torch.autocast("cuda", torch.bfloat16)
    numbers = itertools.count()

    def run(steps: int) -> None:
        for step in itertools.islice(numbers, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            for _ in range(recipe.grad_accum):
                with precision:
                    loss = model(*random_batch(corpus.train, recipe)) / recipe.grad_accum
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % LOG_INTERVAL == 0:
                loss.item()

    return Side(recipe, model, corpus, run)


def initial_model(recipe: Recipe, vocab_size: int) -> StockGPT:
    """Return the peer with the initial weights of fastgpt's trainer."""
    torch.manual_seed(recipe.seed)
    gpt = GPT(model_config(recipe, vocab_size))
    peer = StockGPT(gpt.config)
    copy_weights(gpt, peer)
    return peer.to(recipe.device)


def random_batch(tokens: Tokens, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return random windows, drawn with replacement and sliced one by one, as in nanoGPT."""
    size = recipe.block_size
    starts = torch.randint(len(tokens) - size, (recipe.batch_size,)).tolist()
    windows = [torch.from_numpy(tokens[i : i + size + 1].astype(np.int64)) for i in starts]
    inputs = torch.stack([window[:-1] for window in windows])
    targets = torch.stack([window[1:] for window in windows])
    if recipe.device == "cuda":
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return (
        inputs.to(recipe.device, non_blocking=True),
        targets.to(recipe.device, non_blocking=True),
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
