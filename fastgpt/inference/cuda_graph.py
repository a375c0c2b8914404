"""Capture of repeated GPU work in a CUDA graph, replayed without running Python.

Launching the kernels of a small step takes the host longer than the GPU takes to run them; a graph
needs one launch. A graph replays the captured kernels with the captured addresses. A captured step
must therefore not depend on decisions made by the host, and the tensors that it reads or changes
must keep their memory. Only generation captures graphs; training does not.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")

WARM_UP = 2  # calls before the capture, in which kernels compile and libraries allocate memory
WORTH = 16  # calls that a capture must replace: it takes about as long as this many

_capture_lock = threading.Lock()  # CUDA allows one capture at a time in a process


class GraphRunner(Generic[Result]):
    """Run a function without arguments a few times, then capture it and replay the graph.

    After the capture, every call returns the same tensors, with the values of the latest call. The
    same function must be passed to each call. It is not stored, because that would create a
    reference cycle with the owner of both objects, and GPU memory would be freed only when Python's
    garbage collector finds the cycle.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self._replay: Callable[[], Result] | None = None

    def __call__(self, function: Callable[[], Result], more: int) -> Result:
        """Run or replay the function. more: how many calls may follow this one."""
        self._calls += 1
        if self._replay is None and self._calls > WARM_UP and more >= WORTH:
            self._replay = capture(function, self._device)
        return self._replay() if self._replay is not None else function()


def capture(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Capture the work that a function launches on a GPU, without executing it.

    Returns a function that replays the graph and returns the captured result tensors.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with (
        _capture_lock,
        torch.cuda.device(device),
        # "thread_local": other threads, such as a data loader, may still copy to the GPU
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = function()

    def replay() -> Result:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def can_capture(model: nn.Module) -> bool:
    """Return whether a step of the model consists of launches on a single GPU only.

    This is not the case in a process group, where weights may have to be gathered, or under
    autocast, which caches copies of the weights between steps. Also returns False during another
    capture.
    """
    return (
        all(parameter.is_cuda for parameter in model.parameters())
        and len({parameter.device for parameter in model.parameters()}) == 1
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
    )
