"""Benchmark programs that use internals of the trainer and of run folders, with tiny models."""

from pathlib import Path
from typing import Any

from torch.testing import assert_close

from benchmarks import compare_step
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
