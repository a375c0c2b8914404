"""Tests of the description of the environment that is saved in a run folder."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgpt.training.environment import command_line, describe_environment

SHOW_COMMAND = "from fastgpt.training.environment import command_line; print(command_line())"


def git(folder: Path, *args: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one commit; the current directory is a folder in it."""
    (tmp_path / "notes.txt").write_text("one")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    return tmp_path


def test_it_is_json_and_says_with_what() -> None:
    facts = json.loads(json.dumps(describe_environment()))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["directory"] == os.getcwd()
    assert facts["cpu"]


def test_the_commit_and_changes_since(project: Path) -> None:
    clean = describe_environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (project / "notes.txt").write_text("two")
    assert describe_environment()["git"] == {"commit": clean["commit"], "dirty": True}


def test_nothing_fails_without_a_commit_or_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_environment()["git"] is None
    git(tmp_path, "init")  # no commit yet
    assert describe_environment()["git"] is None
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["git"] is None


def test_a_git_that_hangs_is_not_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = project / "bin"
    slow.mkdir()
    (slow / "git").write_text("#!/bin/sh\nexec sleep 30\n")
    (slow / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
    monkeypatch.setattr("fastgpt.training.environment.GIT_SECONDS", 0.1)
    began = time.perf_counter()
    assert describe_environment()["git"] is None
    assert time.perf_counter() - began < 5


def test_the_command_can_be_pasted_again(checkout: Path) -> None:
    command = [sys.executable, "-c", SHOW_COMMAND, "--data", "my text's.txt"]
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    for _ in range(2):
        line = subprocess.run(
            command, cwd=checkout, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()
        assert line == shlex.join([sys.executable, "-c", SHOW_COMMAND, "--data", "my text's.txt"])
        command = ["sh", "-c", line]


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        (1, "torchrun --standalone --nproc-per-node=4 -m fastgpt.train gpt2 --out 'my run'"),
        (
            2,
            "torchrun --nnodes=2 --node-rank=1 --nproc-per-node=4 --master-addr=node0 "
            "--master-port=1234 -m fastgpt.train gpt2 --out 'my run'",
        ),
    ],
)
def test_a_distributed_run_was_started_by_torchrun(
    machines: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["/usr/bin/python3", "-u", "-m", "fastgpt.train", "gpt2", "--out", "my run"]
    monkeypatch.setattr(sys, "orig_argv", words)
    values = {"RANK": "0", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": str(4 * machines)}
    values |= {"GROUP_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert command_line() == expected
