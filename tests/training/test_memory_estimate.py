"""Tests of the memory estimate, compared with the tensors of real training steps."""

import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastgpt import GPT, GPTConfig, Recipe
from fastgpt.model import Block
from fastgpt.ops import products
from fastgpt.training import memory_estimate as memory
from fastgpt.training.memory_estimate import (
    KERNELS_LOGITS,
    MemoryEstimate,
    advice,
    available,
    batches,
    check_fits,
    estimate,
    explain_out_of_memory,
    find_batch,
    is_out_of_memory,
    largest_batch,
    used,
)
from fastgpt.utils.errors import UsageError

CPU = torch.device("cpu")
CHAR = GPTConfig(65, 64, 3, 4, 128, bias=False)
LONG = GPTConfig(512, 512, 4, 4, 128)
WIDE = GPTConfig(50257, 128, 2, 4, 256)
GPT2 = GPTConfig(block_size=256)
GB = 10**9


class LiveTensors(TorchDispatchMode):
    """Tracks the total size of live storages, from their creation until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def measured_peak(
    config: GPTConfig,
    batch: int,
    *,
    grad_accum: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "native",
    fake: bool = True,
) -> int:
    """Train two steps and return the peak bytes of live tensors.

    With `fake`, tensors have shapes, lifetimes and gradients, but no data: large models are cheap.
    """
    without_contents = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with without_contents, LiveTensors() as live:
        model = GPT(config, backend)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            for _ in range(grad_accum):
                ids = torch.zeros(batch, config.block_size + 1, dtype=torch.int64)
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = model(ids[:, :-1], ids[:, 1:])
                (loss / grad_accum).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimate for PyTorch's operators, which also run in float32 while tensors are traced."""
    monkeypatch.setattr(memory, "_uses_cpu_loops", lambda setup: False)


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute the activations of each block in the backward pass."""
    forward = Block.forward

    def forgetful(self: Block, x: Any, residual: Any, ops: Any, cache: Any = None) -> Any:
        def run(x: Any, residual: Any) -> Any:
            return forward(self, x, residual, ops, cache)

        return checkpoint(run, x, residual, use_reentrant=False)

    monkeypatch.setattr(Block, "forward", forgetful)


def test_fake_tensors_live_as_long_as_real_ones() -> None:
    config = GPTConfig(100, 32, 2, 2, 32)
    assert measured_peak(config, 2, fake=True) == measured_peak(config, 2, fake=False)


@pytest.mark.parametrize(
    ("config", "batch", "settings"),
    [
        pytest.param(CHAR, 12, {}, id="char"),
        pytest.param(CHAR, 12, {"grad_accum": 2, "dtype": torch.bfloat16}, id="char-accum-bf16"),
        pytest.param(LONG, 4, {"dtype": torch.bfloat16}, id="long-bf16"),
        pytest.param(WIDE, 4, {}, id="wide"),
        pytest.param(WIDE, 16, {"dtype": torch.bfloat16}, id="wide-chunked-loss-bf16"),
        pytest.param(GPT2, 1, {"grad_accum": 2}, id="124M", marks=pytest.mark.slow),
        pytest.param(GPT2, 4, {"dtype": torch.bfloat16}, id="124M-bf16", marks=pytest.mark.slow),
        pytest.param(GPTConfig(5000, 64, 2, 4, 256, tie_weights=False), 2, {}, id="untied"),
        pytest.param(GPTConfig(512, 128, 2, 4, 128, dropout=0.1), 4, {}, id="dropout"),
        pytest.param(LONG, 4, {"backend": "reference"}, id="reference"),
    ],
)
def test_the_estimate_is_what_tensors_take(
    config: GPTConfig, batch: int, settings: dict[str, Any], traced: None
) -> None:
    needed = estimate(config, batch, **settings)
    assert needed.total == pytest.approx(measured_peak(config, batch, **settings), rel=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_recomputed_activations(
    dtype: torch.dtype, recomputed: None, traced: None
) -> None:
    needed = estimate(LONG, 4, dtype=dtype, recompute=True)
    assert needed.total == pytest.approx(measured_peak(LONG, 4, dtype=dtype), rel=0.08)
    assert needed.total < 0.6 * estimate(LONG, 4, dtype=dtype).total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_keep_what_is_estimated(dtype: torch.dtype) -> None:
    """The vocabulary is small, because the kernels' logits are not visible to `LiveTensors`."""
    kernels = pytest.importorskip("fastgpt.kernels.cross_entropy")
    assert kernels.MAX_BYTES == KERNELS_LOGITS
    needed = estimate(CHAR, 12, dtype=dtype, backend="triton", device="cuda")
    peak = measured_peak(CHAR, 12, dtype=dtype, backend="triton")
    assert needed.total == pytest.approx(peak, rel=0.05)


