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
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np
import torch
import tyro
from common import model_config
from peers import StockGPT, copy_weights, make_optimizer
from torch import Tensor, nn

from fastgpt.data.corpus import Corpus, Tokens, gather, load_corpus
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
    side: Literal["both", "fastgpt", "nanogpt"] = "both"
    """Compare both sides, or run as the worker process of one side (used internally)."""


@dataclass(frozen=True)
class Side:
    """A model in training; `run(n)` performs n steps."""

    model: nn.Module
    corpus: Corpus
    run: Callable[[int], None]


def main(options: Options) -> None:
    """Compare the two sides, or run the worker process of one of them."""
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    if options.side != "both":
        serve(options)
        return
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    report: dict[str, Any] = {}
    rounds = -(-options.rounds // options.pairs)
    for _ in range(options.pairs):
        workers = {side: Worker(options, side) for side in SIDES}
        for turn in range(rounds):
            for side in SIDES if turn % 2 == 0 else reversed(SIDES):  # alternate the order
                seconds[side].append(workers[side].ask(f"run {options.steps}"))
        report = {side: worker.finish() for side, worker in workers.items()}
    print_table(seconds, report, options)


def print_table(seconds: dict[str, list[float]], report: dict[str, Any], options: Options) -> None:
    """Print milliseconds per step, tokens per second, and the ratio of neighboring rounds."""
    facts = report["fastgpt"]
    print(
        f"{options.model} on {options.device}, {facts['threads']} threads, "
        f"torch {torch.__version__}: "
        f"{len(seconds['fastgpt'])} rounds of {options.steps} steps, "
        f"{facts['tokens']:,} tokens per step; median [quartiles]\n"
    )
    print(f"{'':10}{'ms/step':>26}{'tokens/s':>10}{'peak MB':>10}", end="")
    print(f"{'loss at step ' + str(facts['steps']):>20}")
    for side in SIDES:
        ms = [1e3 * s / options.steps for s in seconds[side]]
        rate = facts["tokens"] / median(ms) * 1e3
        peak, loss = report[side]["peak_mb"], report[side]["loss"]
        print(f"{side:10}{spread(ms):>26}{rate:>10,.0f}{peak:>10,.0f}{loss:>20.3f}")
    ratios = [b / a for a, b in zip(seconds["fastgpt"], seconds["nanogpt"], strict=True)]
    print(f"\nspeedup of fastgpt: {spread(ratios)}", end="")
    print(f", with {facts['peak_mb'] / report['nanogpt']['peak_mb']:.0%} of the memory")


def spread(values: list[float]) -> str:
    """Return the median and the quartiles as text."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


class Worker:
    """The worker process of one side, which executes requests one at a time."""

    def __init__(self, options: Options, side: str) -> None:
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments(replace(options, side=side))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (cli.environment() if side == "fastgpt" else {}),
        )
        if options.warm_up:
            self.ask(f"run {options.warm_up}")

    def ask(self, request: str) -> Any:
        """Send a request and wait for its answer."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the {self.side} process ended unexpectedly: see its message above")
        return json.loads(answer)

    def finish(self) -> Any:
        """Return the report of the process, and end it."""
        report = self.ask("report")
        self.process.communicate()
        return report


def arguments(options: Options) -> list[str]:
    """Return the command-line arguments for the options."""
    named = {field.name: getattr(options, field.name) for field in fields(options)}
    return [
        word
        for name, value in named.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


# --- inside a worker's process -----------------------------------------------------------------


def serve(options: Options) -> None:
    """Answer requests from standard input: "run N" with its seconds, "report" with a report."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe_of(options), out=f"{folder}/run")
        side = (fastgpt_side if options.side == "fastgpt" else nanogpt_side)(recipe)
        steps = 0
        for request in sys.stdin:
            word, *count = request.split()
            if word == "run":
                steps += int(count[0])
                answer: Any = time_steps(side, int(count[0]), options.device)
            else:
                answer = {"steps": steps, **describe(side, recipe)}
            print(json.dumps(answer), flush=True)


def recipe_of(options: Options) -> Recipe:
    """Return the recipe that both sides train."""
    settings: dict[str, Any] = {**MODELS[options.model], "device": options.device}
    if options.batch is not None:
        settings["batch_size"] = options.batch
    if options.context is not None:
        settings["block_size"] = options.context
    return replace(get_recipe("shakespeare-char"), **settings)


def time_steps(side: Side, steps: int, device: str) -> float:
    """Return the time of `steps` steps in seconds, synchronized with the device."""
    began = time.perf_counter()
    side.run(steps)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def describe(side: Side, recipe: Recipe) -> dict[str, Any]:
    """Return the loss on the first part of the validation text, and properties of the run."""
    # Read the peak memory before the evaluation, which is not part of the steps.
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    size, tokens = recipe.block_size, side.corpus.val
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
    }


def fastgpt_side(recipe: Recipe) -> Side:
    """Return fastgpt's trainer, whose steps include the data feed and the log."""
    trainer = Trainer(recipe)
    trainer._feed = trainer._feeder()
    progress = Progress(0, recipe.max_steps)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer._step()
            progress.stepped(trainer.step, trainer.step_tokens)
            if progress.due():
                trainer._log(progress)

    return Side(trainer.model, trainer.learner.corpus, run)


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

    return Side(model, corpus, run)


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
