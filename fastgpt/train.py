"""`python -m fastgpt.train [RECIPE] [--data my.txt] [--any-setting value]`: train a model.

The options are the fields of `fastgpt.training.recipes.Recipe`.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fastgpt.training.recipes import DESCRIPTIONS, Recipe, get_recipe
from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError
from fastgpt.utils.output import optional_output

if TYPE_CHECKING:
    from fastgpt.training.trainer import Trainer

DEFAULT_RECIPE = "shakespeare-char"
# Without a recipe, but with --data; and also with --init.
DEFAULT_FOR_DATA, DEFAULT_FOR_INIT = "small", "finetune"


def main(args: Sequence[str]) -> None:
    """Train the recipe named by the first argument with the given settings, or resume a run.

    A new run is named after its recipe or, if only `--data` is given, after its data.
    """
    run, args = _take_resume(args)
    if run is not None:
        _fit(run=run, changes=_changes(args, run))
        return
    name, defaults = _choose_recipe(args)
    recipe = _parse_length(defaults, args)
    _fit(recipe=recipe, name=name, changes=_given(recipe, args))


def _fit(
    *, changes: dict[str, Any], recipe: Recipe | None = None, name: str = "", run: Path = Path()
) -> None:
    """Train a recipe, or continue a run.

    changes: the settings given on the command line. torch is imported here, after the arguments
    have been checked.
    """
    from fastgpt.training.trainer import Trainer

    trainer = Trainer(recipe, name, changes) if recipe else Trainer.resume(run, **changes)
    with optional_output():
        _report(trainer)


def _report(trainer: "Trainer") -> None:
    """Train, and print the result and the next command."""
    from fastgpt.training.loss_curves import loss_in_text
    from fastgpt.utils.signals import Stopped

    try:
        result = trainer.fit()
    except Stopped as stopped:
        if trainer.world.is_main:
            print(stopped)
        sys.exit(stopped.exit_code)
    if not trainer.world.is_main:
        return
    print(f"\n{loss_in_text(result.run)}\n\n{result.sample}\n")
    print(
        f"{result.losses}, after {result.seconds / 60:.1f} minutes; "
        f"loss curve: {result.run / 'loss.png'}"
    )
    print(f"generate more:  python -m fastgpt.generate {shlex.quote(str(result.run))}")


def _choose_recipe(args: list[str]) -> tuple[str, Recipe]:
    """Return the name of the run and its recipe; remove the recipe's name from the arguments."""
    if args and not args[0].startswith("-"):
        return args[0], get_recipe(args.pop(0))
    data = _take_option(args, "--data")[0]
    if not data or data == get_recipe(DEFAULT_RECIPE).data:
        return DEFAULT_RECIPE, get_recipe(DEFAULT_RECIPE)
    stem = Path(data).name.split(".")[0]
    init = _take_option(args, "--init")[0]
    recipe = get_recipe(DEFAULT_FOR_INIT if init else DEFAULT_FOR_DATA)
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "run", recipe


def _parse(defaults: Recipe, args: Sequence[str]) -> Recipe:
    return tyro.cli(
        Recipe,
        default=defaults,
        args=args,
        prog="python -m fastgpt.train [RECIPE]",
        description=_description(),
    )


def _parse_length(defaults: Recipe, args: Sequence[str]) -> Recipe:
    """Parse settings; `max_steps` replaces the recipe's own `epochs`."""
    if not any(arg.split("=", 1)[0] in ("--max-steps", "--max_steps") for arg in args):
        return _parse(defaults, args)
    recipe = _parse(dataclasses.replace(defaults, epochs=None), args)
    if recipe.epochs is not None:
        raise UsageError("give --max-steps or --epochs, not both")
    return recipe


def _description() -> str:
    recipes = "\n".join(f"  {name:<18}{text}" for name, text in DESCRIPTIONS.items())
    return (
        "Train a GPT-2. With no arguments: shakespeare-char, on the packaged text. With --data "
        "alone: small, on your text, and with --data and --init: finetune.\n\n"
        f"Recipes:\n{recipes}\n\n"
        "Continue a run with --resume RUN; further settings replace those of the run."
    )


def _take_resume(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the run folder after `--resume`, if there is one, and the other arguments."""
    run, others = _take_option(args, "--resume")
    if run == "":
        raise UsageError("--resume needs the run folder to continue, e.g. runs/latest")
    return None if run is None else Path(run), others


def _take_option(args: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, "" if it has none, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", nargs="?", const="")
    found, others = parser.parse_known_args(args)
    return found.value, others


def _changes(args: Sequence[str], run: Path) -> dict[str, Any]:
    """Return the settings in `args` that differ from those the run was started with."""
    from fastgpt.checkpoint.load import resolve_run
    from fastgpt.training.run_folder import read_run

    _, before = read_run(resolve_run(run))
    return _different(before, _parse(before, args))


def _given(recipe: Recipe, args: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the arguments name, also where they equal the recipe's."""
    options = {arg.split("=", 1)[0].replace("-", "_") for arg in args if arg.startswith("--")}
    settings = dataclasses.asdict(recipe)
    return {name: settings[name] for name in settings if {f"__{name}", f"__no_{name}"} & options}


def _different(before: Recipe, after: Recipe) -> dict[str, Any]:
    """Return the settings of `after` that differ from `before`."""
    settings = dataclasses.asdict(after)
    return {name: value for name, value in settings.items() if value != getattr(before, name)}


if __name__ == "__main__":
    cli.run(main)
