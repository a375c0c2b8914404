"""Tests of the predefined recipes, and of the length of runs computed from their data."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import Recipe, Trainer
from fastgpt.training.recipes import DESCRIPTIONS, RECIPES, get_recipe, recipe_from_dict
from fastgpt.training.run_length import resolve_length
from fastgpt.utils.errors import UsageError

SMALL: dict[str, Any] = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 300},
    **{"batch_size": 2, "grad_accum": 1, "sample_tokens": 10, "eval_tokens": 100},
    **{"device": "cpu", "dtype": "float32"},
}
SOURCE: dict[str, Any] = {"max_steps": 1, "tokenizer": "gpt2", "bias": True}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name: str, verse: Path, tmp_path: Path) -> None:
    """Run a few steps of each recipe, with a smaller model and little text."""
    recipe = replace(get_recipe(name), data=str(verse), val_fraction=0.1, **SMALL)
    if recipe.init is not None:
        source = replace(Recipe(**SMALL, **SOURCE), data=str(verse), out=str(tmp_path / "source"))
        recipe = replace(recipe, init=str(Trainer(source).fit().run))
    steps = {"epochs": 0.01} if recipe.epochs else {"max_steps": 3}
    result = Trainer(replace(recipe, out=str(tmp_path / "run"), **steps), name).fit()
    assert 1 <= result.step <= 10
    assert result.best_val_loss < 15.0
    assert result.shows_perplexity == (name not in ("shakespeare-char", "small"))


def test_every_recipe_is_described() -> None:
    assert DESCRIPTIONS.keys() == RECIPES.keys()
    assert all(len(text) < 80 for text in DESCRIPTIONS.values())


def test_the_published_sizes() -> None:
    shapes = {
        name: (r.n_layer, r.n_head, r.n_embd, r.block_size, r.tokenizer)
        for name, r in RECIPES.items()
    }
    assert shapes["tinystories"] == (6, 8, 512, 256, "bpe")
    assert shapes["story-300k"] == (12, 12, 768, 256, "gpt2")
    assert shapes["bedtime-512"] == (12, 12, 768, 512, "gpt2")
    assert shapes["gpt2"] == (12, 12, 768, 1024, "gpt2")
    assert (RECIPES["story-300k"].lr, RECIPES["story-300k"].dropout) == (5e-4, 0.1)
    assert RECIPES["story-300k"].val_fraction == 0.1


# --- length ------------------------------------------------------------------------------------


@given(
    epochs=st.floats(0.01, 1000.0),
    n_windows=st.integers(1, 10**6),
    batch_size=st.integers(1, 64),
    warmup_steps=st.integers(0, 5000),
)
def test_a_run_of_epochs(epochs: float, n_windows: int, batch_size: int, warmup_steps: int) -> None:
    recipe = Recipe(
        epochs=epochs, eval_interval=0, batch_size=batch_size, warmup_steps=warmup_steps
    )
    resolved, note = resolve_length(recipe, n_windows)
    assert abs(resolved.max_steps * batch_size - epochs * n_windows) <= max(batch_size, 1)
    assert resolved.warmup_steps <= resolved.max_steps / 10
    assert resolved.warmup_steps <= warmup_steps
    evaluations = resolved.max_steps / resolved.eval_interval
    assert evaluations <= 100
    if resolved.max_steps >= 20:
        assert evaluations > 9
    per_epoch = n_windows // batch_size
    assert resolved.eval_interval <= max(1, per_epoch, -(-resolved.max_steps // 100))
    assert note is not None
    assert resolve_length(resolved, n_windows) == (resolved, None)


def test_the_length_in_words() -> None:
    recipe = Recipe(epochs=2.5, eval_interval=0, batch_size=10, grad_accum=2, warmup_steps=500)
    resolved, note = resolve_length(recipe, n_windows=1000)
    assert (resolved.max_steps, resolved.eval_interval, resolved.warmup_steps) == (125, 7, 12)
    assert note == "--epochs 2.5: 125 steps (12 of warm-up), evaluated every 7"


def test_short_epochs_are_evaluated_at_least_once_each() -> None:
    resolved, _ = resolve_length(Recipe(epochs=40.0, eval_interval=0, batch_size=1), n_windows=10)
    assert (resolved.max_steps, resolved.eval_interval) == (400, 10)


def test_steps_and_an_interval_that_are_given_stay() -> None:
    assert resolve_length(Recipe(), 1) == (Recipe(), None)
    kept, _ = resolve_length(Recipe(epochs=1.0, eval_interval=3, batch_size=1), 100)
    assert kept.eval_interval == 3


def test_a_run_goes_on_with_what_was_settled(verse: Path, tmp_path: Path) -> None:
    recipe = replace(Recipe(**SMALL), data=str(verse), out=str(tmp_path / "run"), eval_interval=0)
    trainer = Trainer(replace(recipe, epochs=0.02, lr=1e-3))
    n_windows = trainer.learner.batches.n_windows
    run = trainer.fit().run
    steps = round(0.02 * n_windows / 2)
    assert trainer.recipe.max_steps == trainer.step == steps
    again = Trainer.resume(run)
    assert again.recipe == trainer.recipe
    again.close()
    longer = Trainer.resume(run, epochs=0.04)
    assert longer.fit().step == round(0.04 * n_windows / 2)
    with pytest.raises(UsageError, match=r"already at step .*: raise --max-steps"):
        Trainer.resume(run, epochs=0.01)


@pytest.mark.parametrize("epochs", [0.0, -1.0, float("nan"), float("inf")])
def test_epochs_that_are_none(epochs: float) -> None:
    with pytest.raises(UsageError, match="epochs must be more than 0"):
        Recipe(epochs=epochs)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data", 5, "data must be a string, not 5"),
        ("val_data", [], r"val_data must be a string, not \[\]"),
        ("bias", "false", "bias must be true or false, not 'false'"),
        ("dropout", "0.1", "dropout must be a number, not '0.1'"),
        ("batch_size", 1.5, "batch_size must be an integer, not 1.5"),
        ("n_layer", None, "n_layer must be an integer, not None"),
        ("max_steps", 10**30, "max_steps must be at most"),
        ("log", 5, "a setting has a value of the wrong type"),
    ],
)
def test_saved_settings_of_a_wrong_type_are_rejected(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(UsageError, match=f"config.json: {expected}"):
        recipe_from_dict({**asdict(Recipe()), name: value}, "config.json")


def test_saved_settings_are_read() -> None:
    for recipe in (*RECIPES.values(), Recipe(dropout=0, epochs=3, eval_tokens=1e6)):  # type: ignore[arg-type]
        assert recipe_from_dict(json.loads(json.dumps(asdict(recipe))), "config.json") == recipe
