"""Tests of stopping a run, with real processes and signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgpt.checkpoint.load import find_checkpoint
from fastgpt.checkpoint.save import Checkpointer
from fastgpt.utils.signals import ECHO_SECONDS, StopSignal

START = """
import hashlib, sys, threading, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint.save import Checkpointer, TrainingState
from fastgpt.utils.signals import Stopped, StopSignal
from fastgpt.checkpoint import save as writer

torch.set_num_threads(1)
run, model = Path(sys.argv[1]), GPT(GPTConfig(7, 8, 1, 2, 8))
weights = model.state_dict()

def save(checkpointer, step):
    checkpointer.save(TrainingState(step, weights, weights, None, model.config, "", ""))

def slow(seconds):
    write = writer.write_tensors
    def write_later(*args):
        time.sleep(seconds)
        return write(*args)
    writer.write_tensors = write_later
"""

STEPS = """
slow(0.3)
try:
    with StopSignal() as stop, Checkpointer(run) as checkpointer:
        for step in range(1, 1000):
            print("step", step, flush=True)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
            print("done", step, flush=True)
            if stop.requested:
                save(checkpointer, step)
                checkpointer.wait()
                raise Stopped(stop.requested, run, step)
except Stopped as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.exit_code)
"""

WHILE_SAVING = """
slow(60)
with StopSignal() as stop, Checkpointer(run) as checkpointer:
    save(checkpointer, 1)
    print("saving", flush=True)
    checkpointer.wait()
"""

DEAF = """
with StopSignal() as stop:
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, with no Python handler run
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Iterator[Start]:
    started = []

    def one(script: str) -> "subprocess.Popen[str]":
        args = [sys.executable, "-c", START + script, str(tmp_path), str(checkout)]
        started.append(subprocess.Popen(args, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
HANGUP = getattr(signal, "SIGHUP", None)
SLOW = pytest.mark.slow  # each case starts a process that imports torch


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=SLOW),
        pytest.param(HANGUP, 129, marks=[SLOW, POSIX]),
    ],
)
def test_the_first_signal_finishes_the_step_and_saves(
    tmp_path: Path, start: Start, number: int, code: int
) -> None:
    process = start(STEPS)
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(number)
    process.send_signal(number)  # an echo, as from a launcher that forwards it
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.startswith("done 1\nstopped at step 1 and saved; resume with: ")
    assert find_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize(
    ("number", "code", "script", "said"),
    [
        (signal.SIGINT, 130, WHILE_SAVING, "saving\n"),
        (signal.SIGTERM, 143, DEAF, "computing\n"),
        pytest.param(signal.SIGTERM, 143, WHILE_SAVING, "saving\n", marks=SLOW),
        pytest.param(signal.SIGINT, 130, DEAF, "computing\n", marks=SLOW),
    ],
    ids=["saving-130", "deaf-143", "saving-143", "deaf-130"],
)
def test_the_second_signal_stops_immediately(
    tmp_path: Path, start: Start, number: int, code: int, script: str, said: str
) -> None:
    """Interrupt a save in progress, and a computation during which no Python handler runs."""
    process = start(script)
    assert process.stdout.readline() == said
    process.send_signal(number)
    time.sleep(2 * ECHO_SECONDS)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert time.monotonic() - began < 5
    assert not list(tmp_path.glob("checkpoints/step-*"))
    Checkpointer(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_second_signal_stops_at_once_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # immediately after the first, so an echo
        assert stop.requested == signal.SIGTERM
        time.sleep(2 * ECHO_SECONDS)
        with pytest.raises(SystemExit) as info:
            signal.raise_signal(signal.SIGTERM)
    assert info.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


@POSIX
def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under `nohup`; otherwise, it requests a stop."""
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(HANGUP)
            assert not stop.requested
        signal.signal(HANGUP, signal.SIG_DFL)
        with StopSignal() as stop:
            signal.raise_signal(HANGUP)
            assert stop.requested == HANGUP
        assert signal.getsignal(HANGUP) == signal.SIG_DFL
    finally:
        signal.signal(HANGUP, before)
