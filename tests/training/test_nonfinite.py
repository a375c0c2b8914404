"""Tests of the reports about skipped updates."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.training.nonfinite import SkippedUpdates


class Arrival:
    """A fake CUDA event that the test completes explicitly."""

    def __init__(self) -> None:
        self.happened = self.waited_for = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.waited_for = not self.happened


class Delayed(SkippedUpdates):
    """Results arrive asynchronously, as on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[Arrival] = []

    def _send(self, pair: Tensor) -> tuple[Tensor, Any]:
        self.arrivals.append(Arrival())
        return pair, self.arrivals[-1]


def add(updates: SkippedUpdates, counts: list[int], first: int = 1) -> None:
    for step, count in enumerate(counts, first):
        norm = torch.tensor(math.nan if count else 1.0)
        updates.add(step, torch.tensor(float(count)), norm)


def steps(streaks: list[tuple[int, float]]) -> list[int]:
    assert all(math.isnan(norm) for _, norm in streaks)
    return [step for step, _ in streaks]


def test_on_a_cpu_each_streak_is_known_at_once_and_once() -> None:
    updates = SkippedUpdates()
    add(updates, [0, 1])
    assert steps(updates.new_streaks()) == [2]
    add(updates, [2, 3, 0, 1], first=3)
    assert steps(updates.new_streaks()) == [6]
    assert updates.new_streaks() == []


def test_word_that_comes_later_is_not_waited_for_and_none_is_lost() -> None:
    updates = Delayed()
    add(updates, [1, 0, 1, 2])
    assert updates.new_streaks() == []
    for arrival in updates.arrivals[:3]:
        arrival.happened = True
    add(updates, [3], first=5)
    assert steps(updates.new_streaks()) == [1, 3]
    assert not any(arrival.waited_for for arrival in updates.arrivals)
    add(updates, [0, 1], first=6)
    assert steps(updates.new_streaks(wait=True)) == [7]
    assert updates.arrivals[-1].waited_for
