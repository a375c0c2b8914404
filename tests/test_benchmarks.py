"""Benchmark programs that use internals of the trainer and of run folders, with tiny models."""

from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from benchmarks import compare_step, quantized_loss
from fastgpt import Trainer
from tests.recipes import tiny_recipe


def test_both_sides_of_compare_step_learn_from_the_same_weights(
    tmp_path: Path, verse: Path
) -> None:
    recipe = tiny_recipe(verse, tmp_path / "run", tokenizer="char", max_steps=1000)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for name in compare_step.SIDES:
        compare_step.set_up(name, recipe)
        with compare_step.side.opened:
            compare_step.time_steps(0)
            before[name] = compare_step.describe()["loss"]
            compare_step.time_steps(20)
            after[name] = compare_step.describe()["loss"]
    assert_close(before["fastgpt"], before["nanogpt"], rtol=0, atol=1e-3)
    assert all(after[name] < before[name] - 0.1 for name in compare_step.SIDES)
    assert abs(after["fastgpt"] - after["nanogpt"]) < 0.2


def test_quantized_loss_finds_the_newest_run_and_its_validation_text(
    tmp_path: Path, verse: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    validation = tmp_path / "validation.txt"
    validation.write_text(verse.read_text(encoding="utf-8")[:600], encoding="utf-8")
    recipe = tiny_recipe(verse, tmp_path / "runs" / "first", val_data=str(validation))
    loss = Trainer(recipe).fit().best_val_loss
    capfd.readouterr()
    quantized_loss.main(tmp_path / "runs" / "latest")
    exact, *rounded = [float(line.split()[-2]) for line in capfd.readouterr().out.splitlines()]
    assert_close(exact, loss, rtol=1e-4, atol=0)
    assert len(rounded) == 4
    assert_close(rounded, 4 * [exact], rtol=0.05, atol=0)
