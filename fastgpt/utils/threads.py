"""Parallel processing with threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def map_in_order(
    function: Callable[[In], Out], items: Iterable[In], threads: int | None
) -> Iterator[Out]:
    """Yield `function(item)` for each item, in order, computed in parallel by threads.

    Items are taken from the iterable in the calling thread, only a few ahead of the results.

    Args:
        function: called in the threads.
        items: the items, which can be an infinite iterable.
        threads: number of threads; None for one per CPU that this process can use.
    """
    if threads is None:
        here = getattr(os, "sched_getaffinity", None)
        threads = len(here(0)) if here else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Out]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
