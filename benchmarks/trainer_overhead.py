"""Measure the overhead of the trainer: the time of a step outside forward, backward and optimizer.

    python benchmarks/trainer_overhead.py                                  # character-level, small
    python benchmarks/trainer_overhead.py --recipe gpt2 --steps 10 --batch-size 4 --block-size 256

The script runs `Trainer.fit` unchanged, including its logging, and subtracts the time of forward,
backward and update from the time between the first and the last step. The remainder is the time of
loading data, of the learning rate schedule, and of the metrics on the screen and in metrics.jsonl.
Evaluations and checkpoints, whose frequency depends on the recipe, are excluded.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import tyro

from fastgpt.training.optimizer import Updater
from fastgpt.training.recipes import get_recipe
from fastgpt.training.trainer import Trainer


@dataclass(frozen=True)
class Options:
    """Measure the overhead of the trainer in a training step."""

    recipe: str = "shakespeare-char"
    """Recipe whose network is trained, with the changes below."""
    n_layer: int = 4
    """Number of blocks, as in nanoGPT's character-level configuration for CPUs. Always 12 for
    gpt2."""
    batch_size: int = 12
    """Sequences per step."""
    block_size: int = 64
    """Tokens per sequence."""
    steps: int = 300
    """Steps to measure, after a few warm-up steps."""
    rounds: int = 3
    """Number of runs; the median is reported."""


def main(options: Options) -> None:
    """Measure several runs and print the median."""
    shares, steps = zip(*(measure(options) for _ in range(options.rounds)), strict=True)
    runs = ", ".join(f"{share:.2%}" for share in shares)
    print(
        f"{options.recipe}, {options.batch_size} x {options.block_size} tokens, "
        f"{torch.get_num_threads()} threads: a step takes {1e3 * median(steps):.1f} ms, "
        f"of which {median(shares):.2%} are overhead of the trainer "
        f"({1e3 * median(shares) * median(steps):.2f} ms; runs: {runs})"
    )


def measure(options: Options) -> tuple[float, float]:
    """Return the fraction of a step that is overhead, and the time of a step in seconds."""
    spent: list[float] = []
    starts: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe_of(options, f"{folder}/run"))
        trainer.validation_loss = lambda: 1.0  # type: ignore[method-assign]
        trainer._save = lambda val_loss: None  # type: ignore[method-assign]
        trainer._finish = lambda: None  # type: ignore[assignment,method-assign,return-value]
        learner = trainer.learner
        learner.backward = timed(learner.backward, spent)  # type: ignore[method-assign]
        update = Updater.step

        def step(lr: float) -> torch.Tensor:
            norm = update(learner.updater, lr)
            starts.append(time.perf_counter())
            return norm

        learner.updater.step = timed(step, spent)  # type: ignore[method-assign]
        trainer.fit()
    steps = options.steps
    whole = starts[-1] - starts[-1 - steps]
    return 1.0 - sum(spent[-2 * steps :]) / whole, whole / steps


def recipe_of(options: Options, out: str) -> Any:
    """Return the recipe to run."""
    recipe = replace(get_recipe(options.recipe), out=out, data="shakespeare", grad_accum=1)
    if options.recipe == "shakespeare-char":
        recipe = replace(recipe, n_layer=options.n_layer)
    return replace(
        recipe,
        val_fraction=0.1,
        batch_size=options.batch_size,
        block_size=options.block_size,
        max_steps=options.steps + 5,
        eval_interval=10**9,
    )


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Return `function` with its time in seconds appended to `spent` in each call."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        spent.append(time.perf_counter() - began)
        return result

    return call


if __name__ == "__main__":
    main(tyro.cli(Options))
