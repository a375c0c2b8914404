"""Tests of the memory estimate, compared with the tensors of real training steps."""

import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
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
from fastgpt.training.memory_estimate import KERNELS_LOGITS, Setup, estimate

CHAR = GPTConfig(65, 64, 3, 4, 128, bias=False)
LONG = GPTConfig(512, 512, 4, 4, 128)
WIDE = GPTConfig(50257, 128, 2, 4, 256)
GPT2 = GPTConfig(block_size=256)


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
    needed = estimate(Setup(config, batch, **settings))
    assert needed.total == pytest.approx(measured_peak(config, batch, **settings), rel=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_recomputed_activations(
    dtype: torch.dtype, recomputed: None, traced: None
) -> None:
    needed = estimate(Setup(LONG, 4, dtype=dtype, recompute=True))
    assert needed.total == pytest.approx(measured_peak(LONG, 4, dtype=dtype), rel=0.08)
    assert needed.total < 0.6 * estimate(Setup(LONG, 4, dtype=dtype)).total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_keep_what_is_estimated(dtype: torch.dtype) -> None:
    """The vocabulary is small, because the kernels' logits are not visible to `LiveTensors`."""
    kernels = pytest.importorskip("fastgpt.kernels.cross_entropy")
    assert kernels.MAX_BYTES == KERNELS_LOGITS
    needed = estimate(Setup(CHAR, 12, dtype=dtype, backend="triton", device="cuda"))
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
with trainer.learner.loader(0) as trainer._loader:
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
    needed = estimate(Setup(GPT2, 4))
    parts = (needed.weights, needed.gradients, needed.optimizer, needed.activations, needed.loss)
    assert needed.total == sum(parts)
    with torch.device("meta"):
        assert needed.optimizer == 8 * GPT(GPT2).num_params()
    assert str(needed).startswith(f"{needed.total / 1e9:.1f} GB (weights 495 MB, gradients ")


def test_sharing_lowers_what_each_process_holds() -> None:
    setup = Setup(GPTConfig(), 4, grad_accum=2)
    alone, shared = (estimate(replace(setup, world_size=size)) for size in (1, 2))
    sharded = estimate(replace(setup, world_size=8, fsdp=True))
    assert shared.optimizer == alone.optimizer
    assert sharded.optimizer == pytest.approx(alone.optimizer / 8, rel=0.001)
    assert sharded.total < shared.total
    assert sharded.setup.micro_batch == 1  # 8 sequences of a step, over 8 processes


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be"):
        Setup(CHAR, 1, backend="cuda")
