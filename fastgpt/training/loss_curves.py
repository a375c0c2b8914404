"""Plot the loss curves of runs from their `metrics.jsonl`: as image, table, or in the terminal."""

import itertools
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.training.metrics import read_metrics
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_file

Points = list[tuple[float, float]]
NOTHING = "-"  # shown for missing values
FRAME = 11  # characters to the left of a text curve: the y labels and the axis
AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}  # choices of x: key in a record
AXIS_LABELS = {"step": "steps", "tokens": "tokens", "time": "seconds of training"}
LABELS = {"loss": "training", "val_loss": "validation"}


@dataclass(frozen=True)
class Run:
    """The metrics and settings of a run, read from its folder."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def curve(self, key: str, x: str = "step") -> Points:
        """Return the points (x, value) of the records in which both are finite numbers."""
        axis = AXES[x]
        points = [(r[axis], r[key]) for r in self.records if _number(r, axis) and _number(r, key)]
        return [(float(a), float(b)) for a, b in points]

    def last(self, key: str) -> float | None:
        """Return the last finite value of a metric, None if there is none."""
        values = self.values(key)
        return values[-1] if values else None

    def values(self, key: str) -> list[float]:
        """Return the finite values of a metric."""
        return [float(record[key]) for record in self.records if _number(record, key)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, without duplicates.

    Runs are named after their folders, or by their paths if several folders have the same name.

    Raises:
        UsageError: If a folder is not a run folder or has no metrics.
    """
    from fastgpt.checkpoint.load import read_json, resolve_run

    folders = list(dict.fromkeys(resolve_run(folder) for folder in folders))
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        records = read_metrics(folder / "metrics.jsonl")
        if not records:
            raise UsageError(f"{folder / 'metrics.jsonl'} has no records: nothing was trained yet")
        recipe = read_json(folder / "config.json").get("recipe")
        settings = recipe if isinstance(recipe, dict) else {}
        unique = name if names.count(name) == 1 else str(folder)
        runs.append(Run(unique, folder, records, settings))
    return runs


def plot_losses(run: Path) -> Path:
    """Plot the losses of a run folder to its `loss.png`, and return the path of the image."""
    return draw([Run(run.name, run, read_metrics(run / "metrics.jsonl"))], run / "loss.png")


def loss_in_text(run: Path, width: int | None = None, height: int = 12) -> str:
    """Return a text plot of the training and validation losses of a run folder."""
    one = Run(run.name, run, read_metrics(run / "metrics.jsonl"))
    curves = {label: one.curve(key) for key, label in LABELS.items() if one.curve(key)}
    return text_curve(curves, width, height, label="loss over steps")


def draw(runs: Sequence[Run], picture: Path, x: str = "step") -> Path:
    """Plot the losses of several runs in one image, and return its path.

    Args:
        runs: The runs.
        picture: The file to write; its suffix determines the format (without one: .png, which is
            added).
        x: The horizontal axis, a key of `AXES`.

    Raises:
        UsageError: If a run has no losses to plot, or the image cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for run in runs:
        if not any(run.curve(key, x) for key in LABELS):
            raise UsageError(
                f"{run.folder / 'metrics.jsonl'} has no records with both a loss and {AXES[x]}"
            )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display and does not change pyplot's global state
    axes = figure.add_subplot(xlabel=AXIS_LABELS[x], ylabel="loss (nats per token)")
    for index, run in enumerate(runs):
        for key, label in LABELS.items():
            points = run.curve(key, x)
            if points:
                color = f"C{index}" if len(runs) > 1 else None
                name = f"{run.name}, {label}" if len(runs) > 1 else label
                axes.plot(*zip(*points, strict=True), label=name, color=color, **_STYLES[key])
    if len(runs) == 1:
        axes.set_title(runs[0].name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = picture if picture.suffix else picture.with_suffix(".png")
    try:
        with atomic_file(picture) as temporary:
            figure.savefig(temporary, dpi=120)
    except (OSError, ValueError) as error:  # missing folder, or unknown format
        raise UsageError(f"{picture} cannot be written: {error}") from None
    return picture


def print_table(runs: Sequence[Run]) -> None:
    """Print a table with one column per run: its results, then the settings that differ."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(run.name for run in runs))
    for name, show in _ROWS.items():
        table.add_row(name, *(show(run) for run in runs))
    table.add_section()
    for name in differing(runs):
        table.add_row(name, *(str(run.settings.get(name, NOTHING)) for run in runs))
    console = Console(highlight=False, safe_box=not _can_print("┃"))
    with console.capture() as text:  # print itself ends the process if the reader has exited
        console.print(table, markup=False)
    print(text.get(), end="")


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that differ between runs, except the folder (`out`)."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "out")
    return [n for n in names if any(r.settings.get(n) != runs[0].settings.get(n) for r in runs)]


