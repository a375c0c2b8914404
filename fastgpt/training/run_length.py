"""Compute the number of steps and the evaluation interval from the size of the training data."""

from dataclasses import replace

from fastgpt.training.recipes import Recipe
from fastgpt.utils.progress import plural

EVALUATIONS = 20  # per run, by default
MOST_EVALUATIONS = 100  # per run, where one evaluation per epoch would be more


def resolve_length(recipe: Recipe, n_windows: int) -> tuple[Recipe, str | None]:
    """Replace `epochs` and an `eval_interval` of 0 by numbers of steps.

    Args:
        recipe: The recipe. If it has `epochs`, the warm-up is limited to a tenth of the steps.
        n_windows: The number of sequences per epoch.

    Returns:
        The recipe with `max_steps`, `warmup_steps` and `eval_interval` filled in and `epochs`
        cleared (so that a resume may change `max_steps`), and a message with these values. If the
        recipe already has all values, it is returned unchanged, with None.
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
    length = f"{plural(steps, 'step')} ({warmup_steps:,} of warm-up)"
    note = f"{asked}{length}, evaluated every {interval:,}"
    resolved = replace(
        recipe, max_steps=steps, warmup_steps=warmup_steps, eval_interval=interval, epochs=None
    )
    return resolved, note


def _interval(steps: int, steps_of_an_epoch: int) -> int:
    """Return the steps between evaluations: 1/20 of the run or one epoch, whichever is less.

    At most `MOST_EVALUATIONS` evaluations result, also if epochs are shorter.
    """
    shortest = -(-steps // MOST_EVALUATIONS)
    return min(-(-steps // EVALUATIONS), max(shortest, steps_of_an_epoch))
