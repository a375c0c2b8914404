"""Distributed training with `torchrun`: the process group, DDP, FSDP and splitting of batches.

`torchrun` starts the processes and sets `RANK`, `WORLD_SIZE` and `LOCAL_RANK` in their
environment. Without it the world size is 1, and all functions return without communication.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastgpt.model import GPT
from fastgpt.utils.errors import UsageError

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=30)  # one process may tokenize or evaluate while the others wait
GLOO_RELEASE_SECONDS = 0.2  # see `World.close`


class World:
    """The processes of this run: their number `size`, and the `rank` of this process.

    CPU tensors and objects (control messages) are exchanged with gloo, CUDA tensors such as
    gradients with NCCL.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._started = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def start(self, device: torch.device) -> None:
        """Initialize the process group. All processes must call it.

        Does nothing with a single process, or if a process group exists already.
        """
        if self.size == 1 or dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        if self.size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            # On a single machine torchrun keeps its store across restarts. Without a separate
            # prefix per restart, a process could read the address of one that has ended.
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"restart {restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self._started = True

    def close(self) -> None:
        """Destroy the process group, if `start` has initialized it."""
        if self._started:
            dist.destroy_process_group()
            self._started = False
            # A gloo thread releases the last message slightly after it was delivered, and acquires
            # the GIL for that. If the interpreter is finalizing by then, the process is aborted.
            time.sleep(GLOO_RELEASE_SECONDS)

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over the processes. All processes must call it."""
        if self.size == 1:
            return list(numbers)
        reduced = torch.tensor(numbers)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return reduced.tolist()

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over the processes, in fp64. All processes must call it."""
        if self.size == 1:
            return list(numbers)
        reduced = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(reduced)
        return reduced.tolist()

    def broadcast_object(self, value: Any) -> Any:
        """Broadcast an object from the main process and return it. All processes must call it.

        The argument is ignored in the other processes.
        """
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensors from the main process, in place. All processes must call it."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def on_main(self, function: Callable[[], Result]) -> Result | None:
        """Return `function()` in the main process, None in the others. All processes must call it.

        An exception of the function is raised in all processes. Otherwise the others would wait, in
        their next collective call, for a process that has ended.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = function()
            except Exception as raised:
                error = raised
        message = self.broadcast_object(error and _message(error))
        if message is not None:
            raise error or UsageError(message)
        return result

    def from_main(self, function: Callable[[], Result]) -> Result:
        """Return the main process's `function()` in all processes. See `on_main`."""
        result: Result = self.broadcast_object(self.on_main(function))
        return result


def split_step(sequences: int, micro_batch: int, world: World) -> list[tuple[int, int]]:
    """Return the micro-batches of this process in a step, as (first sequence, count) pairs.

    The `sequences` of a step are split equally between the processes, and each part into
    micro-batches of at most `micro_batch` sequences. The result of a step therefore does not depend
    on the number of processes.

    Raises:
        UsageError: If `sequences` is not a multiple of the number of processes.
    """
    if sequences % world.size:
        raise UsageError(
            f"{sequences} sequences per step (batch_size * grad_accum) cannot be divided equally "
            f"between {world.size} processes: use a multiple, e.g. --batch-size "
            f"{-(-sequences // world.size)} --grad-accum {world.size}"
        )
    own = sequences // world.size
    first, end = world.rank * own, (world.rank + 1) * own
    return [(at, min(micro_batch, end - at)) for at in range(first, end, micro_batch)]


def wrap(model: GPT, world: World, parallel: str) -> nn.Module:
    """Wrap `model` so that its gradients are averaged over the processes.

    parallel: ``"ddp"`` (Li et al. 2020, arXiv:2006.15704: each process holds the full model) or
    ``"fsdp"`` (Zhao et al. 2023, arXiv:2304.11277: each process holds a shard; `model` is modified
    in place). With a single process, `model` is returned unchanged.
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh  # slow imports
    from torch.distributed.fsdp import fully_shard

    # From PyTorch 2.14 on, a warning that in-place operations on the outputs of blocks would skip
    # FSDP's hooks. The network has no such operations.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(model.device.type, (world.size,))
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh)
    return model


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
    """Return a context manager for the forward *and* backward of one micro-batch of a step.

    Gradients are reduced over the processes only if `enabled`, as in the last micro-batch. DDP
    reads the flag during the forward pass: if the context were entered after it, the processes
    would silently diverge.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext() if enabled else module.no_sync()
    if _is_sharded(module):
        module.set_requires_gradient_sync(enabled)  # type: ignore[operator]
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of an FSDP model after forward passes without a backward.

    FSDP gathers the full parameters for the forward, and would keep them until the next backward.
    """
    if _is_sharded(model):
        model.reshard()  # type: ignore[operator]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (a DTensor); others are returned unchanged.

    All processes must call it.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def shard_like(tensor: Tensor, example: Any) -> Tensor:
    """Shard a full tensor with the mesh and placements of `example`.

    The tensor is returned unchanged if `example` is not sharded, and if it is a scalar.
    """
    if not hasattr(example, "full_tensor") or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def launcher() -> str | None:
    """Return a name for the `torchrun` that started this process, None without `torchrun`.

    The name stays the same when `torchrun` restarts the process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.uname().nodename} {os.getppid()}"


def _is_sharded(module: Any) -> bool:
    """Whether a module is wrapped by FSDP.

    Checks an attribute instead of the type, because importing FSDP takes seconds.
    """
    return hasattr(module, "set_requires_gradient_sync")


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, UsageError) else f"the main process failed: {error!r}"