def text_curve(
    curves: dict[str, Points],
    width: int | None = None,
    height: int = 12,
    label: str = "",
    ascii_only: bool | None = None,
) -> str:
    """Return a text plot of curves, with a frame that shows the ranges.

    A single curve is drawn with Braille characters of 2 x 4 dots, or with asterisks if
    `ascii_only`. Several curves are drawn with one letter each.

    Args:
        curves: The points of each curve, by name.
        width: The width of the plot area in characters, without the frame. By default at most 72,
            or less in a narrow terminal.
        height: The height of the plot area in lines.
        label: The label of the horizontal axis.
        ascii_only: Whether to avoid Braille characters; by default, if the encoding of the standard
            output does not support them.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return "(no points)"
    if width is None:
        width = max(20, min(72, shutil.get_terminal_size().columns - FRAME - 1))
    if ascii_only is None:
        ascii_only = not _can_print("⣿")
    dots = not ascii_only and len(curves) == 1
    across, down = (2, 4) if dots else (1, 1)  # pixels per character
    bounds = _bounds(curves)
    lines = [[" "] * width for _ in range(height)]
    for index, points in enumerate(curves.values()):
        mark = "*" if len(curves) == 1 else _letter(index)
        for column, row in _pixels(points, bounds, width * across, height * down):
            line, cell = lines[row // down], column // across
            line[cell] = _add_dot(line[cell], column % 2, row % 4) if dots else mark
    return "\n".join(_framed(["".join(line) for line in lines], curves, bounds, width, label))


_STYLES: dict[str, dict[str, Any]] = {
    "loss": {"linewidth": 0.8, "alpha": 0.6},
    "val_loss": {"linewidth": 1.8, "marker": "o", "markersize": 3},
}


def _best(run: Run) -> str:
    points = run.curve("val_loss")
    if not points:
        return NOTHING
    step, loss = min(points, key=lambda point: point[1])
    return f"{loss:.4f} at step {step:,.0f}"


def _speed(run: Run) -> str:
    """Return the median speed, which is robust against slow first steps and temporary load."""
    speeds = run.values("tokens_per_s")
    return f"{statistics.median_high(speeds):,.0f}" if speeds else NOTHING


def _time(run: Run) -> str:
    from fastgpt.utils.progress import duration

    seconds = run.last("seconds")
    return NOTHING if seconds is None else duration(seconds)


_ROWS = {
    "best validation loss": _best,
    "steps": lambda run: f"{run.records[-1]['step']:,}",
    "tokens": lambda run: NOTHING if run.last("tokens") is None else f"{run.last('tokens'):,.0f}",
    "tokens/s": _speed,
    "training time": _time,
}


def _number(record: dict[str, Any], key: str) -> bool:
    value = record.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _bounds(curves: dict[str, Points]) -> tuple[float, float, float, float]:
    """Return (min x, max x, min y, max y), widened slightly if min and max are equal."""
    xs, ys = zip(*(point for points in curves.values() for point in points), strict=True)
    return min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(max(ys), min(ys) + 1e-9)


def _pixels(
    points: Points, bounds: tuple[float, float, float, float], width: int, height: int
) -> list[tuple[int, int]]:
    """Return the (column, row) pixels of the lines between the points, row 0 at the top.

    Each segment is sampled at steps of at most one pixel in both directions.
    """
    left, right, low, high = bounds
    spots = [
        ((x - left) / (right - left) * (width - 1), (high - y) / (high - low) * (height - 1))
        for x, y in points
    ]
    passed = [(round(column), round(row)) for column, row in spots[:1]]
    for (x0, y0), (x1, y1) in itertools.pairwise(spots):
        steps = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        passed += [
            (round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps))
            for i in range(1, steps + 1)
        ]
    return passed


def _add_dot(character: str, column: int, row: int) -> str:
    """Add a dot to a Braille character, whose code point is U+2800 + the bits of its dots."""
    bit = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))[row][column]
    return chr((0x2800 if character == " " else ord(character)) | bit)


def _framed(
    rows: list[str],
    curves: dict[str, Points],
    bounds: tuple[float, float, float, float],
    width: int,
    label: str,
) -> list[str]:
    """Return the lines of a plot with axes, y and x ranges, label and (for several) a legend."""
    left, right, low, high = bounds
    marks = {0: f"{high:.3f}", len(rows) - 1: f"{low:.3f}"}
    framed = [f"{marks.get(index, ''):>9} |{row.rstrip()}" for index, row in enumerate(rows)]
    ends = f"{left:,.0f}", f"{right:,.0f}"
    middle = label.center(width - len(ends[0]) - len(ends[1]))
    framed.append(f"{'':>9} +{'-' * width}")
    framed.append(f"{'':>11}{ends[0]}{middle}{ends[1]}")
    if len(curves) > 1:
        names = "  ".join(f"{_letter(index)} {name}" for index, name in enumerate(curves))
        framed.append(f"{'':>11}{names}")
    return framed


def _letter(index: int) -> str:
    return chr(ord("a") + index % 26)
