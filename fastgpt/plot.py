"""`python -m fastgpt.plot runs/a runs/b`: compare runs by their loss curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgpt.training.loss_curves import (
    AXIS_LABELS,
    LABELS,
    draw,
    print_table,
    read_runs,
    text_curve,
)
from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Compare runs: a plot of their losses, and a table of their results."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; runs/latest is the newest one."""
    out: Path | None = None
    """File of the plot: .png, .svg or .pdf; by default loss.png in the run folder for a single
    run, else compare.png."""
    x: Literal["step", "tokens", "time"] = "step"
    """Quantity of the x axis; time excludes evaluations."""


def main(args: Sequence[str]) -> None:
    """Draw the plot; print the table, the curve as text, and the path of the plot."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.plot")
    if not options.runs:
        raise UsageError("name the runs to compare, for example runs/latest")
    runs = read_runs(options.runs)
    only = runs[0].folder / "loss.png" if len(runs) == 1 else Path("compare.png")
    picture = draw(runs, options.out or only, options.x)
    print_table(runs)
    evaluated = all(len(run.curve("val_loss", options.x)) >= 3 for run in runs)
    key = "val_loss" if evaluated else "loss"
    curves = {run.name: run.curve(key, options.x) for run in runs}
    print(text_curve(curves, label=f"{LABELS[key]} loss over {AXIS_LABELS[options.x]}"))
    print(f"plot: {picture}")


if __name__ == "__main__":
    cli.run(main)
