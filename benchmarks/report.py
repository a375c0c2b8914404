"""Convert the JSON output of pytest-benchmark to Markdown tables and a bar chart.

    pytest benchmarks/ --benchmark-only --benchmark-json=results.json
    python benchmarks/report.py results.json --out results.md

The chart is written to the folder of the Markdown file, with the same name. "Speedup" is relative
to the baseline of the group, the most common alternative: 2 is twice as fast. Each benchmark gives
its name and that of its baseline as `variant` and `baseline` in its `extra_info`. Without them, the
first benchmark of a group is the baseline.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import markdown_table

OURS = ("fastgpt", "ours")  # prefixes of the names of fastgpt's variants
RATES = ("tokens/s", "MB/s")
LINE_INCHES = 0.2  # height of a bar in the chart
GROUP_LINES = 1.5  # height of a group's title and the space before the next one, in lines


@dataclass(frozen=True)
class Entry:
    """Result of one benchmark; times are in seconds."""

    variant: str
    median: float
    quartiles: tuple[float, float]
    rate: str
    is_baseline: bool


Groups = dict[str, list[Entry]]


def main(
    results: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("benchmarks.md"),
    chart: Literal["svg", "png"] = "svg",
) -> None:
    """Write the report of a benchmark run.

    Args:
        results: the JSON file of --benchmark-json.
        out: the Markdown file to write.
        chart: the format of the chart.
    """
    data = json.loads(results.read_text(encoding="utf-8"))
    groups = read_groups(data["benchmarks"])
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_suffix(f".{chart}")
    draw(groups, picture)
    out.write_text(markdown(groups, conditions(data), picture.name), encoding="utf-8")
    print(f"wrote {out} and {picture}")


def read_groups(benchmarks: list[dict[str, Any]]) -> Groups:
    """Return the results by group, in the order in which they ran."""
    groups: Groups = {}
    for result in benchmarks:
        entries = groups.setdefault(result["group"] or result["name"], [])
        info, stats = result["extra_info"], result["stats"]
        variant = info.get("variant") or result.get("param") or result["name"]
        baseline = variant == info["baseline"] if "baseline" in info else not entries
        rates = [f"{info[unit]:,.0f} {unit}" for unit in RATES if unit in info]
        quartiles = (stats["q1"], stats["q3"])
        entries.append(Entry(variant, stats["median"], quartiles, "".join(rates), baseline))
    return groups


def speeds(entries: list[Entry]) -> list[float | None]:
    """Return the speedup of each entry over the baseline; None if the baseline did not run."""
    base = next((entry.median for entry in entries if entry.is_baseline), None)
    return [base / entry.median if base else None for entry in entries]


# --- Markdown ----------------------------------------------------------------------------------


def markdown(groups: Groups, under: str, picture: str) -> str:
    """Return the text of the report: the conditions, the chart, and one table per group."""
    parts = [
        "# Benchmarks",
        f"{under} Medians with quartiles in brackets; the speedup is relative to the bold line.",
        f"![Speedup over each group's baseline]({picture})",
        *(f"## {name}\n\n{table(entries)}" for name, entries in groups.items()),
    ]
    return "\n\n".join(parts) + "\n"


def table(entries: list[Entry]) -> str:
    """Return one group as a Markdown table, with a column of rates if any entry has one."""
    throughput = ["throughput"] if any(entry.rate for entry in entries) else []
    header = ["variant", "time", *throughput, "speedup"]
    rows = []
    for entry, speed in zip(entries, speeds(entries), strict=True):
        name = f"**{entry.variant}**" if entry.is_baseline else entry.variant
        low, high = entry.quartiles
        timing = f"{duration(entry.median)} [{duration(low)}, {duration(high)}]"
        rate = [entry.rate] if throughput else []
        rows.append([name, timing, *rate, f"{speed:.2f}" if speed else ""])
    return "\n".join(markdown_table(header, rows, numbers=len(header) - 1))


def duration(seconds: float) -> str:
    """Return a time with three digits in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def conditions(data: dict[str, Any]) -> str:
    """Return the machine and the package versions of the results as one sentence."""
    machine = data["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine["machine"]
    infos = [result["extra_info"] for result in data["benchmarks"]]
    seen = {
        key: sorted({str(info[key]) for info in infos if key in info})
        for key in ("device", "torch", "threads")
    }
    return (
        f"{machine['system']}, {cpu}, Python {machine['python_version']}, PyTorch "
        f"{', '.join(seen['torch'])}, {', '.join(seen['threads'])} threads, devices: "
        f"{', '.join(seen['device'])}."
    )


# --- the chart ---------------------------------------------------------------------------------


def draw(groups: Groups, path: Path) -> None:
    """Draw the speedups of each group as bars; the bars of fastgpt are blue."""
    n_lines = sum(len(entries) + GROUP_LINES for entries in groups.values())
    figure = Figure(figsize=(8, LINE_INCHES * n_lines + 1), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="black", linewidth=0.5)
    ticks, labels, y = [], [], 0.0
    for name, entries in groups.items():
        axes.text(0.0, y, name, fontsize=8, fontweight="bold", va="center")
        heights = [y + line + 1 for line in range(len(entries))]
        colors = ["C0" if entry.variant.startswith(OURS) else "0.6" for entry in entries]
        bars = axes.barh(heights, [speed or 0.0 for speed in speeds(entries)], color=colors)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        ticks += heights
        labels += [entry.variant for entry in entries]
        y += len(entries) + GROUP_LINES
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(y, -1.0)  # inverted: the first group is on top
    axes.set_xlabel("speedup over the baseline (longer is faster)")
    figure.savefig(path)


if __name__ == "__main__":
    tyro.cli(main)
