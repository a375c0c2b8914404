"""Several processes that train one model: who takes part, and how they agree.

`torchrun` starts the processes and tells each its place in the environment. Alone, without it, a
process is a world of one, and every call here is free of cost.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastgpt.model import GPT
from fastgpt.utils.errors import UsageError

TIMEOUT = timedelta(minutes=30)  # one process may tokenize or evaluate while the others wait
PUT_DOWN_SECONDS = 0.2


class World:
    """The processes of this run: `size` of them, this one is number `rank`.

    Messages between the hosts (what to do next) go by gloo, gradients on GPUs by NCCL.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._started = False

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def start(self, device: torch.device) -> None:
        """Find the other processes; to be called by all of them."""
        if self.size == 1 or dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        if self.size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            # On one machine torchrun keeps its store over restarts: without names of its own a
            # process could find the address of one that has ended.
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"restart {restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self._started = True

    def close(self) -> None:
        """Part from the others, if `start` has found them."""
        if self._started:
            dist.destroy_process_group()
            self._started = False
            # A thread of gloo's puts down the last message a moment after we have it, and takes
            # Python's lock for that. If Python is ending by then, the process is aborted.
            time.sleep(PUT_DOWN_SECONDS)

    def agree(self, *numbers: int) -> list[int]:
        """Return the largest of what the processes bring for each number; all must call."""
        if self.size == 1:
            return list(numbers)
        together = torch.tensor(numbers)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return [int(number) for number in together]

    def sums(self, *numbers: float) -> list[float]:
        """Return the sum over the processes of each number, in fp64; all must call."""
        if self.size == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(together)
        return [float(number) for number in together]

    def tell(self, thing: Any) -> Any:
        """Return what the main process brings; all must call."""
        if self.size == 1:
            return thing
        box = [thing if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Have all processes hold what the main one has in these tensors; all must call."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    @contextlib.contextmanager
    def only_main(self) -> Iterator[bool]:
        """Give whether to act: only the main process does, and what it raises, all raise.

        Without this the others would wait for a process that has ended.
        """
        error: Exception | None = None
        if self.is_main:
            try:
                yield True
            except Exception as raised:
                error = raised
        else:
            yield False
        told = self.tell(None if error is None else _as_message(error))
        if error is not None:
            raise error
        if told is not None:
            raise UsageError(told)


def share_out(sequences: int, micro_batch: int, world: World) -> list[tuple[int, int]]:
    """Return this process's micro-batches of a step: (first sequence, how many) of each.

    A step's `sequences` are cut into equal parts, one a process, and each part into micro-batches
    of at most `micro_batch`. So what a step computes does not depend on how many share it.
    """
    if sequences % world.size:
        raise UsageError(
            f"{sequences} sequences a step (batch_size * grad_accum) cannot be shared by "
            f"{world.size} processes: make it a multiple, e.g. --batch-size "
            f"{-(-sequences // world.size)} --grad-accum {world.size}"
        )
    own = sequences // world.size
    first, end = world.rank * own, (world.rank + 1) * own
    return [(at, min(micro_batch, end - at)) for at in range(first, end, micro_batch)]


def wrap(model: GPT, world: World, parallel: str) -> nn.Module:
    """Return the module to call in training: `model`, with its gradients averaged over processes.

    parallel: ``"ddp"`` (Li et al. 2020, arXiv:2006.15704: each process holds everything) or
    ``"fsdp"`` (Zhao et al. 2023, arXiv:2304.11277: each holds a part; `model` itself is changed).
    """
    if world.size == 1:
        return model
    if parallel == "fsdp":
        return _shard(model, world)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context for a micro-batch's forward *and* backward: only the last one's sum up.

    DDP looks at this when the forward runs. Said after it, the processes would go apart in silence.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else module.no_sync()
    if _is_sharded(module):
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
    return nullcontext()


def settle(model: nn.Module) -> None:
    """Have each process hold its part only again; fsdp gathers for a forward, until a backward."""
    if _is_sharded(model):
        model.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor whose parts processes hold; all must call."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def part_like(tensor: Tensor, example: Any) -> Tensor:
    """Return of a whole tensor what this process holds of it, laid out as `example`."""
    if not hasattr(example, "full_tensor") or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def restarted_by() -> str | None:
    """Name the `torchrun` that has started this process again after a failure, if one has."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    return launcher()


def launcher() -> str | None:
    """Name the `torchrun` that started this process; the name stays when it starts it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.uname().nodename} {os.getppid()}"


def _is_sharded(module: Any) -> bool:
    """Whether a module is FSDP's; to import that takes seconds, and who has used it has it."""
    return hasattr(module, "set_requires_gradient_sync")


def _shard(model: GPT, world: World) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (world.size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _as_message(error: Exception) -> str:
    return str(error) if isinstance(error, UsageError) else f"the main process failed: {error!r}"
