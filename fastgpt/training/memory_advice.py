"""Choose settings with which a training step fits into memory, and explain when none is left."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fastgpt.training.memory_estimate import MemoryEstimate, Setup, estimate, gigabytes
from fastgpt.utils.errors import UsageError

HEADROOM = 0.1  # fraction of the free memory reserved for allocations that are not estimated

_OUT_OF_MEMORY = (  # parts of the messages of RuntimeErrors
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "std::bad_alloc",
)


def advice(needed: MemoryEstimate, free: int | None) -> str:
    """Return a message with settings that reduce the memory of a step below `free` bytes.

    The suggested settings keep the number of sequences per step, so that the run computes the same.
    If `free` is None, at most half of the batch size is suggested.
    """
    setup = needed.setup
    limit = needed.total if free is None else _usable(free)
    half = max(1, setup.micro_batch // 2)
    options = []
    for recompute in dict.fromkeys((setup.recompute, True)):
        flag = " --recompute" if recompute and not setup.recompute else ""
        most = setup.micro_batch if flag else half
        if fitting := _largest(replace(setup, recompute=recompute), limit, most):
            batch, accum = fitting.setup.batch_size, fitting.setup.grad_accum
            changed = batch != setup.batch_size
            sizes = f"--batch-size {batch} --grad-accum {accum}" if changed else ""
            options.append(f"{(sizes + flag).strip()} ({gigabytes(fitting.total)})")
    if options:
        return f"try {', or '.join(options)}"
    smallest = estimate(_with_batch(replace(setup, recompute=True), 1))
    return (
        f"even --batch-size 1 --recompute needs {gigabytes(smallest.total)}: try a smaller model "
        "(--n-layer, --n-embd) or a shorter --block-size"
    )


def check_fits(needed: MemoryEstimate, free: int | None) -> str | None:
    """Return a warning if a step does not fit into `free` bytes, else None."""
    if free is None or needed.total <= _usable(free):
        return None
    return (
        f"batch {needed.setup.micro_batch} needs about {gigabytes(needed.total)}; available: "
        f"{gigabytes(free)}; {advice(needed, free)}"
    )


def largest_batch(setup: Setup, free: int) -> int | None:
    """Return the largest batch size estimated to fit into `free` bytes; None if not even 1 fits.

    It is a divisor of the sequences per step, so that ``grad_accum = sequences // batch`` keeps
    their number.
    """
    fitting = _largest(setup, _usable(free), -(-setup.sequences // setup.world_size))
    return fitting.setup.batch_size if fitting else None


def batch_sizes(sequences: int, most: int) -> list[int]:
    """Return the divisors of `sequences` up to `most`, largest first."""
    return [size for size in range(min(most, sequences), 0, -1) if sequences % size == 0]


def find_batch(try_step: Callable[[int], object], candidates: Sequence[int]) -> int:
    """Return the largest of `candidates` for which `try_step(batch_size)` has enough memory.

    Steps are run for real. The memory of a failed step is freed before the next is tried. Other
    errors are propagated.

    Raises:
        UsageError: If there is not enough memory for any of the candidates.
    """
    for batch in sorted(candidates, reverse=True):
        try:
            try_step(batch)
            return batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The except block deletes the error, and with it the frames that referenced tensors.
        gc.collect()
        torch.cuda.empty_cache()
    raise UsageError(
        f"out of memory with every batch size tried, down to {min(candidates)}: use a smaller "
        "model (--n-layer, --n-embd), a shorter --block-size or --recompute"
    )


@contextmanager
def explain_out_of_memory(needed: MemoryEstimate, free: int | None = None) -> Iterator[None]:
    """Turn an out-of-memory error within the block into a UsageError with suggested settings.

    free: the bytes that were available before training, if known.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        had = "" if free is None else f", available: {gigabytes(free)}"
        if free is not None:  # suggest less than this step, even if the estimate says that it fits
            free = min(free, needed.total)
        raise UsageError(
            f"out of memory: a step with batch {needed.setup.micro_batch} needs about {needed}"
            f"{had}; {advice(needed, free)}"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the GPU or the machine ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _usable(free: int) -> int:
    return int(free * (1 - HEADROOM))


def _largest(setup: Setup, limit: int, most: int) -> MemoryEstimate | None:
    """Return the estimate for the largest batch size up to `most` that needs at most `limit`."""
    sizes = batch_sizes(setup.sequences, most)
    estimates = (estimate(_with_batch(setup, size)) for size in sizes)
    return next((needed for needed in estimates if needed.total <= limit), None)


def _with_batch(setup: Setup, batch: int) -> Setup:
    return replace(setup, batch_size=batch, grad_accum=setup.sequences // batch)
