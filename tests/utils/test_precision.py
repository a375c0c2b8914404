"""Tests of the selection of the precision."""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from fastgpt import Recipe, Trainer
from fastgpt.utils import precision
from fastgpt.utils.errors import UsageError
from fastgpt.utils.precision import Precision, choose_precision, fastest

CPU = torch.device("cpu")


def test_a_processor_without_units_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_units", lambda: None)
    (only,) = choose_precision("auto", CPU)
    assert str(only) == "float32 (this processor has no bfloat16 units)"


def test_with_units_a_trial_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_units", lambda: "AMX")
    candidates = choose_precision("auto", CPU)
    assert [c.name for c in candidates] == ["float32", "bfloat16"]
    slow = {torch.float32: 0.1, torch.bfloat16: 0.001}
    assert fastest(candidates, lambda p: time.sleep(slow[p.dtype])).name == "bfloat16"
    slow = {torch.float32: 0.001, torch.bfloat16: 0.1}
    found = fastest(candidates, lambda p: time.sleep(slow[p.dtype]))
    assert found.name == "float32"
    assert "a trial took" in str(found)
    assert "in bfloat16" in str(found)


def test_the_first_time_does_not_count_and_the_best_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TRIAL_SECONDS", 1.0)
    waits = {
        torch.float32: itertools.chain([0.2, 0.2], itertools.repeat(0.001)),
        torch.bfloat16: itertools.chain([0.001], itertools.repeat(0.1)),
    }
    both = [Precision(CPU, torch.float32), Precision(CPU, torch.bfloat16)]
    assert fastest(both, lambda p: time.sleep(next(waits[p.dtype]))).name == "float32"


def test_a_run_stays_with_what_it_found(verse, tmp_path, monkeypatch) -> None:
    """Check that a resumed run keeps its precision, since another trial could select another."""
    recipe = Recipe(
        data=str(verse), out=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=16,
        batch_size=4, max_steps=2, eval_interval=2, sample_tokens=1, device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(precision, "bfloat16_units", lambda: "AMX")
    monkeypatch.setattr(
        "fastgpt.training.step.fastest", lambda both, trial: (trial(both[1]), both[1])[1]
    )
    trainer = Trainer(recipe)
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.fit()
    monkeypatch.undo()
    resumed = Trainer.resume(tmp_path / "run", max_steps=4)
    assert resumed.learner.precision.name == "bfloat16"
    resumed.fit()


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="tf32 is for NVIDIA GPUs, not for cpu: use float32"):
        choose_precision("tf32", CPU)
    assert replace(Precision(CPU, torch.float32), tf32=True).name == "tf32"
