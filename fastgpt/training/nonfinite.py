"""Which updates were left out, their gradient not being finite; nobody waits to hear of it."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class SkippedUpdates:
    """Notes where updates began to be left out: `begun` holds (step, gradient norm) of each streak.

    The device decides whether to apply an update (see `fastgpt.training.optimizer`), and this class
    does not synchronize with it. The decision is available at once on a CPU, a step or so later on
    CUDA, and on other devices when `look` is called while they are idle.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[int, float]] = []
        self._on_the_way: deque[tuple[int, Tensor, Any]] = deque()

    def add(self, step: int, in_a_row: Tensor, norm: Tensor) -> None:
        """Take a step's gradient norm, and how many updates in a row have been left out by then."""
        pair, arrival = self._send(torch.stack((in_a_row, norm.to(in_a_row.dtype))))
        self._on_the_way.append((step, pair, arrival))
        self._take(waiting=False)

    def look(self) -> list[tuple[int, float]]:
        """Return what is known of all steps so far, and forget it."""
        self._take(waiting=True)
        return self.known()

    def known(self) -> list[tuple[int, float]]:
        """Return what is known by now, and forget it."""
        begun, self.begun = self.begun, []
        return begun

    def _take(self, waiting: bool) -> None:
        while self._on_the_way:
            step, pair, arrival = self._on_the_way[0]
            if not waiting and (not pair.is_cpu or (arrival and not arrival.query())):
                return
            if arrival:
                arrival.synchronize()
            self._on_the_way.popleft()
            in_a_row, norm = pair.tolist()
            if in_a_row == 1:
                self.begun.append((step, norm))

    def _send(self, pair: Tensor) -> tuple[Tensor, Any]:
        """Start copying from CUDA to the host; return the copy, and the event of its arrival."""
        if not pair.is_cuda:
            return pair, None
        copy = torch.empty(pair.shape, dtype=pair.dtype, pin_memory=True)
        copy.copy_(pair, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return copy, arrival
