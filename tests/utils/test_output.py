"""Commands whose standard output is closed, on a full disk, or a pipe without a reader."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.utils.output import OptionalOutput

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")

Start = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = (
    "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --max-steps 4 --device cpu "
    "--warmup-steps 1 --eval-interval 2 --eval-tokens 500 --sample-tokens 20 --out run"
)


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Start:
    """Run a shell command in an empty folder, in which $PYTHON is this Python."""
    paths = {"PYTHONPATH": str(checkout), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **paths}
    environment.pop("PYTHONUNBUFFERED", None)

    def run(command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=100,
        )

    return run


@pytest.mark.parametrize(
    ("redirection", "warning"),
    [
        ("> /dev/full", "cannot be written (No space left on device): continuing without it"),
        pytest.param(">&-", "", marks=pytest.mark.slow),
        pytest.param("| true", "(Broken pipe): continuing without it", marks=pytest.mark.slow),
        pytest.param("2>&1 | true", "", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_without_its_output(
    redirection: str, warning: str, start: Start, tmp_path: Path
) -> None:
    done = start(f"$PYTHON -m fastgpt.train {SMALL} {redirection}")
    assert done.returncode == 0, done.stderr
    assert warning in done.stderr
    assert done.stderr.count("\n") == (1 if warning else 0)
    assert (tmp_path / "run" / "sample.txt").is_file()
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        ("> /dev/full", 2, "error: .*: No space left on device\n"),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 141, ""),
        ("2> /dev/full", 0, ""),
    ],
)
@pytest.mark.parametrize("arguments", ["fastgpt.plot run", "fastgpt.train --help"])
def test_other_commands_end_with_one_line(
    arguments: str, redirection: str, code: int, error: str, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    done = start(f"$PYTHON -m {arguments} {redirection}")
    assert done.returncode == code
    assert re.fullmatch(error, done.stderr)


@pytest.mark.parametrize("command", ["fastgpt.plot", "fastgpt plot"])
def test_a_missing_package_is_one_line(command: str, start: Start, tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('No module', name='tyro')")
    done = start(f"$PYTHON -m {command} run")
    assert done.returncode == 2
    assert done.stderr == (
        "error: the package tyro is not installed: run `pip install .` in fastgpt's checkout, or "
        "`pip install tyro`\n"
    )


def test_a_missing_compiled_module_is_one_line(start: Start) -> None:
    code = "; ".join(
        [
            "import sys",
            "sys.modules['fastgpt._C'] = None",
            "from fastgpt.utils import cli",
            "cli.run(lambda args: __import__('fastgpt.utils.extension'), [])",
        ]
    )
    done = start(f'$PYTHON -c "{code}"')
    assert done.returncode == 2
    assert done.stderr == (
        "error: fastgpt's compiled module is missing; run `pip install .` in the checkout\n"
    )


def test_optional_output_warns_once_and_then_discards(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if "lost" in text:
                raise OSError(28, "No space left on device")
            return super().write(text)

    stream = Full()
    output = OptionalOutput(stream)
    print("kept", file=output)
    with pytest.warns(UserWarning, match="No space left on device") as warned:
        print("lost", "lost", "discarded", sep="", file=output)
    assert len(warned) == 1
    assert stream.getvalue() == "kept\n"
    assert not output.isatty()
