"""A small recipe, for the tests that train a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgpt import Recipe


def tiny_recipe(data: Path, out: Path, **changes: Any) -> Recipe:
    """Return a recipe whose training takes about a second, with changed settings."""
    recipe = Recipe(
        data=str(data),
        out=str(out),
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        max_steps=12,
        warmup_steps=2,
        lr=1e-2,
        eval_interval=4,
        sample_tokens=20,
        device="cpu",
        dtype="float32",  # "auto" is decided by timing, so that two runs could differ
    )
    return replace(recipe, **changes)
