"""Tests of distributed training: same results as one process, stopping, failures and restarts.

Two processes on this machine are started with torchrun and communicate with gloo.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import Recipe, Trainer
from fastgpt.checkpoint.load import find_checkpoint
from fastgpt.training.distributed import World, split_step
from fastgpt.utils.errors import UsageError
from tests.recipes import tiny_recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
SECONDS = 240  # timeout: more than the slowest machine needs

# Trains several recipes in float64; each process saves the gradients of every update.
GRADIENTS = """
import os, sys, torch
from fastgpt import Recipe, Trainer
from fastgpt.training.distributed import World, full_tensor
from fastgpt.training.optimizer import Updater, trainable

def step(self, lr):
    grads = {n: full_tensor(p.grad).clone() for n, p in trainable(self.model).items()}
    torch.save(grads, f"{folder}/{len(os.listdir(folder)):03d}")
    return update(self, lr)

folder = f"{sys.argv[1]}/rank{os.environ.get('RANK', 0)}"
os.makedirs(folder)
update, Updater.step = Updater.step, step
torch.set_default_dtype(torch.float64)
world = World()
world.start(torch.device("cpu"))  # for all of the trainers
for recipe in sys.argv[2:]:
    Trainer(eval(recipe)).fit()
world.close()
"""

# The training command, in which rank 1 sends a signal to itself at step 6, unless restarted.
DYING = """
import os, signal
from fastgpt import train
from fastgpt.utils import cli
from fastgpt.training.trainer import Trainer

def step(self):
    before(self)
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_time and self.world.rank == 1 and self.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

before, Trainer._step = Trainer._step, step
cli.run(train.main)
"""
STOPPING = DYING.replace("SIGKILL", "SIGTERM")


@pytest.fixture
def tiny(verse: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(verse, tmp_path / "run", n_layer=2, grad_accum=2)


def options(recipe: Recipe) -> list[str]:
    """Return the command-line arguments that turn the recipe of `Recipe()` into `recipe`."""
    changed = {n: v for n, v in vars(recipe).items() if v != getattr(Recipe(), n)}
    settings = [w for n, v in changed.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    return ["shakespeare-char", *settings]


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


def train(recipe: Recipe, **torchrun: int) -> subprocess.CompletedProcess[str]:
    """Train on two processes."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in torchrun.items()]
    return run(*TORCHRUN, *flags, "-m", "fastgpt.train", *options(recipe))


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(folder)
    averaged = checkpoint.model_tensors(ema=True) if checkpoint.has_ema else {}
    return {
        **checkpoint.model_tensors(),
        **checkpoint.optimizer_tensors(),
        **{f"average of {name}": tensor for name, tensor in averaged.items()},
    }


