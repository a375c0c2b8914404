"""Tests of asynchronous saving, and of failures and interruptions during a save."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastgpt import GPT, GPTConfig, Recipe
from fastgpt.checkpoint.load import CheckpointError, find_checkpoint, verify
from fastgpt.checkpoint.save import Checkpointer, TrainingState
from fastgpt.checkpoint.tensor_file import HostCopy, write_tensors
from fastgpt.training.optimizer import make_optimizer
from tests.checkpoint.states import state_of

MODEL = GPT(GPTConfig(7, 8, 1, 2, 8))


def state(step: int, val_loss: float | None = None, **more: Any) -> TrainingState:
    """Return a state in which every weight equals the step."""
    weights = {name: torch.full_like(t, step) for name, t in MODEL.state_dict().items()}
    moments = {f"{name}.exp_avg": t / 2 for name, t in weights.items()}
    return TrainingState(step, weights, moments, val_loss, MODEL.config, "t", "d", **more)


def steps(run: Path) -> list[int]:
    """Return the steps of the saved checkpoints; fail if the folder contains anything else."""
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())


def save_all(run: Path, *states: TrainingState, keep: int = 2) -> None:
    with Checkpointer(run, keep) as checkpointer:
        for each in states:
            checkpointer.save(each)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Delay all writing until the event is set."""
    go = threading.Event()

    def write_later(*args: Any) -> dict[str, Any]:
        go.wait(timeout=60)
        return write_tensors(*args)

    monkeypatch.setattr("fastgpt.checkpoint.save.write_tensors", write_later)
    yield go
    go.set()


def test_what_is_saved_is_the_moment_of_the_save(tmp_path: Path, slow_disk: Any) -> None:
    """Change the same tensors in place after `save`, as training does."""
    with Checkpointer(tmp_path) as checkpointer:
        now = state(1, extra={"seen": [5]})
        checkpointer.save(now)
        for tensor in (*now.model.values(), *now.optimizer.values()):
            tensor.fill_(99)
        now.extra["seen"].append(6)
        slow_disk.set()
    checkpoint = find_checkpoint(tmp_path)
    assert all((t == 1).all() for t in checkpoint.model_tensors().values())
    assert all((t == 0.5).all() for t in checkpoint.optimizer_tensors().values())
    assert checkpoint.extra == {"seen": [5]}


