"""Prefetch micro-batches in a background thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import TypeVar

import torch
from torch import Tensor

from fastgpt.data.batches import Batches

Item = TypeVar("Item")

AHEAD = 4  # micro-batches


class MicroBatchLoader(Iterator[tuple[Tensor, Tensor]], AbstractContextManager["MicroBatchLoader"]):
    """An iterator over micro-batches `(inputs, targets)`, int64 `[count, block_size]` on `device`.

    Args:
        batches: source of the samples.
        plan: index of the first sample and number of samples of each micro-batch.
        device: device of the returned tensors.
        ahead: number of micro-batches that a background thread prepares in advance; 0 for no
            thread. By default the thread is used for CUDA, so that data that is not in memory is
            read from disk while the GPU computes. On a CPU the thread would compete with the
            computation, so a micro-batch is made on request, which takes about 20 microseconds.

    Use it in a ``with`` block, which ends the thread. An exception in the thread is raised by the
    iteration at the micro-batch that caused it.
    """

    def __init__(
        self,
        batches: Batches,
        plan: Iterable[tuple[int, int]],
        device: torch.device | str,
        ahead: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        if ahead is None:
            ahead = AHEAD if self._device.type == "cuda" else 0
        pairs = (batches.samples(first, count) for first, count in plan)
        self._prefetcher = Prefetcher(pairs, ahead) if ahead else None
        self._pairs: Iterator[Tensor] = self._prefetcher or pairs

    def __next__(self) -> tuple[Tensor, Tensor]:
        pair = next(self._pairs)  # [2, count, block_size]
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            # The copy from pinned memory is asynchronous. PyTorch's caching host allocator reuses
            # the memory only after the copy has finished. Pinning and copying are done here and
            # not in the background thread, so that the copy is ordered on the caller's stream and
            # no other thread makes CUDA calls while the caller captures a graph.
            pair = pair.pin_memory()
        inputs, targets = pair.to(self._device, non_blocking=on_cuda).unbind()
        return inputs, targets

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, if there is one, after it has finished its current micro-batch."""
        if self._prefetcher is not None:
            self._prefetcher.close()


class Prefetcher(Iterator[Item]):
    """An iterator over `items` that evaluates up to `ahead` of them in advance, in a thread."""

    def __init__(self, items: Iterable[Item], ahead: int) -> None:
        self._items = iter(items)
        self._room = Semaphore(ahead)  # counts the free places in the queue of results
        # The results; an exception, StopIteration included, is the last one.
        self._results: SimpleQueue[Item | BaseException] = SimpleQueue()
        self._closed = False
        # A daemon thread, so that the process can exit even if `close` was not called.
        self._thread = Thread(target=self._run, name="fastgpt-ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        result = self._results.get()
        if isinstance(result, BaseException):
            self._results.put(result)  # for further calls
            raise result
        self._room.release()
        return result

    def close(self) -> None:
        """End the thread and discard the prepared items."""
        self._closed = True
        self._room.release()  # wake the thread if it waits for room
        self._thread.join()

    def _run(self) -> None:
        """Take items while there is room, until they end, one raises, or `close` is called."""
        while self._room.acquire() and not self._closed:
            try:
                self._results.put(next(self._items))
            except BaseException as error:  # StopIteration, too, is raised in the caller's thread
                self._results.put(error)
                return
