"""Helpers shared by the pytest-benchmark suites: devices, checks of results, and timing.

Every case is warmed up, checked for correct results, and then timed for a few short rounds. The
rounds are few and short so that the cases of a group, which run in sequence, are affected by the
same noise: on a shared machine the noise drifts over seconds.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import seconds
from fastgpt import ops
from fastgpt.data.corpus import load_corpus
from fastgpt.model import GPTConfig
from fastgpt.training.recipes import RECIPES, Recipe

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

CHAR_RECIPE = RECIPES["shakespeare-char"]

ROUND_SECONDS = 0.02  # shorter work is repeated within a round to amortize the cost of the timer
CASE_SECONDS = 0.4
MIN_ROUNDS, MAX_ROUNDS = 3, 20

# Largest accepted error relative to the largest value: above rounding errors, below real errors.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def backends(device: str) -> list[str]:
    """Return the backends to measure: on a CPU, Triton is excluded, as it would be interpreted."""
    return [name for name in ops.BACKENDS if name != "triton" or device == "cuda"]


def check_equal(
    name: str, ours: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise AssertionError unless the tensors of `ours` equal those of `truth` within a tolerance.

    dtype: the precision in which `ours` was computed, which determines the tolerance.
    """
    assert len(ours) == len(truth), f"{name}: {len(ours)} results for {len(truth)}"
    for index, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert mine.shape == true.shape, f"{name}: result {index} is {list(mine.shape)}"
        error, limit = relative_error(mine, true), TOLERANCE[dtype]
        assert error <= limit, f"{name}: result {index} is off by {error:.1e}, more than {limit}"


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return the largest error of a result, relative to the largest magnitude in `truth`."""
    scale = truth.double().abs().max().clamp_min(1e-30)
    return ((result.double() - truth.double()).abs().max() / scale).item()


def measure(
    benchmark: Any,
    work: Callable[[], object],
    *,
    group: str,
    variant: str,
    baseline: str,
    device: str,
    tokens: int | None = None,
    megabytes: float | None = None,
    **sizes: Any,
) -> None:
    """Time `work` as the member `variant` of `group`.

    Args:
        baseline: the variant that the report compares the group with.
        tokens, megabytes: the number that a call of `work` processes, for tokens/s or MB/s.
        sizes: further properties that are recorded with the results.
    """

    def timed() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()  # wait for the kernels, not only for their launches

    benchmark.group = group
    benchmark.extra_info.update(
        variant=variant,
        baseline=baseline,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        **sizes,
    )
    rounds, iterations = _plan(timed)
    benchmark.pedantic(timed, rounds=rounds, iterations=iterations)
    if tokens and benchmark.stats:  # no statistics with --benchmark-disable
        benchmark.extra_info["tokens/s"] = round(tokens / benchmark.stats.stats.median)
    if megabytes:
        note_megabytes(benchmark, megabytes)


def note_megabytes(benchmark: Any, megabytes: float) -> None:
    """Record the megabytes (10⁶ bytes) that a round processes and the median throughput in MB/s."""
    benchmark.extra_info["megabytes"] = megabytes
    if benchmark.stats:
        benchmark.extra_info["MB/s"] = round(megabytes / benchmark.stats.stats.median, 1)


def compile_or_skip(function: Any, first_call: Callable[[Any], object]) -> Any:
    """Return `function` compiled, after calling `first_call` with it.

    Compilation happens in this first call, so it must perform everything that will be timed,
    including the backward. Skips the test if compilation is disabled (FASTGPT_BENCH_COMPILE=0) or
    fails.
    """
    if os.environ.get("FASTGPT_BENCH_COMPILE") == "0":
        pytest.skip("torch.compile is disabled: FASTGPT_BENCH_COMPILE=0")
    torch.compiler.reset()  # earlier cases would count towards the recompile limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of the compiler, which pytest makes errors
            compiled = torch.compile(function, dynamic=False)
            first_call(compiled)
    except (RuntimeError, OSError) as error:  # for example without a C++ compiler on a CPU
        first_line = next(iter(str(error).splitlines()), "")
        pytest.skip(f"torch.compile failed: {type(error).__name__}: {first_line}")
    return compiled


@functools.cache
def char_config() -> GPTConfig:
    """Return the configuration of the network of the shakespeare-char recipe."""
    return model_config(CHAR_RECIPE, load_corpus(CHAR_RECIPE.data).tokenizer.vocab_size)


def model_config(recipe: Recipe, vocab_size: int) -> GPTConfig:
    """Return the configuration of the network of a recipe."""
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    return GPTConfig(vocab_size, **{name: getattr(recipe, name) for name in names})


def _plan(timed: Callable[[], None]) -> tuple[int, int]:
    """Warm up; return the numbers of rounds and of calls per round that fill `CASE_SECONDS`."""
    fastest, until = float("inf"), time.perf_counter() + CASE_SECONDS / 4
    while fastest == float("inf") or time.perf_counter() < until:
        fastest = min(fastest, seconds(timed))
    iterations = max(1, round(ROUND_SECONDS / fastest))
    rounds = int(CASE_SECONDS / (fastest * iterations))
    return min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)), iterations