def test_a_second_save_waits_for_the_first(tmp_path: Path, slow_disk: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state(1))
        threading.Timer(0.2, slow_disk.set).start()
        began = time.monotonic()
        checkpointer.save(state(2))
        assert time.monotonic() - began > 0.1
        assert find_checkpoint(tmp_path).step >= 1
    assert steps(tmp_path) == [1, 2]
    for step in (1, 2):  # the copies must not share memory
        weights = load_file(tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        assert all((t == step).all() for t in weights.values())


def test_averaged_weights_may_come_and_go(tmp_path: Path) -> None:
    ema = {name: t + 1 for name, t in MODEL.state_dict().items()}
    save_all(tmp_path, state(1), state(2, ema=ema), state(3), keep=9)
    found = [verify(tmp_path / "checkpoints" / f"step-{s:08d}").has_ema for s in (1, 2, 3)]
    assert found == [False, True, False]


def test_state_of_a_model_is_restored(tmp_path: Path) -> None:
    model = GPT(MODEL.config)
    optimizer = make_optimizer(model, Recipe())
    ids = torch.randint(7, (2, 8))
    model(ids, ids).backward()
    optimizer.step()
    save_all(tmp_path, state_of(model, optimizer, 1, val_loss=None))
    restored = GPT(MODEL.config)
    restored_optimizer = make_optimizer(restored, Recipe())
    find_checkpoint(tmp_path).restore(restored, restored_optimizer)
    for each, its_optimizer in ((model, optimizer), (restored, restored_optimizer)):
        its_optimizer.zero_grad()
        each(ids, ids).backward()
        its_optimizer.step()
    for mine, theirs in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(mine, theirs)


KILLED = """
import os, random, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint.load import CheckpointError, find_checkpoint, verify
from fastgpt.checkpoint.save import Checkpointer, TrainingState

torch.set_num_threads(1)
run, rng = Path(sys.argv[1]), random.Random(9)
model = GPT(GPTConfig(50, 64, 1, 2, 64))

def save_on_and_on(step):
    with Checkpointer(run) as checkpointer:
        began = time.monotonic()
        while time.monotonic() < began + 30:  # save every third step twice, as after a resume
            for _ in range(1 + (step % 3 == 0)):
                weights = {n: torch.full_like(t, step) for n, t in model.state_dict().items()}
                loss = rng.random()
                checkpointer.save(TrainingState(step, weights, weights, loss, model.config, "", ""))
            step += 1

def newest_visible():
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)

newest = leftovers = 0
for number in range(20):
    child = os.fork()
    if not child:
        save_on_and_on(newest + 1)
    while number % 3 == 0 and newest_visible() <= newest:  # some saves finish on a busy machine too
        time.sleep(0.001)
    time.sleep(rng.uniform(0.01, 0.25))
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9
    for path in (run / "checkpoints").glob("step-*"):
        weights = verify(path).model_tensors()  # visible checkpoints are complete
        assert all((t == int(path.name[5:])).all() for t in weights.values())
    leftovers += any((run / "checkpoints").glob(".*"))
    Checkpointer(run)
    assert not list((run / "checkpoints").glob(".*"))
    if list((run / "checkpoints").iterdir()):
        found = find_checkpoint(run).step
        assert found >= newest, (found, newest)  # no checkpoint was lost
        newest = found
print(newest, leftovers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_saving_leaves_usable_checkpoints(
    tmp_path: Path, checkout: Path
) -> None:
    args = [sys.executable, "-c", KILLED, tmp_path, checkout]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    newest, leftovers = map(int, done.stdout.split())
    assert newest >= 5  # some saves were completed
    assert leftovers >= 5  # and others were interrupted


def test_a_file_size_limit_fails_one_save_only(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    save_all(tmp_path, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            checkpointer.save(state(2))
            with pytest.raises(CheckpointError, match=r"step-00000002 was not saved: File too lar"):
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert steps(tmp_path) == [1]
        checkpointer.save(state(3))  # the error is raised only once
    assert steps(tmp_path) == [1, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk: Path) -> None:
    save_all(small_disk, state(1))
    (small_disk / "other").write_bytes(bytes(40_000))
    checkpointer = Checkpointer(small_disk)
    checkpointer.save(state(2))
    message = "step-00000002 was not saved: No space left on device; free some space, then"
    with pytest.raises(CheckpointError, match=message):
        checkpointer.close()
    assert steps(small_disk) == [1]
    assert find_checkpoint(small_disk).step == 1


@pytest.mark.parametrize("asks", ["save", "wait", "close"])
@pytest.mark.parametrize("where", ["open", "fsync", "rename"])
def test_a_failed_save_is_reported_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: str, where: str
) -> None:
    save_all(tmp_path, state(1))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        target = "os.fsync" if where == "fsync" else f"pathlib.Path.{where}"
        checkpointer = Checkpointer(tmp_path)
        patch.setattr(target, fail)
        checkpointer.save(state(2))
        while checkpointer._thread.is_alive():
            time.sleep(0.01)
    call = {"save": lambda: checkpointer.save(state(3))}.get(asks) or getattr(checkpointer, asks)
    with pytest.raises(CheckpointError, match="step-00000002 was not saved: No space left"):
        call()
    checkpointer.close()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_while_copying_drops_the_save(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path, state(1))

    def fail(*_: object) -> None:
        raise error

    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "copy", fail)
        with pytest.raises(error):
            checkpointer.save(state(2))
    assert steps(tmp_path) == [1]
    checkpointer.save(state(3))
    checkpointer.close()
    assert steps(tmp_path) == [1, 3]


def test_running_out_of_memory_while_writing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path, state(1))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fastgpt.checkpoint.save.write_tensors", fail)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state(2))
    with pytest.raises(CheckpointError, match=r"was not saved: MemoryError\(\); earlier"):
        checkpointer.close()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_leaving_the_context_by_an_interrupt_abandons_the_save(
    tmp_path: Path, error: type[BaseException], slow_disk: threading.Event
) -> None:
    def leave() -> None:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(state(1))
            threads.append(checkpointer._thread)
            raise error

    threads: list[threading.Thread] = []
    began = time.monotonic()
    with pytest.raises(error):
        leave()
    assert time.monotonic() - began < 5
    assert threads[0].daemon  # otherwise the process would wait for it at exit
    slow_disk.set()
    threads[0].join()
    assert steps(tmp_path) == []


def test_who_leaves_by_an_error_waits_for_the_save(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    """Check that a block that raises, for example when training diverges, keeps the last save."""

    def diverge() -> None:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(state(1))
            raise ValueError("diverged")

    threading.Timer(0.1, slow_disk.set).start()
    with pytest.raises(ValueError, match="diverged"):
        diverge()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(("keep", "expected"), [(1, [2, 6]), (3, [2, 4, 5, 6])])
def test_the_newest_k_and_the_best_are_kept(tmp_path: Path, keep: int, expected: list[int]) -> None:
    losses = [3.0, 1.0, 2.0, None, 2.0, 1.5]
    save_all(tmp_path, *(state(i + 1, loss) for i, loss in enumerate(losses)), keep=keep)
    assert steps(tmp_path) == expected
    assert find_checkpoint(tmp_path, "best").step == 2


def test_no_checkpoint_is_deleted_before_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path, state(1, 1.0), state(2), state(3))
    monkeypatch.setattr("fastgpt.checkpoint.save.write_json", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        save_all(tmp_path, state(4, 0.5))
    assert steps(tmp_path) == [1, 2, 3]


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """Become another user, as root ignores permissions. Yields a folder that all can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
            yield folder
        else:
            folder.chmod(0o555)
            yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
def test_a_read_only_folder_is_reported() -> None:
    with (
        as_nobody() as folder,
        pytest.raises(CheckpointError, match="checkpoints cannot be written: Permission denied"),
    ):
        Checkpointer(folder)


def test_a_file_named_checkpoints_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="checkpoints cannot be written: "):
        Checkpointer(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["weights", "averaged weights", "optimizer state"])
