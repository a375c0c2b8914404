"""What the benchmarks share: devices, the check before the clock starts, one way of timing.

Every case warms up, checks that it computes the right thing, and is then timed for a few short
rounds. Few and short, so that the cases of a group, which run one after the other, see the same
machine: on a shared one the noise drifts over seconds.
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

from fastgpt import ops
from fastgpt.data.corpus import load_corpus
from fastgpt.model import GPTConfig
from fastgpt.training.recipes import RECIPES, Recipe

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

CHAR_RECIPE = RECIPES["shakespeare-char"]

ROUND_SECONDS = 0.02  # shorter work is repeated within a round, or the clock's own cost shows
CASE_SECONDS = 0.4
MIN_ROUNDS, MAX_ROUNDS = 3, 20

# Largest error, as a share of the largest value: what rounding explains, and a mistake exceeds.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def backends(device: str) -> list[str]:
    """Return the backends worth timing: on a CPU, Triton's kernels run in an interpreter."""
    return [name for name in ops.BACKENDS if name != "triton" or device == "cuda"]


def check_equal(
    name: str, ours: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Fail unless each tensor of `ours` equals its counterpart as far as `dtype` can tell.

    dtype: the precision that `ours` was computed in, which sets the tolerance.
    """
    assert len(ours) == len(truth), f"{name}: {len(ours)} results for {len(truth)}"
    for index, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert mine.shape == true.shape, f"{name}: result {index} is {list(mine.shape)}"
        scale = true.double().abs().max().clamp_min(1e-30)
        error = ((mine.double() - true.double()).abs().max() / scale).item()
        limit = TOLERANCE[dtype]
        assert error <= limit, f"{name}: result {index} is off by {error:.1e}, more than {limit}"


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

    baseline: the variant that the report compares the group with. tokens: how many `work`
    processes, for tokens per second; megabytes: the same, for MB/s. sizes: goes into the results
    as it is.
    """

    def timed() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()  # else the launches are timed, not the work

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
    if tokens and benchmark.stats:  # there are none with --benchmark-disable
        benchmark.extra_info["tokens/s"] = round(tokens / benchmark.stats.stats.median)
    if megabytes:
        note_megabytes(benchmark, megabytes)


def note_megabytes(benchmark: Any, megabytes: float) -> None:
    """Note how many megabytes (10⁶ bytes) a round processes, and in the median round a second."""
    benchmark.extra_info["megabytes"] = megabytes
    if benchmark.stats:
        benchmark.extra_info["MB/s"] = round(megabytes / benchmark.stats.stats.median, 1)


def compile_or_skip(function: Any, first_call: Callable[[Any], object]) -> Any:
    """Return `function` compiled, after `first_call` has been made with it.

    Compiling happens in that first call, so it must do all that will be timed, the backward too.
    Skips the test where compiling is switched off (FASTGPT_BENCH_COMPILE=0) or impossible.
    """
    if os.environ.get("FASTGPT_BENCH_COMPILE") == "0":
        pytest.skip("torch.compile is left out: FASTGPT_BENCH_COMPILE=0")
    torch.compiler.reset()  # what earlier cases compiled would count against the recompile limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own; pytest makes them errors
            compiled = torch.compile(function, dynamic=False)
            first_call(compiled)
    except (RuntimeError, OSError) as error:  # on a CPU it needs a C++ compiler
        first_line = next(iter(str(error).splitlines()), "")
        pytest.skip(f"torch.compile failed: {type(error).__name__}: {first_line}")
    return compiled


@functools.cache
def char_config() -> GPTConfig:
    """Return the network that the shakespeare-char recipe trains."""
    return model_config(CHAR_RECIPE, load_corpus(CHAR_RECIPE.data).tokenizer.vocab_size)


def model_config(recipe: Recipe, vocab_size: int) -> GPTConfig:
    """Return the network of a recipe."""
    return GPTConfig(
        vocab_size=vocab_size,
        block_size=recipe.block_size,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        n_embd=recipe.n_embd,
        dropout=recipe.dropout,
        bias=recipe.bias,
    )


def _plan(timed: Callable[[], None]) -> tuple[int, int]:
    """Warm up, and return how many rounds of how many calls fill `CASE_SECONDS`."""
    fastest, until = float("inf"), time.perf_counter() + CASE_SECONDS / 4
    while fastest == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        timed()
        fastest = min(fastest, time.perf_counter() - began)
    iterations = max(1, round(ROUND_SECONDS / fastest))
    rounds = int(CASE_SECONDS / (fastest * iterations))
    return min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)), iterations
