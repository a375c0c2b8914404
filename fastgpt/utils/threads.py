"""Work spread over threads."""

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
    """Yield the function's results in order, computed in threads, a few items ahead at most.

    threads: None for one for each CPU that this process may use. Taking items and using results is
    for the caller's own thread, meanwhile.
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