def test_non_finite_tensors_are_not_saved(tmp_path: Path, what: str, value: float) -> None:
    broken = state(2, ema=state(2).model)
    parts = {"weights": broken.model, "averaged weights": broken.ema}
    tensors = parts.get(what) or broken.optimizer
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_all(tmp_path, state(1))
    checkpointer = Checkpointer(tmp_path)
    message = rf"^non-finite {what} at step 2 \({name}\): training has diverged; lower"
    with pytest.raises(CheckpointError, match=message):
        checkpointer.save(broken)
    checkpointer.close()
    assert steps(tmp_path) == [1]


def test_huge_finite_values_are_saved(tmp_path: Path) -> None:
    huge = state(1)
    for tensor in huge.model.values():
        tensor.fill_(3e38)  # its square overflows
    save_all(tmp_path, huge)
    assert steps(tmp_path) == [1]


def test_notes_that_json_cannot_hold_are_refused_at_once(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(state(1, extra={"model": MODEL}))
    checkpointer.save(state(2))
    checkpointer.close()
    assert steps(tmp_path) == [2]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    max_size=5,
)


@given(TENSORS)
@settings(max_examples=60, deadline=None)
def test_the_library_reads_what_is_written(layout: dict[str, Any]) -> None:
    tensors = {
        name: torch.randint(0, 100, shape).to(dtype).mT if len(shape) > 1 else torch.ones(shape)
        for name, (dtype, shape) in layout.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        copy = HostCopy(tensors)
        copy.copy(tensors)
        facts = write_tensors(path, copy.tensors, lambda: None)
        assert facts["size"] == path.stat().st_size
        path.unlink()
        assert write_tensors(path, tensors, lambda: None) == facts  # without a copy
        assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        read = load_file(path)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
        del read


def test_the_first_tensor_begins_on_a_cache_line(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"abc": torch.ones(3)}, lambda: None)
    raw = (tmp_path / "x").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert (8 + size) % 64 == 0
    assert json.loads(raw[8 : 8 + size])["abc"]["data_offsets"] == [0, 12]


def test_a_large_model_on_a_cpu_is_written_at_once_and_never_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.checkpoint.save.LARGE", 100)
    monkeypatch.setattr(HostCopy, "copy", None)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state(1))
    assert steps(tmp_path) == [1]  # saved synchronously

    def fail(error: BaseException) -> None:
        def write(*_: object) -> None:
            raise error

        monkeypatch.setattr("fastgpt.checkpoint.save.write_tensors", write)

    fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="step-00000002 was not saved: No space left"):
        checkpointer.save(state(2))
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(state(3))
    checkpointer.close()
    assert steps(tmp_path) == [1]


def test_a_copy_fits_the_same_names_dtypes_and_shapes_only() -> None:
    file = HostCopy({"a": torch.ones(2, 3), "b": torch.ones(())})
    assert file.fits({"b": torch.zeros(()), "a": torch.zeros(2, 3)})
    assert not file.fits({"a": torch.ones(2, 3)})
    assert not file.fits({"a": torch.ones(3, 2), "b": torch.ones(())})
    assert not file.fits({"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.float64)})
