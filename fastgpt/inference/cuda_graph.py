"""Steps that a GPU repeats without Python: recorded into a CUDA graph, then replayed.

The launches of a small step take the host longer than they take the GPU; a graph is one launch.
What is recorded is what the GPU did, so a step may depend on nothing that the host decides, and all
that it reads or changes must stay where it is in memory.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")

WARM_UP = 2  # calls before the recording: kernels are compiled, and libraries take their memory
WORTH = 16  # calls that a recording must spare: it takes as long as about so many

_one_at_a_time = threading.Lock()  # of the recordings in a process: more, CUDA does not allow


class Replayed(Generic[Result]):
    """A function without arguments, run as it is a few times, then recorded and replayed.

    What it returns is then always the same tensors, with what the last call wrote into them. The
    function is given anew to each call, and must be the same: were it kept, whoever owns this and
    the function would be a cycle, and the GPU's memory would wait for Python to find it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self._replay: Callable[[], Result] | None = None

    def __call__(self, function: Callable[[], Result], more: int) -> Result:
        """Run it; `more` says how many more calls may follow."""
        self._calls += 1
        if self._replay is None and self._calls > WARM_UP and more >= WORTH:
            self._replay = record(function, self._device)
        return self._replay() if self._replay is not None else function()


def record(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Record what a function launches on a GPU, without running it; return the replay."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with (
        _one_at_a_time,
        torch.cuda.device(device),
        # other threads go on: a data loader may copy to the GPU meanwhile
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = function()

    def replay() -> Result:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def can_record(model: nn.Module) -> bool:
    """Whether steps of a model are launches on one GPU and nothing else.

    Not in a process group, which may have to gather the weights, and not under autocast, which
    keeps copies of them from one step to the next.
    """
    return (
        all(parameter.is_cuda for parameter in model.parameters())
        and len({parameter.device for parameter in model.parameters()}) == 1
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
    )
