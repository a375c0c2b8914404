"""Helpers shared by the benchmark programs: timing in turns, and the formats of results."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import quantiles
from typing import TypeVar

T = TypeVar("T")


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the time of `repeats` calls in seconds."""
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return time.perf_counter() - began


def interleaved(
    measurements: Mapping[str, Callable[[], T]],
    rounds: int = 1,
    *,
    min_seconds: float = 0.0,
    warm_up: int = 0,
) -> dict[str, list[T]]:
    """Run every measurement once per round, in turns, and return their results by name.

    The speed of a machine drifts over seconds; measurements that take turns are affected equally.

    Args:
        measurements: functions that return a result, for example a time in seconds.
        rounds: the number of rounds.
        min_seconds: rounds are added until this time has passed.
        warm_up: rounds before the first one whose results are discarded.
    """
    for _ in range(warm_up):
        for measure in measurements.values():
            measure()
    results: dict[str, list[T]] = {name: [] for name in measurements}
    n_done, until = 0, time.monotonic() + min_seconds
    while n_done < rounds or time.monotonic() < until:
        for name, measure in measurements.items():
            results[name].append(measure())
        n_done += 1
    return results


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the speedup of the times `ours` over the times `theirs` in each round."""
    return [their / our for our, their in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Return the median and the quartiles as text."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def markdown_table(
    header: Sequence[str], rows: Iterable[Iterable[object]], numbers: int = 0
) -> list[str]:
    """Return the lines of a Markdown table; the last `numbers` columns are right-aligned."""
    separator = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, separator, *rows)]
