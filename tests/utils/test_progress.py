"""Tests of the live line: its figures and where it is written."""

import io
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt.utils.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines as a terminal shows them."""
        shown = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            shown.append("".join(cells).rstrip())
        return shown


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr("fastgpt.utils.progress.sys", SimpleNamespace(stdout=terminal))
    return terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by the number in the returned list, which tests can change."""
    now = [100.0]
    monkeypatch.setattr("fastgpt.utils.progress.time.perf_counter", lambda: now[0])
    return now


def test_the_line_has_all_figures(terminal: Terminal, clock: list[float]) -> None:
    known: dict[str, Any] = {"flops_per_token": 1e6, "peak": 4e9, "memory": lambda: 11_200_000_000}
    with Progress(0, 1000, **known) as progress:
        progress.stepped(1, 500)
        clock[0] += 10  # kernels are compiled
        progress.show(4.0, 1e-3, 2.0)
        for step in (2, 3):
            progress.stepped(step, 500)
            clock[0] += 0.5
        progress.show(3.21, 6e-4, 1.5)
        assert terminal.screen() == [
            "step 3/1,000  loss 3.2100  lr 6.00e-04  norm 1.50  1,000 tokens/s  MFU 25.0%  "
            "11.2 GB  8:18 left"
        ]
        assert progress.figures() == {
            "tokens_per_s": 1000.0,
            "seconds": 11.0,
            "mfu": 0.25,
            "memory_gb": 11.2,
        }
    assert terminal.screen() == [""]


def test_lines_are_said_above_it(terminal: Terminal, clock: list[float]) -> None:
    progress = Progress(0, 10)
    progress.stepped(1, 100)
    clock[0] += 1
    progress.show(1.0, 1e-3)
    progress.say("a sample")
    sample, live = terminal.screen()
    assert sample == "a sample"
    assert live.startswith("step 1/10  loss 1.0000")


def test_a_narrow_terminal_does_not_wrap(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    progress = Progress(0, 10)
    progress.show(1.0, 1e-3)
    assert len(terminal.screen()[0]) == 19


def test_elsewhere_there_are_plain_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 10) as progress:
        progress.stepped(1, 100)
        progress.show(1.0, 1e-3, 1.0)
        assert capsys.readouterr().out == ""
        progress.evaluated("2.0000")
    out = capsys.readouterr().out
    assert out.startswith("step      1/10  train loss 1.0000  validation loss 2.0000")
    assert "\r" not in out


def test_other_processes_count_and_say_nothing(terminal: Terminal) -> None:
    with Progress(0, 10, shown=False) as progress:
        progress.stepped(1, 100)
        progress.show(1.0, 1e-3)
        progress.evaluated("2.0000")
        progress.say("hello")
    assert terminal.getvalue() == ""
    assert progress.tokens_per_s > 0


def test_the_time_left_counts_evaluations_too(clock: list[float]) -> None:
    progress = Progress(100, 200, seconds=50.0)
    assert math.isnan(progress.seconds_left())
    for step in range(101, 111):
        progress.stepped(step, 10)
        clock[0] += 2
    with progress.paused():
        clock[0] += 10
    progress.show(1.0, 1e-3)
    assert progress.seconds_left() == pytest.approx(90 * 3)
    assert progress.seconds() == pytest.approx(70)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.9, "0:07"), (754, "12:34"), (18083, "5:01:23"), (273900, "3 d 04:05"), (math.nan, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_it_costs_next_to_nothing(terminal: Terminal) -> None:
    """Check the cost, about 1 µs per step and 50 µs per line, with a margin for busy cores."""
    progress = Progress(0, 10**6, flops_per_token=1e6, peak=1e12)
    steps, lines = (min(_timed(progress, shown) for _ in range(5)) for shown in (False, True))
    assert steps < 20e-6
    assert lines < 400e-6


def _timed(progress: Progress, shown: bool) -> float:
    began = time.perf_counter()
    for _ in range(100):
        progress.stepped(progress.step + 1, 768)
        if progress.due() or shown:
            progress.show(1.0, 1e-3, 1.0)
    return (time.perf_counter() - began) / 100
