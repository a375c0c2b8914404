"""Micro-batches, ready when the training loop asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from fastgpt.data.corpus import Batches

Item = TypeVar("Item")

AHEAD = 4  # micro-batches


class Feeder:
    """Iterates over micro-batches `(inputs, targets)`, int64 `[count, block_size]` on `device`.

    Args:
        batches: where they come from.
        plan: for each, the number of its first sample and how many it has.
        device: where they go to.
        ahead: how many a thread prepares before they are asked for; 0 to do without the thread.
            By default it works for CUDA, where a text that is not in memory can be read from disk
            while the GPU computes. On a CPU it would only take time from the computation: there a
            micro-batch is made when it is asked for, in some twenty microseconds.

    Use it in a ``with`` block, which ends the thread. What goes wrong in the thread is raised by
    the iteration, at the micro-batch it is about.
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
        pairs = (batches.pair(first, count) for first, count in plan)
        self._ahead = Ahead(pairs, ahead) if ahead else None
        self._pairs: Iterator[Tensor] = self._ahead or pairs

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        pair = next(self._pairs)  # [2, count, block_size]
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            # Pinned memory is copied without waiting for it. PyTorch keeps track of when the copy
            # is done, and uses the memory again. Here and not in the thread, so that the copy is
            # in the order of the caller's stream, and no other thread speaks to CUDA while the
            # caller records a graph.
            pair = pair.pin_memory()
        inputs, targets = pair.to(self._device, non_blocking=on_cuda).unbind()
        return inputs, targets

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, if there is one; it finishes the micro-batch it is at."""
        if self._ahead is not None:
            self._ahead.close()


class Ahead(Generic[Item]):
    """Iterates over items that a thread takes from `items`, up to `most` before they are needed."""

    def __init__(self, items: Iterable[Item], most: int) -> None:
        self._items = iter(items)
        self._room = Semaphore(most)
        self._results: SimpleQueue[Item | _End] = SimpleQueue()
        self._closed = False
        # A daemon, so that a caller who forgets to close it can still exit.
        self._thread = Thread(target=self._run, name="fastgpt-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if self._closed:
            raise RuntimeError("closed already: nothing is prepared any more")
        result = self._results.get()
        if isinstance(result, _End):
            self._results.put(result)  # for whoever asks again
            raise result.error
        self._room.release()
        return result

    def close(self) -> None:
        """End the thread; what was prepared is lost."""
        self._closed = True
        self._room.release()  # it may be waiting for that
        self._thread.join()

    def _run(self) -> None:
        """Take items while there is room, until they end, fail, or nobody wants them any more."""
        while self._room.acquire() and not self._closed:
            try:
                self._results.put(next(self._items))
            except BaseException as error:  # StopIteration, too, is for the caller's thread
                self._results.put(_End(error))
                return


class _End:
    """Stands for the exception that ended the items."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
