"""Tests of the live line: its figures and where it is written."""

import io
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt.utils.progress import Progress, duration, plural


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


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            95,
            "step 3/4,500  loss 3.2100  lr 6.00e-04  38,000 tokens/s  MFU 25.0%  11.2 GB  "
            "2:17 left",
        ),
        (80, "step 3/4,500  loss 3.2100  38,000 tokens/s  MFU 25.0%  11.2 GB  2:17 left"),
        (70, "step 3/4,500  loss 3.2100  38,000 tokens/s  11.2 GB  2:17 left"),
        (50, "step 3/4,500  loss 3.2100  2:17 left"),
        (5, "step"),
    ],
)
def test_a_narrow_terminal_drops_the_least_important_figures(
    columns: int,
    line: str,
    terminal: Terminal,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    known: dict[str, Any] = {"flops_per_token": 1e6, "peak": 152e9, "memory": lambda: 11.2e9}
    progress = Progress(0, 4500, **known)
    progress.stepped(3, 3 * 1159)
    clock[0] += 3 * 0.0305
    progress.show(3.21, 6e-4, 1.5)
    assert terminal.screen() == [line]


def test_the_terminal_shows_that_an_evaluation_is_running(
    terminal: Terminal, clock: list[float]
) -> None:
    progress = Progress(0, 10)
    progress.stepped(5, 100)
    clock[0] += 1
    progress.show(1.0, 1e-3)
    with progress.paused("evaluating"):
        assert terminal.screen() == ["step 5/10  evaluating ..."]
        progress.evaluated("2.0000")
        assert terminal.screen()[1] == "step 5/10  evaluating ..."
    assert terminal.screen()[1].startswith("step 5/10  loss 1.0000")


def test_log_files_get_a_line_every_thirty_seconds(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Progress(0, 1000) as progress:
        for step in range(1, 71):
            progress.stepped(step, 100)
            clock[0] += 1
            progress.show(1.0, 1e-3, 1.0)
            if step == 35:
                progress.evaluated("2.0000")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[1] for line in lines] == ["30", "35", "65"]
    assert (
        lines[0] == "step 30/1,000  loss 1.0000  lr 1.00e-03  norm 1.00  100 tokens/s  16:10 left"
    )


def test_the_speed_is_current_and_measured_over_half_a_second(clock: list[float]) -> None:
    progress = Progress(0, 1000)
    progress.stepped(1, 100)
    clock[0] += 60  # kernels are compiled
    progress.show(9.0, 1e-3)
    for step in range(2, 101):
        progress.stepped(step, 100)
        clock[0] += 0.125
        if progress.due():
            progress.show(3.0, 1e-3)
    assert progress.tokens_per_s == 800
    progress.stepped(101, 100)
    clock[0] += 1 / 64  # a single fast step: its own speed would be 6,400
    progress.show(2.0, 1e-3)
    assert 800 < progress.tokens_per_s < 1200
    assert progress.loss == 2.0


def test_an_evaluation_before_the_first_step_has_no_training_figures(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    Progress(4, 10).evaluated("2.0000")
    assert capsys.readouterr().out == "step      4/10  validation loss 2.0000  0:00\n"


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
    with progress.paused("evaluating"):
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


def test_numbers_of_things() -> None:
    assert [plural(n, "step") for n in (0, 1, 2, 4500)] == [
        "0 steps",
        "1 step",
        "2 steps",
        "4,500 steps",
    ]


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
