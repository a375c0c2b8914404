"""Tests of prefetching: the micro-batches, the end of the thread, and the errors raised."""

import gc
import itertools
import signal
import threading
import time
import traceback
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastgpt.data.batches import Batches
from fastgpt.data.prefetch import MicroBatchLoader, Prefetcher
from fastgpt.utils.errors import UsageError

PLAN = [(0, 3), (3, 3), (40, 1), (4090, 12)]


@pytest.fixture
def batches() -> Batches:
    return Batches(np.arange(50_000, dtype=np.uint16), 8, seed=1)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == 0


def threads() -> int:
    return sum(thread.name == "fastgpt-ahead" for thread in threading.enumerate())


def endless() -> Iterator[tuple[int, int]]:
    return ((i, 1) for i in itertools.count())


@pytest.mark.parametrize("ahead", [0, 1, 3, None])
def test_what_the_plan_says_in_its_order(batches: Batches, ahead: int | None) -> None:
    with MicroBatchLoader(batches, PLAN, "cpu", ahead) as feeder:
        for (first, count), (inputs, targets) in zip(PLAN, feeder, strict=True):
            expected = batches.samples(first, count)
            assert torch.equal(inputs, expected[0])
            assert torch.equal(targets, expected[1])
        for _ in range(2):  # further calls raise it again
            with pytest.raises(StopIteration):
                next(feeder)


def test_no_thread_on_a_cpu_unless_asked_for(batches: Batches) -> None:
    with MicroBatchLoader(batches, PLAN, "cpu"):
        assert threads() == 0
    with MicroBatchLoader(batches, PLAN, "cpu", ahead=2):
        assert threads() == 1


def test_only_a_few_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    ahead = Prefetcher(items(), 3)
    for i in range(1, 20):
        deadline = time.monotonic() + 10
        while taken < i + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.002)
        assert taken == i + 2
        assert next(ahead) == i
    ahead.close()
    with pytest.raises(RuntimeError, match="prefetcher is closed"):
        next(ahead)
    ahead.close()  # a second call does nothing


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_where_it_belongs(batches: Batches, ahead: int) -> None:
    def plan_that_breaks() -> Iterator[tuple[int, int]]:
        yield 0, 1
        yield 1, 1
        raise UsageError("the plan broke")

    with MicroBatchLoader(batches, plan_that_breaks(), "cpu", ahead) as feeder:
        assert len([*itertools.islice(feeder, 2)]) == 2
        with pytest.raises(UsageError, match="the plan broke") as info:
            next(feeder)
        assert "plan_that_breaks" in "".join(traceback.format_exception(info.value))
    with MicroBatchLoader(batches, [(0, 1), (-1, 1)], "cpu", ahead) as feeder:
        next(feeder)
        with pytest.raises(ValueError, match="first must be >= 0 and count >= 1"):
            next(feeder)


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_closing_early_does_not_hang(batches: Batches, taken: int) -> None:
    """Close while the thread waits for room or still works."""
    for pause in (0, 0.01):
        with MicroBatchLoader(batches, endless(), "cpu", 2) as feeder:
            for _ in range(taken):
                next(feeder)
            time.sleep(pause)


def test_the_consumer_raises(batches: Batches) -> None:
    def consume() -> None:
        with MicroBatchLoader(batches, endless(), "cpu", 2) as feeder:
            next(feeder)
            raise MemoryError

    with pytest.raises(MemoryError):
        consume()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
def test_ctrl_c_while_waiting() -> None:
    def slow() -> Iterator[int]:
        for i in itertools.count():
            time.sleep(0.2)
            yield i

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    ahead = Prefetcher(slow(), 2)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            next(ahead)
    finally:
        signal.signal(signal.SIGALRM, before)
        ahead.close()


def test_what_was_prepared_is_let_go() -> None:
    alive = [0]

    class Item:
        def __init__(self) -> None:
            alive[0] += 1

        def __del__(self) -> None:
            alive[0] -= 1

    ahead = Prefetcher(iter(Item, None), 3)
    next(ahead)
    ahead.close()
    del ahead
    gc.collect()
    assert alive == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_is_overwritten_before_it_is_copied(batches: Batches) -> None:
    plan = [(i * 5, 5) for i in range(300)]
    with MicroBatchLoader(batches, plan, "cuda") as feeder:
        torch.cuda._sleep(200_000_000)  # delays the copies
        got = list(feeder)
    for (first, count), (inputs, targets) in zip(plan, got, strict=True):
        expected = batches.samples(first, count)
        assert inputs.is_cuda
        assert torch.equal(inputs.cpu(), expected[0])
        assert torch.equal(targets.cpu(), expected[1])
