"""`python -m fastgpt.plot runs/a runs/b`: compare runs by their loss curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastgpt.training.loss_curves import (
    LABELS,
    axis_label,
    draw,
    print_table,
    read_runs,
    text_curve,
)
from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Compare runs: their losses in one picture, and a table of what they came to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; runs/latest stands for the newest."""
    out: Path | None = None
    """The picture: .png, .svg or .pdf; by default loss.png in the folder of the only run, else
    compare.png."""
    x: Literal["step", "tokens", "time"] = "step"
    """What the curves are drawn over; time leaves out evaluations."""


def main(args: Sequence[str]) -> None:
    """Draw the picture, and print its path, the table and the curve."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.plot")
    if not options.runs:
        raise UsageError("name the runs to compare, say runs/latest")
    runs = read_runs(options.runs)
    only = runs[0].folder / "loss.png" if len(runs) == 1 else Path("compare.png")
    picture = draw(runs, options.out or only, options.x)
    print_table(runs)
    evaluated = all(len(run.curve("val_loss", options.x)) >= 3 for run in runs)
    key = "val_loss" if evaluated else "loss"
    curves = {run.name: run.curve(key, options.x) for run in runs}
    print(text_curve(curves, label=f"{LABELS[key]} loss over {axis_label(options.x)}"))
    print(f"picture: {picture}")


if __name__ == "__main__":
    cli.run(main)
