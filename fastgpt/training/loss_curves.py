"""Plot the loss curves of runs from their `metrics.jsonl`: as image, table, or in the terminal."""

import itertools
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.training.metrics import read_metrics
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_file

Points = list[tuple[float, float]]
Bounds = tuple[float, float, float, float]  # min x, max x, min y, max y
Cell = tuple[str, int]  # a character of a text plot, and the index of its curve
Paint = Callable[[str, int], str]

BLANK: Cell = (" ", 0)
COLORS = (34, 33, 32, 31, 35, 36)  # of a terminal: blue, yellow, green, red, magenta, cyan
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

    found: dict[Path, Path] = {}  # the folders as they were given, by their resolved paths
    for folder in map(resolve_run, folders):
        found.setdefault(folder.resolve(), folder)
    runs = []
    for folder, name in zip(found.values(), _unique_names(found), strict=True):
        records = read_metrics(folder / "metrics.jsonl")
        if not records:
            raise UsageError(f"{folder / 'metrics.jsonl'} has no records: nothing was trained yet")
        recipe = read_json(folder / "config.json").get("recipe")
        settings = recipe if isinstance(recipe, dict) else {}
        runs.append(Run(name, folder, records, settings))
    return runs


def plot_losses(run: Path) -> Path:
    """Plot the losses of a run folder to its `loss.png`, and return the path of the image."""
    return draw([_run_of(run)], run / "loss.png")


def loss_in_text(run: Path, width: int | None = None, height: int = 12) -> str:
    """Return a text plot of the training and validation losses of a run folder."""
    one = _run_of(run)
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
    lines = {}
    for index, run in enumerate(runs):
        for key, label in LABELS.items():
            points = run.curve(key, x)
            if points:
                color = f"C{index}" if len(runs) > 1 else None
                name = f"{run.name}, {label}" if len(runs) > 1 else label
                (lines[name],) = axes.plot(*zip(*points, strict=True), color=color, **_STYLES[key])
    if len(runs) == 1:
        axes.set_title(runs[0].name, parse_math=False)
    axes.grid(alpha=0.3)
    legend = axes.legend(lines.values(), lines.keys())
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name can contain $
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
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in ("", *(run.name for run in runs))))
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
    color: bool | None = None,
) -> str:
    """Return a text plot of curves, with a frame that shows the ranges.

    The curves are drawn with Braille characters of 2 x 4 dots. If there are several, each has a
    letter at its end, and a color. If `ascii_only`, they are drawn with their letters, a single one
    with asterisks.

    Args:
        curves: The points of each curve, by name.
        width: The width of the plot area in characters, without the frame. By default at most 72,
            or less in a narrow terminal.
        height: The height of the plot area in lines.
        label: The label of the horizontal axis.
        ascii_only: Whether to avoid Braille characters; by default, if the encoding of the standard
            output does not support them.
        color: Whether to color several curves; by default, if the standard output is a terminal and
            the environment variable NO_COLOR is not set.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return "(no points)"
    if width is None:
        width = max(20, min(72, shutil.get_terminal_size().columns - FRAME - 1))
    if ascii_only is None:
        ascii_only = not _can_print("⣿")
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    bounds = _bounds(curves)
    draw_lines = _letter_lines if ascii_only else _braille_lines
    lines = draw_lines(curves, bounds, width, height)
    paint = _colored if color and len(curves) > 1 else _plain
    rows = ["".join(paint(*cell) for cell in line).rstrip() for line in lines]
    return "\n".join(_framed(rows, bounds, width, label) + _legend(list(curves), width, paint))


_STYLES: dict[str, dict[str, Any]] = {
    "loss": {"linewidth": 0.8, "alpha": 0.6},
    "val_loss": {"linewidth": 1.8, "marker": "o", "markersize": 3},
}


def _run_of(folder: Path) -> Run:
    """Return the run of a folder, without its settings."""
    return Run(_printable(folder.name), folder, read_metrics(folder / "metrics.jsonl"))


def _unique_names(folders: Mapping[Path, Path]) -> list[str]:
    """Return a name for each folder: its own or, where several have that, its path as given.

    folders: the folders as they were given, by their resolved paths.
    """
    names = [_printable(path.name) for path in folders]
    names = [
        name if names.count(name) == 1 else _printable(str(folder))
        for name, folder in zip(names, folders.values(), strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"  # paths that are not UTF-8
        for number, name in enumerate(names, start=1)
    ]


def _printable(name: str) -> str:
    """Return a file name with its bytes that are not UTF-8 replaced by U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


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