# Trains three steps, and prints the actual and the estimated bytes in the memory pool of the CPU
# loops. Outputs of PyTorch's matrix products are not in the pool, so the package's own products are
# enabled.
POOL = """
import sys, torch
from fastgpt import Recipe, Trainer, _C
_C.gemm_is_faster = lambda **_: True
trainer = Trainer(eval(sys.argv[1]))
with trainer._feeder() as trainer._feed:
    for _ in range(3):
        trainer._step()
needed = trainer.learner.memory()
print(_C.pool_usage()[0], needed.gradients + needed.activations + needed.loss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the pool needs Linux")
@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer": "gpt2", "n_layer": 4, "block_size": 256, "batch_size": 4},
        {"tokenizer": "gpt2", "n_layer": 4, "block_size": 256, "batch_size": 4, "grad_accum": 2},
        {"n_layer": 6, "block_size": 256, "batch_size": 8, "bias": True},
    ],
)
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                not products.own_in_bf16(), reason="this processor has no bfloat16 units"
            ),
        ),
    ],
)
def test_the_loops_on_a_cpu_hold_what_is_estimated(
    settings: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    recipe = Recipe(**settings, n_embd=256, out=out, device="cpu", dtype=dtype)
    command = [sys.executable, "-c", POOL, repr(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, needed = map(int, done.stdout.split())
    assert held == pytest.approx(needed, rel=0.1)


def test_parts_add_up_and_are_shown() -> None:
    needed = estimate(GPT2, 4)
    parts = (needed.weights, needed.gradients, needed.optimizer, needed.activations, needed.loss)
    assert needed.total == sum(parts)
    with torch.device("meta"):
        assert needed.optimizer == 8 * GPT(GPT2).num_params()
    assert str(needed).startswith(f"{needed.total / 1e9:.1f} GB (weights 495 MB, gradients ")
    lines = needed.table().splitlines()
    assert len(lines) == 6
    assert lines[-1].split() == ["total", f"{needed.total / 1e9:.1f}", "GB", "100%"]


def test_sharing_lowers_what_each_process_holds() -> None:
    alone, shared = (estimate(GPTConfig(), 4, grad_accum=2, world_size=w) for w in (1, 2))
    sharded = estimate(GPTConfig(), 4, grad_accum=2, world_size=8, fsdp=True)
    assert shared.optimizer == alone.optimizer
    assert sharded.optimizer == pytest.approx(alone.optimizer / 8, rel=0.001)
    assert sharded.total < shared.total
    assert sharded.setup.micro_batch == 1  # 8 sequences of a step, over 8 processes


@pytest.mark.parametrize("wrong", [{"optimizer": "sgdd"}, {"backend": "cuda"}])
def test_unknown_names_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        estimate(CHAR, 1, **wrong)


# --- advice ------------------------------------------------------------------------------------


def gpt2_step() -> MemoryEstimate:
    return estimate(GPTConfig(), 12, grad_accum=40, dtype=torch.bfloat16, device="cuda")


def test_the_advice_fits_and_keeps_a_steps_sequences() -> None:
    needed = gpt2_step()
    line = check_fits(needed, 6 * GB)
    assert line is not None
    assert line.startswith(f"batch 12 needs about {needed.total / 1e9:.1f} GB; available: 6.0 GB; ")
    words = line.replace(",", "").split()
    batch = int(words[words.index("--batch-size") + 1])
    accum = int(words[words.index("--grad-accum") + 1])
    assert batch * accum == 480
    again = estimate(GPTConfig(), batch, grad_accum=accum, dtype=torch.bfloat16, device="cuda")
    assert again.total < 6 * GB
    assert "--recompute" in line
    assert check_fits(needed, 100 * GB) is None
    assert check_fits(needed, None) is None
    # Headroom for allocations that are not estimated: with exactly the estimate, a step may fail.
    assert check_fits(needed, needed.total + 1) is not None


def test_the_largest_batch_divides_the_step_and_fits() -> None:
    needed = gpt2_step()
    for free in (6, 8, 16, 80):
        batch = largest_batch(needed, free * GB)
        assert batch is not None
        assert 480 % batch == 0
        larger = [size for size in batches(480, 480) if size > batch]
        sizes = {
            size: estimate(
                GPTConfig(), size, grad_accum=480 // size, dtype=torch.bfloat16, device="cuda"
            ).total
            for size in (batch, *larger)
        }
        assert sizes.pop(batch) <= free * GB * 0.9
        assert all(size > free * GB * 0.9 for size in sizes.values())
    assert largest_batch(needed, 1 * GB) is None


def test_a_model_that_cannot_fit_is_said_so() -> None:
    text = advice(estimate(GPTConfig(), 1), GB)
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


# --- running out -------------------------------------------------------------------------------


def test_a_failed_allocation_is_explained() -> None:
    needed = estimate(CHAR, 12, grad_accum=2)
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


# --- what there is -----------------------------------------------------------------------------


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable:  8000000 kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8_192_000_000, id="no control groups"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job/step\n",
                f"{V2}/job/memory.max": "3000000000\n",  # the limit of the parent group
                f"{V2}/job/memory.current": "1000000000\n",
                f"{V2}/job/memory.stat": "anon 5\ninactive_file 400000000\n",
                f"{V2}/job/step/memory.max": "max\n",
                f"{V2}/job/step/memory.current": "1000000000\n",
            },
            2_400_000_000,
            id="version 2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,memory:/docker/abc\n4:pids:/\n",
                f"{V1}/memory.limit_in_bytes": "2000000000",  # in a container, docker/abc is absent
                f"{V1}/memory.usage_in_bytes": "500000000",
            },
            1_500_000_000,
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",  # no limit
                f"{V1}/memory.usage_in_bytes": "500000000",
            },
            8_192_000_000,
            id="version 1 without a limit",
        ),
    ],
)
def test_what_is_available_on_a_cpu(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available(CPU, put(tmp_path, MEMINFO | files)) == expected


def test_nothing_known_is_none(tmp_path: Path) -> None:
    assert available(CPU, tmp_path) is None
    assert available(torch.device("meta")) is None


def test_this_machine_answers() -> None:
    free, taken = available(CPU), used(CPU)
    assert free is None or 10**6 < free < 10**14
    assert taken is None or 10**7 < taken < 10**13


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
