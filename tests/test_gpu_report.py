"""Dry runs of the GPU report on a CPU, because the real report runs rarely and must not fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import ops

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def test_dry_run_measures_everything_and_skips_nothing(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    program = checkout / "benchmarks" / "gpu_report.py"
    subprocess.run(
        [sys.executable, program, "--tiny", "--no-tests", "--out", out],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=600,
    )
    report = json.loads(out.read_text(encoding="utf-8"))
    assert "skipped" not in report
    for row in report["errors"]:
        assert row["largest"] < 1e-5, row
    timed = {(row["operation"], row["implementation"]) for row in report["operations"]}
    operations = {operation for operation, _ in timed}
    assert operations >= {"causal_attention", "add_layer_norm", "linear_cross_entropy"}
    for name in (*(f"fastgpt {backend}" for backend in ops.BACKENDS), "torch"):
        assert {(operation, name) for operation in operations} <= timed
    assert len(report["optimizers"]) == 2
    assert {row["implementation"] for row in report["training step"]} >= {
        "fastgpt",
        "nanoGPT-style",
    }
    assert "training step" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_without_a_gpu_there_is_an_error_message(checkout: Path, tmp_path: Path) -> None:
    program = checkout / "benchmarks" / "gpu_report.py"
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, program, "--out", tmp_path / "x.json"],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no CUDA device is visible" in done.stderr
    assert not list(tmp_path.iterdir())
