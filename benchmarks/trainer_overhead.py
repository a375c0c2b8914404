"""How much of a training step is the trainer's own: neither forward, backward nor optimizer.

    python benchmarks/trainer_overhead.py                                  # character-level, small
    python benchmarks/trainer_overhead.py --recipe gpt2 --steps 10 --batch-size 4 --block-size 256

It runs `Trainer.fit` as it is, logging and all, and takes the time within forward, backward and
update from the time from the first of the steps to the last. What is left is the data, the learning
rate, the figures on the screen and in metrics.jsonl. Evaluations and checkpoints, which come
between steps and as often as a recipe wants, are left out.
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
    """Measure the trainer's own share of a step."""

    recipe: str = "shakespeare-char"
    """Which network, if not changed below."""
    n_layer: int = 4
    """Blocks; nanoGPT's character-level setting for a CPU has 4. For gpt2 it is 12 always."""
    batch_size: int = 12
    """Sequences a step."""
    block_size: int = 64
    """Tokens in each."""
    steps: int = 300
    """Steps to measure, after a few to warm up."""
    rounds: int = 3
    """Runs; the median is reported."""


def main(options: Options) -> None:
    """Measure a few runs."""
    shares, steps = zip(*(measure(options) for _ in range(options.rounds)), strict=True)
    runs = ", ".join(f"{share:.2%}" for share in shares)
    print(
        f"{options.recipe}, {options.batch_size} x {options.block_size} tokens, "
        f"{torch.get_num_threads()} threads: a step takes {1e3 * median(steps):.1f} ms, "
        f"{median(shares):.2%} of it the trainer's own "
        f"({1e3 * median(shares) * median(steps):.2f} ms; runs: {runs})"
    )


def measure(options: Options) -> tuple[float, float]:
    """Return the share of the time that is the trainer's own, and the seconds of a step."""
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
    """Return `function`, which notes how long it takes."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        spent.append(time.perf_counter() - began)
        return result

    return call


if __name__ == "__main__":
    main(tyro.cli(Options))
