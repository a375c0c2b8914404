"""Tests of the suggested batch sizes and of out-of-memory errors."""

import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.training.memory_advice import (
    advice,
    batch_sizes,
    check_fits,
    explain_out_of_memory,
    find_batch,
    is_out_of_memory,
    largest_batch,
)
from fastgpt.training.memory_estimate import MemoryEstimate, Setup, estimate
from fastgpt.utils.errors import UsageError

GB = 10**9


def gpt2_step(batch: int = 12) -> MemoryEstimate:
    """Return the estimate for a step of 480 sequences."""
    accum = 480 // batch
    return estimate(Setup(GPTConfig(), batch, accum, dtype=torch.bfloat16, device="cuda"))


def test_the_advice_fits_and_keeps_a_steps_sequences() -> None:
    needed = gpt2_step()
    line = check_fits(needed, 6 * GB)
    assert line is not None
    assert line.startswith(f"batch 12 needs about {needed.total / 1e9:.1f} GB; available: 6.0 GB; ")
    words = line.replace(",", "").split()
    batch = int(words[words.index("--batch-size") + 1])
    accum = int(words[words.index("--grad-accum") + 1])
    assert batch * accum == 480
    assert gpt2_step(batch).total < 6 * GB
    assert "--recompute" in line
    assert check_fits(needed, 100 * GB) is None
    assert check_fits(needed, None) is None
    # Headroom for allocations that are not estimated: with exactly the estimate, a step may fail.
    assert check_fits(needed, needed.total + 1) is not None


def test_the_largest_batch_divides_the_step_and_fits() -> None:
    setup = gpt2_step().setup
    for free in (6, 8, 16, 80):
        batch = largest_batch(setup, free * GB)
        assert batch is not None
        assert 480 % batch == 0
        larger = [size for size in batch_sizes(480, 480) if size > batch]
        assert gpt2_step(batch).total <= free * GB * 0.9
        assert all(gpt2_step(size).total > free * GB * 0.9 for size in larger)
    assert largest_batch(setup, 1 * GB) is None


def test_a_model_that_cannot_fit_is_said_so() -> None:
    text = advice(estimate(Setup(GPTConfig(), 1)), GB)
    assert text.startswith("even --batch-size 1 --recompute needs ")
    assert "--n-layer" in text


def test_find_batch_takes_the_largest_that_works() -> None:
    tried = []

    def try_step(batch: int) -> None:
        tried.append(batch)
        if batch > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert find_batch(try_step, [4, 12, 8, 6]) == 6
    assert tried == [12, 8, 6]
    with pytest.raises(UsageError, match="every batch size tried, down to 8"):
        find_batch(try_step, [8, 12])


def test_find_batch_lets_go_of_what_a_failed_step_held() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def try_step(batch: int) -> None:
        assert all(ref() is None for ref in held)
        tensor = torch.empty(10)
        held.append(weakref.ref(tensor))
        if batch > 1:
            raise torch.OutOfMemoryError("no")

    assert find_batch(try_step, [3, 2, 1]) == 1
    with pytest.raises(ZeroDivisionError):
        find_batch(lambda batch: 1 // 0, [1])


def test_a_failed_allocation_is_explained() -> None:
    needed = estimate(Setup(GPTConfig(65, 64, 3, 4, 128, bias=False), 12, grad_accum=2))
    with (
        pytest.raises(UsageError, match=r"^out of memory: a step with batch 12 .* try --batch-si"),
        explain_out_of_memory(needed, 4 * GB),
    ):
        torch.empty(2**55, dtype=torch.float32)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")]
)
def test_every_out_of_memory_error_is_explained(error: Exception) -> None:
    with pytest.raises(UsageError) as info, explain_out_of_memory(gpt2_step()):
        raise error
    message = str(info.value)
    assert "\n" not in message
    assert "--batch-size 6 --grad-accum 80" in message
    assert info.value.__suppress_context__


def test_other_errors_pass_through() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        explain_out_of_memory(gpt2_step()),
    ):
        torch.mm(torch.empty(2, 3), torch.empty(2, 3))
    assert not is_out_of_memory(KeyboardInterrupt())


# The training command, in a process whose address space is limited to 1 GB more than its libraries
# need; how much they need differs between machines.
CRAMPED = """
import os, resource
from pathlib import Path
from fastgpt import train
from fastgpt.training import trainer
from fastgpt.utils import cli
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + 10**9
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cli.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="addresses are counted and limited by Linux")
def test_a_run_out_of_memory_ends_with_a_one_line_error(tmp_path: Path, checkout: Path) -> None:
    """A step needs twice the available memory, in any precision that the processor prefers."""
    options = ["--batch-size", "4000", "--device", "cpu", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", CRAMPED, *options],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    said = re.fullmatch(
        r"error: out of memory: a step with batch 4000 needs about (\d+\.\d) GB \(weights .*\)"
        r", available: .*; try --batch-size (\d+) --grad-accum (\d+) .*\n",
        done.stderr,
    )
    assert said, done.stderr
    needed, batch, accum = float(said[1]), int(said[2]), int(said[3])
    assert needed > 2
    assert batch * accum == 4000
    assert batch <= 2000