def _bounds(curves: dict[str, Points]) -> Bounds:
    """Return (min x, max x, min y, max y), widened slightly if min and max are equal."""
    xs, ys = zip(*(point for points in curves.values() for point in points), strict=True)
    return min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(max(ys), min(ys) + 1e-9)


def _letter_lines(
    curves: dict[str, Points], bounds: Bounds, width: int, height: int
) -> list[list[Cell]]:
    """Draw curves with one character each: the letter of the curve, or an asterisk for a single."""
    lines = [[BLANK] * width for _ in range(height)]
    for index, points in enumerate(curves.values()):
        mark = _letter(index) if len(curves) > 1 else "*"
        for column, row in _pixels(points, bounds, width, height):
            lines[row][column] = (mark, index)
    return lines


def _braille_lines(
    curves: dict[str, Points], bounds: Bounds, width: int, height: int
) -> list[list[Cell]]:
    """Draw curves with Braille characters; if there are several, with a letter at each end."""
    lines, ends = [[BLANK] * width for _ in range(height)], []
    for index, points in enumerate(curves.values()):
        for x, y in _pixels(points, bounds, 2 * width, 4 * height):
            column, row = x // 2, y // 4
            lines[row][column] = (_add_dot(lines[row][column][0], x % 2, y % 4), index)
        ends.append((column, row))
    taken: set[tuple[int, int]] = set()
    for index, (column, row) in enumerate(ends if len(curves) > 1 else []):
        free = [r for r in range(height) if (column, r) not in taken]  # curves can end together
        nearest = min(free, key=lambda r: abs(r - row), default=row)
        lines[nearest][column] = (_letter(index), index)
        taken.add((column, nearest))
    return lines


def _pixels(points: Points, bounds: Bounds, width: int, height: int) -> list[tuple[int, int]]:
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


def _framed(rows: list[str], bounds: Bounds, width: int, label: str) -> list[str]:
    """Return the lines of a plot with axes, the ranges of y and x, and the label."""
    left, right, low, high = bounds
    marks = {0: f"{high:.3f}", len(rows) - 1: f"{low:.3f}"}
    framed = [f"{marks.get(index, ''):>9} |{row}" for index, row in enumerate(rows)]
    ends = f"{left:,.0f}", f"{right:,.0f}"
    middle = label.center(width - len(ends[0]) - len(ends[1]))
    framed.append(f"{'':>9} +{'-' * width}")
    framed.append(f"{'':>11}{ends[0]}{middle}{ends[1]}")
    return framed


def _legend(names: Sequence[str], width: int, paint: Paint) -> list[str]:
    """Return the letters and names of several curves: in one line, or one each if it is longer."""
    if len(names) == 1:
        return []
    fits = sum(len(name) + 4 for name in names) - 2 <= width
    entries = [f"{paint(_letter(index), index)} {name}" for index, name in enumerate(names)]
    return [" " * FRAME + line for line in (["  ".join(entries)] if fits else entries)]


def _letter(index: int) -> str:
    return chr(ord("a") + index % 26)


def _plain(character: str, _index: int) -> str:
    return character


def _colored(character: str, index: int) -> str:
    """Return a character in the color of a curve; a blank one is not colored."""
    color = COLORS[index % len(COLORS)]
    return character if character == " " else f"\x1b[{color}m{character}\x1b[0m"
