"""Track optimizer updates skipped because of non-finite gradients, without synchronization."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class SkippedUpdates:
    """Records streaks of skipped updates by their first step and its gradient norm.

    The device decides whether to apply an update (see `fastgpt.training.optimizer`). This class
    does not synchronize with it, unless asked to: on a CPU the decision is available immediately,
    on CUDA about a step later (copied to pinned memory asynchronously).
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def add(self, step: int, n_skipped: Tensor, norm: Tensor) -> None:
        """Add the result of a step.

        Args:
            step: The step number.
            n_skipped: The number of consecutive skipped updates up to this step (0: applied), a
                scalar on the device.
            norm: The gradient norm of the step, a scalar on the device.
        """
        pair, copied = self._send(torch.stack((n_skipped, norm.to(n_skipped.dtype))))
        self._pending.append((step, pair, copied))

    def new_streaks(self, wait: bool = False) -> list[tuple[int, float]]:
        """Return the streaks, as (step, norm), that have become known since the last call.

        wait: wait for the results of all steps. Without it, the results are available on a CPU and
            on CUDA only.
        """
        streaks = []
        while self._pending:
            step, pair, copied = self._pending[0]
            if not wait and (not pair.is_cpu or (copied and not copied.query())):
                break
            if copied:
                copied.synchronize()
            self._pending.popleft()
            n_skipped, norm = pair.tolist()  # synchronizes on devices other than CPU and CUDA
            if n_skipped == 1:
                streaks.append((step, norm))
        return streaks

    def _send(self, pair: Tensor) -> tuple[Tensor, Any]:
        """Start an asynchronous copy to the host; return it and the event of its completion.

        Tensors that are not on CUDA are returned as they are, without an event.
        """
        if not pair.is_cuda:
            return pair, None
        copy = torch.empty(pair.shape, dtype=pair.dtype, pin_memory=True)
        copy.copy_(pair, non_blocking=True)
        return copy, torch.cuda.current_stream().record_event()
