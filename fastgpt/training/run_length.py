"""How long a run is, and how often it is evaluated, where its recipe leaves that to the data."""

from dataclasses import replace

from fastgpt.training.recipes import Recipe

EVALUATIONS = 20  # in a run
MOST_EVALUATIONS = 100  # where epochs are so short that one in each would be more


def settle_length(recipe: Recipe, n_windows: int) -> tuple[Recipe, str | None]:
    """Return the recipe with its steps in numbers, and a line about them; None if all were given.

    n_windows: the sequences of an epoch. What was settled is not asked for any more, so that a
    resume may change it.
    """
    if recipe.epochs is None and recipe.eval_interval:
        return recipe, None
    sequences = recipe.batch_size * recipe.grad_accum
    steps, warmup_steps = recipe.max_steps, recipe.warmup_steps
    if recipe.epochs is not None:
        steps = max(1, round(recipe.epochs * n_windows / sequences))
        warmup_steps = min(warmup_steps, steps // 10)
    interval = recipe.eval_interval or _interval(steps, n_windows // sequences)
    asked = "" if recipe.epochs is None else f"--epochs {recipe.epochs:g}: "
    note = f"{asked}{steps:,} steps ({warmup_steps:,} of warm-up), evaluated every {interval:,}"
    settled = replace(
        recipe, max_steps=steps, warmup_steps=warmup_steps, eval_interval=interval, epochs=None
    )
    return settled, note


def _interval(steps: int, steps_of_an_epoch: int) -> int:
    """Return the steps between evaluations: a twentieth of the run, or an epoch if it is less."""
    shortest = -(-steps // MOST_EVALUATIONS)
    return min(-(-steps // EVALUATIONS), max(shortest, steps_of_an_epoch))
