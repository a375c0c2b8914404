"""Comparison of runs: the plot, the table, and loss curves as text."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt import __main__ as fastgpt_main
from fastgpt import plot
from fastgpt.training.loss_curves import (
    Run,
    differing,
    draw,
    loss_in_text,
    plot_losses,
    print_table,
    read_runs,
    text_curve,
)
from fastgpt.utils import cli


def make_run(folder: Path, steps: int = 30, tokens: bool = True, **recipe: Any) -> Path:
    """Write a run folder whose validation loss has its minimum of 2 ten steps before the end."""
    folder.mkdir(parents=True)
    settings = {"lr": 0.1, "n_layer": 2, "out": str(folder)} | recipe
    (folder / "config.json").write_text(json.dumps({"recipe": settings}))
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        more = {"tokens": step * 100, "seconds": step / 10} if tokens else {}
        records.append({"step": step, "loss": 4 - step / 20, "tokens_per_s": 990.0 + step, **more})
        if step % 10 == 0:
            records.append({"step": step, "val_loss": 2 + abs(steps - 10 - step) / 10, **more})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as info:
        cli.run(plot.main, [str(arg) for arg in args])
    return int(info.value.code or 0)


def test_two_runs_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=40, lr=0.2)
    assert run("a", "b") == 0
    out = capsys.readouterr().out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert out.endswith("plot: compare.png\n")
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:4] for line in out.splitlines() if "│" in line
    }
    assert [cell.strip() for cell in rows["best validation loss"]] == [
        "2.0000 at step 20",
        "2.0000 at step 30",
    ]
    assert [cell.strip() for cell in rows["tokens"]] == ["3,000", "4,000"]
    assert [cell.strip() for cell in rows["training time"]] == ["0:03", "0:04"]
    assert [cell.strip() for cell in rows["lr"]] == ["0.1", "0.2"]
    assert "n_layer" not in rows
    assert "out" not in rows
    assert "a a  b b" in out


@pytest.mark.parametrize("x", ["step", "tokens", "time"])
def test_one_run_over_each_axis(x: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert run(folder, "--x", x, "--out", tmp_path / "p.svg") == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert {"step": "over steps", "tokens": "over tokens", "time": "over seconds"}[x] in (
        capsys.readouterr().out
    )


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "1" / "run"), make_run(tmp_path / "2" / "run")
    assert [r.name for r in read_runs([one, two, one])] == [str(one), str(two)]
    assert differing(read_runs([one, two])) == []


def test_a_run_given_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    folders = [Path("run"), tmp_path / "run", Path("../" + tmp_path.name, "run"), Path("link")]
    assert [run.name for run in read_runs(folders)] == ["run"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_names_that_are_not_utf_8_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / os.fsdecode(name)) for name in (b"r\xff", b"r\xfe")]
    assert [run.name for run in read_runs(folders)] == [
        f"{tmp_path}/r\N{REPLACEMENT CHARACTER} ({number})" for number in (1, 2)
    ]
    assert run(*folders, "--out", tmp_path / "p.png") == 0
    assert plot_losses(folders[0]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac{$", "_x"])
def test_names_are_plotted_literally(name: str, tmp_path: Path) -> None:
    """Not as formulas, which `$` would begin, and not left out for a leading underscore."""
    folders = [make_run(tmp_path / name), make_run(tmp_path / "other")]
    picture = draw(read_runs(folders), tmp_path / "p.svg")
    assert picture.read_text().count(f"<!-- {name}, training -->") == 1


def test_names_are_whole_in_a_narrow_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = [f"shakespeare-char-20261201-0301{second}" for second in (10, 11, 12)]
    print_table([Run(name, tmp_path, [{"step": 1}]) for name in names])
    rows = [line.split("┃")[2:5] for line in capsys.readouterr().out.splitlines() if "┃" in line]
    assert ["".join(cells).replace(" ", "") for cells in zip(*rows, strict=True)] == names


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, empty = make_run(tmp_path / "good"), make_run(tmp_path / "empty", steps=0)
    old = make_run(tmp_path / "old", tokens=False)
    unlogged = make_run(tmp_path / "unlogged")
    (unlogged / "metrics.jsonl").unlink()
    for args, message in (
        ((tmp_path / "none",), "none does not exist"),
        ((tmp_path,), "is not a run folder"),
        ((good, empty), "metrics.jsonl has no records: nothing was trained yet"),
        ((unlogged,), "metrics.jsonl: No such file or directory; a run that logged nothing"),
        ((good, old, "--x", "tokens"), "has no records with both a loss and tokens"),
        ((good, "--out", tmp_path / "no" / "p.png"), "p.png cannot be written: "),
        ((good, "--out", tmp_path / "p.txt"), "p.txt cannot be written: "),
        ((), "name the runs to compare"),
    ):
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_a_line_falls_from_the_top_left_to_the_bottom_right() -> None:
    points = [(0.0, 3.0), (10.0, 1.0)]
    text = text_curve({"loss": points}, width=6, height=3, label="x", ascii_only=True)
    assert text.splitlines() == [
        "    3.000 |**",
        "          |  **",
        "    1.000 |    **",
        "          +------",
        "           0 x 10",
    ]
    braille = text_curve({"loss": points}, width=4, height=2, ascii_only=False)
    assert braille.splitlines()[0] == "    3.000 |⠑⢄"
    assert braille.splitlines()[1] == "    1.000 |  ⠑⢄"


def test_several_curves_have_letters_at_their_ends() -> None:
    curves = {"one": [(0.0, 3.0), (10.0, 1.0)], "two": [(0.0, 1.0), (10.0, 1.0)]}
    text = text_curve(curves, width=18, height=3, ascii_only=False, color=False)
    assert text.splitlines() == [
        "    3.000 |⠉⠒⠢⠤⣀⣀",
        "          |      ⠉⠑⠒⠤⢄⣀     b",
        "    1.000 |⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣉⣉⣒⣢⣤a",
        "          +------------------",
        "           0               10",
        "           a one  b two",
    ]
    colored = text_curve(curves, width=18, height=3, ascii_only=False, color=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", colored) == text
    assert "\x1b[34ma\x1b[0m one  \x1b[33mb\x1b[0m two" in colored
    narrow = text_curve(curves, width=11, height=3, ascii_only=True, color=False)
    assert narrow.splitlines()[-2:] == ["           a one", "           b two"]


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]])
def test_few_points_are_no_fault(points: list[tuple[float, float]]) -> None:
    assert text_curve({"a": points}, ascii_only=True)


def test_a_loss_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN}\n{"step": 32, "loss": Infinity}\n')
    assert read_runs([folder])[0].curve("loss")[-1] == (30.0, 2.5)
    assert "a training  b validation" in loss_in_text(folder)


@pytest.mark.parametrize(("columns", "longest"), [(200, 83), (80, 79), (40, 39)])
def test_the_curve_fits_the_terminal(
    columns: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = text_curve({"loss": [(0.0, 2.0), (9.0, 1.0)]}, label="loss", ascii_only=True)
    assert max(map(len, text.splitlines())) == longest


def test_a_terminal_without_unicode_gets_plain_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    plot.main([str(folder)])
    sys.stdout.flush()
    assert b"*" in raw.getvalue()


def test_help_loads_nothing_heavy(checkout: Path) -> None:
    code = (
        "import sys, fastgpt.plot, fastgpt.training.metrics\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True)


def test_it_is_listed() -> None:
    assert "plot" in fastgpt_main.COMMANDS