def assert_same(one: Path, two: Path) -> None:
    ours, theirs = tensors(one), tensors(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_close(one: Path, two: Path) -> None:
    """Compare up to the order of summation, whose effect AdamW amplifies for tiny gradients."""
    for a, b in zip(tensors(one).values(), tensors(two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_two_processes_have_the_gradients_of_one(tiny: Recipe, tmp_path: Path) -> None:
    """Within 1e-12 in float64, with DDP and FSDP, with full and with split micro-batches.

    Also with the weights of a pretrained model, loaded by the main process, and with LoRA.
    """
    code = script(tmp_path, GRADIENTS)
    source = str(tmp_path / "source")
    Trainer(replace(tiny, max_steps=1, out=source)).fit()
    settings: list[dict[str, Any]] = [
        {"parallel": "ddp", "batch_size": 2, "grad_accum": 6},  # three micro-batches each
        {"parallel": "fsdp", "batch_size": 5, "grad_accum": 2},
        {"parallel": "ddp", "batch_size": 10, "grad_accum": 1},  # split into two
        {"parallel": "fsdp", "init": source, "seed": 2},
        {"parallel": "ddp", "init": source, "lora_rank": 2, "block_size": 8},
        {"parallel": "fsdp", "init": source, "lora_rank": 2, "sample_interval": 1},
    ]
    for who, command in (("alone", [sys.executable]), ("together", TORCHRUN)):
        recipes = [
            replace(tiny, max_steps=2, out=f"{tmp_path}/{who}{number}", **changes)
            for number, changes in enumerate(settings)
        ]
        run(*command, code, str(tmp_path / who), *map(repr, recipes))
    for step in range(2 * len(settings)):
        truth = torch.load(tmp_path / "alone" / "rank0" / f"{step:03d}")
        for rank in ("rank0", "rank1"):
            found = torch.load(tmp_path / "together" / rank / f"{step:03d}")
            for name, grad in truth.items():
                error = (found[name] - grad).abs().max()
                assert error <= 1e-12 * grad.abs().max(), (rank, step, name)
            assert found.keys() == truth.keys()


def test_a_resumed_run_matches_an_uninterrupted_one(tiny: Recipe, tmp_path: Path) -> None:
    """With dropout, so that the random state of each process matters; one receives SIGTERM."""
    recipe = replace(tiny, dropout=0.1)
    train(replace(recipe, out=str(tmp_path / "whole")))
    stopped = run(*TORCHRUN, script(tmp_path, STOPPING), *options(recipe), check=False)
    assert "stopped at step 6 and saved" in stopped.stdout
    (tmp_path / "run" / "tensorboard").touch()  # a file instead of a folder: TensorBoard fails
    resume = ["--resume", recipe.out or "", "--log", "tensorboard"]
    resumed = run(*TORCHRUN, "-m", "--", "fastgpt.train", *resume)  # --: torchrun also has --log
    assert "TensorBoard is not available" in resumed.stderr
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(tiny: Recipe, tmp_path: Path) -> None:
    """Two processes with FSDP and weight averaging, then one; compared with one process only."""
    recipe = replace(tiny, parallel="fsdp", ema=0.9, patience=10)
    stopped = run(*TORCHRUN, script(tmp_path, STOPPING), *options(recipe), check=False)
    assert "view tensor" not in stopped.stderr
    assert find_checkpoint(tmp_path / "run").step == 6
    Trainer.resume(tmp_path / "run").fit()
    Trainer(replace(recipe, out=str(tmp_path / "alone"))).fit()
    assert_close(tmp_path / "alone", tmp_path / "run")


def test_a_run_restarted_by_torchrun_matches_an_uninterrupted_one(
    tiny: Recipe, tmp_path: Path
) -> None:
    train(replace(tiny, out=str(tmp_path / "whole")))
    code = script(tmp_path, DYING)
    torchrun = [*TORCHRUN, "--max-restarts=1", "--monitor-interval=0.1"]
    done = run(*torchrun, code, *options(tiny))
    assert done.stdout.count("run folder:") == 2
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_without_restarts_a_killed_process_ends_the_run(tiny: Recipe, tmp_path: Path) -> None:
    code = script(tmp_path, DYING)
    done = run(*TORCHRUN, "--monitor-interval=0.1", code, *options(tiny), check=False)
    assert done.returncode != 0
    assert find_checkpoint(tmp_path / "run").step == 4


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_the_same_step(tiny: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny, max_steps=1_000_000, eval_interval=1_000_000)
    command = [*TORCHRUN, "-m", "fastgpt.train", *options(recipe)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        began = time.monotonic()
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None
            assert time.monotonic() - began < SECONDS
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=SECONDS)
    assert "and saved; resume with" in out
    step = find_checkpoint(tmp_path / "run").step
    assert f"stopped at step {step:,}" in out


@pytest.mark.slow
def test_a_mistake_is_told_by_every_process(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    done = run(*TORCHRUN, "-m", "fastgpt.train", *options(tiny), check=False)
    assert done.returncode != 0
    assert "run is not empty; continue it with --resume" in done.stderr
    assert "UsageError" not in done.stderr  # no traceback


@given(
    processes=st.integers(1, 8),
    per_process=st.integers(1, 40),
    micro_batch=st.integers(1, 50),
)
def test_a_step_is_shared_out_completely(
    processes: int, per_process: int, micro_batch: int
) -> None:
    taken: list[int] = []
    for rank in range(processes):
        world = World()
        world.size, world.rank = processes, rank
        for first, count in split_step(processes * per_process, micro_batch, world):
            assert 1 <= count <= micro_batch
            taken += range(first, first + count)
    assert taken == list(range(processes * per_process))


def test_a_step_that_cannot_be_shared_equally_is_refused() -> None:
    world = World()
    world.size = 8
    with pytest.raises(UsageError, match=r"12 sequences per step .* between 8 processes"):
        split_step(12, 12, world)
