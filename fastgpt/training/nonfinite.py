"""Track optimizer updates skipped because of non-finite gradients, without synchronization."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class SkippedUpdates:
    """Records streaks of skipped updates: `begun` holds the (step, gradient norm) of their starts.

    The device decides whether to apply an update (see `fastgpt.training.optimizer`). Except in
    `look`, this class does not synchronize with it: on a CPU the decision is available immediately,
    on CUDA about a step later (copied to pinned memory asynchronously), and on other devices only
    in `look`.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[int, float]] = []
        self._on_the_way: deque[tuple[int, Tensor, Any]] = deque()

    def add(self, step: int, in_a_row: Tensor, norm: Tensor) -> None:
        """Add the result of a step.

        Args:
            step: The step number.
            in_a_row: The number of consecutive skipped updates up to this step (0: applied), a
                scalar on the device.
            norm: The gradient norm of the step, a scalar on the device.
        """
        pair, arrival = self._send(torch.stack((in_a_row, norm.to(in_a_row.dtype))))
        self._on_the_way.append((step, pair, arrival))
        self._take(waiting=False)

    def look(self) -> list[tuple[int, float]]:
        """Wait for the results of all steps, return the new streaks, and clear the list."""
        self._take(waiting=True)
        return self.known()

    def known(self) -> list[tuple[int, float]]:
        """Return the streaks known so far, without waiting, and clear the list."""
        begun, self.begun = self.begun, []
        return begun

    def _take(self, waiting: bool) -> None:
        """Process results in order, up to the first that has not arrived unless `waiting`."""
        while self._on_the_way:
            step, pair, arrival = self._on_the_way[0]
            if not waiting and (not pair.is_cpu or (arrival and not arrival.query())):
                return
            if arrival:
                arrival.synchronize()
            self._on_the_way.popleft()
            in_a_row, norm = pair.tolist()  # synchronizes on devices other than CPU and CUDA
            if in_a_row == 1:
                self.begun.append((step, norm))

    def _send(self, pair: Tensor) -> tuple[Tensor, Any]:
        """Start an asynchronous copy to the host; return it and the event of its completion.

        Tensors that are not on CUDA are returned as they are, without an event.
        """
        if not pair.is_cuda:
            return pair, None
        copy = torch.empty(pair.shape, dtype=pair.dtype, pin_memory=True)
        copy.copy_(pair, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return copy, arrival
