"""Estimate the memory of a training step, and suggest settings that reduce it.

`estimate` adds up the tensors that are alive at the same time, computed from their shapes: those of
the model and the optimizer, and those that autograd saves for the backward pass. Allocations of
libraries (the CUDA context, workspaces, fragmentation) are not included; `HEADROOM` is reserved for
them.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastgpt.lora import Lora
from fastgpt.model import GPTConfig
from fastgpt.ops import cpu, products
from fastgpt.ops.native import MAX_LOGITS
from fastgpt.utils.errors import UsageError

HEADROOM = 0.1  # fraction of the free memory reserved for allocations that are not estimated
FP32 = 4  # bytes; the residual stream and the weights are fp32 in every precision
KERNELS_LOGITS = 1_700_000_000  # maximum bytes of logits that the Triton kernels hold at once
STATES = {"adamw": 2}  # fp32 values per parameter in the optimizer state


@dataclass(frozen=True)
class Setup:
    """The settings that determine the memory of a step; see `estimate`."""

    config: GPTConfig
    batch_size: int
    grad_accum: int = 1
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    backend: str = "native"
    device: str = "cpu"
    world_size: int = 1
    fsdp: bool = False
    recompute: bool = False
    lora: Lora | None = None

    @property
    def sequences(self) -> int:
        """The number of sequences per step, over all processes."""
        return self.batch_size * self.grad_accum

    @property
    def micro_batch(self) -> int:
        """The number of sequences that a process computes at once."""
        return min(self.batch_size, -(-self.sequences // self.world_size))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device in use at the peak of a training step."""

    setup: Setup
    weights: int
    """Weights in fp32, and their copies in the dtype of the matrix products."""
    gradients: int
    optimizer: int
    activations: int
    """Activations saved for the backward pass, and temporary tensors of the backward pass."""
    loss: int
    """The logits and tensors derived from them."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(size for _, size in self._parts())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self._parts())
        return f"{gigabytes(self.total)} ({parts})"

    def table(self) -> str:
        """Return a text table of the parts, with their percentages of the total."""
        rows = [*self._parts(), ("total", self.total)]
        return "\n".join(
            f"{name:<12}{gigabytes(size):>9}  {size / max(1, self.total):>4.0%}"
            for name, size in rows
        )

    def _parts(self) -> list[tuple[str, int]]:
        names = ("weights", "gradients", "optimizer", "activations", "loss")
        return [(name, getattr(self, name)) for name in names]


def estimate(
    config: GPTConfig,
    batch_size: int,
    *,
    grad_accum: int = 1,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    backend: str = "native",
    device: str = "cpu",
    world_size: int = 1,
    fsdp: bool = False,
    recompute: bool = False,
    lora: Lora | None = None,
) -> MemoryEstimate:
    """Return the estimated memory of a training step on one device.

    Args:
        config: The model configuration.
        batch_size: Sequences per micro-batch.
        grad_accum: Micro-batches per step. The `batch_size * grad_accum` sequences of a step are
            divided between `world_size` processes.
        dtype: The dtype of the matrix products, as with autocast. Weights, gradients and optimizer
            state are fp32.
        optimizer: The name of the optimizer, "adamw".
        backend: The backend of `fastgpt.ops`: "native", "triton" or "reference".
        device: The device type, such as "cpu" or "cuda".
        world_size: The number of processes.
        fsdp: Whether weights, gradients and optimizer state are sharded over the processes;
            otherwise each process holds all.
        recompute: Whether the activations of a block are recomputed in the backward pass.
        lora: The LoRA configuration, if only its matrices are trained. All other weights are then
            frozen and have neither gradients nor moments.

    Raises:
        ValueError: If the name of the optimizer or the backend is unknown.
    """
    setup = Setup(
        config,
        batch_size,
        grad_accum,
        dtype,
        optimizer,
        backend,
        device,
        world_size,
        fsdp,
        recompute,
        lora,
    )
    return _estimate(setup)


def available(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated on a device; None if unknown.

    On CUDA, this is the free memory plus what the caching allocator of this process holds unused.
    On a CPU, it is the available memory of the system, or less if a control group (of a container
    or batch job) has a lower limit.

    root: the folder that contains `proc` and `sys`.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type != "cpu":
        return None
    return min((*_system_free(root), *_cgroups_free(root)), default=None)


def used(device: torch.device) -> int | None:
    """Return the peak bytes of tensors on a GPU, or the current resident memory of the process.

    None if unknown. The call takes a few microseconds on a CPU, and a few hundred on CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # exists on Linux only
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def advice(needed: MemoryEstimate, free: int | None) -> str:
    """Return a message with settings that reduce the memory of a step below `free` bytes.

    The suggested settings keep the number of sequences per step, so that the run computes the same.
    If `free` is None, at most half of the batch size is suggested.
    """
    setup = needed.setup
    limit = needed.total if free is None else int(free * (1 - HEADROOM))
    half = max(1, setup.micro_batch // 2)
    options = []
    for recompute in dict.fromkeys((setup.recompute, True)):
        asked = replace(setup, recompute=recompute)
        flag = " --recompute" if recompute and not setup.recompute else ""
        most = setup.micro_batch if flag else half
        batch = _largest(asked, limit, most)
        if batch is not None:
            sized = _with_batch(asked, batch)
            size = "" if batch == setup.batch_size else _batch_options(sized)
            options.append(f"{(size + flag).strip()} ({gigabytes(_estimate(sized).total)})")
    if options:
        return f"try {', or '.join(dict.fromkeys(options))}"
    smallest = _estimate(_with_batch(replace(setup, recompute=True), 1))
    return (
        f"even --batch-size 1 --recompute needs {gigabytes(smallest.total)}: try a smaller model "
        "(--n-layer, --n-embd) or a shorter --block-size"
    )


def check_fits(needed: MemoryEstimate, free: int | None) -> str | None:
    """Return a warning if a step does not fit into `free` bytes, else None."""
    if free is None or needed.total <= int(free * (1 - HEADROOM)):
        return None
    return (
        f"batch {needed.setup.micro_batch} needs about {gigabytes(needed.total)}; available: "
        f"{gigabytes(free)}; {advice(needed, free)}"
    )


def largest_batch(needed: MemoryEstimate, free: int) -> int | None:
    """Return the largest batch size estimated to fit into `free` bytes; None if not even 1 fits.

    It is a divisor of the sequences per step, so that ``grad_accum = sequences // batch`` keeps
    their number.
    """
    setup = needed.setup
    limit = int(free * (1 - HEADROOM))
    return _largest(setup, limit, -(-setup.sequences // setup.world_size))


def batches(sequences: int, most: int) -> list[int]:
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
        if _has_memory(try_step, batch):
            return batch
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
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def gigabytes(size: float) -> str:
    """Format a number of bytes in GB (10⁹ bytes), or in MB if it is small."""
    return f"{size / 1e9:,.1f} GB" if size >= 0.95e9 else f"{size / 1e6:,.0f} MB"


_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "std::bad_alloc",
)


# --- the estimate ------------------------------------------------------------------------------
#
# Sizes are in bytes. n: tokens per micro-batch; C, V: width and vocabulary size; T: context length;
# e: bytes of an element in the dtype of the matrix products. "The loops" are the C++ implementation
# on CPUs (`fastgpt.ops.cpu`).


def _estimate(setup: Setup) -> MemoryEstimate:
    """Return the estimate at the peak: the maximum over the candidate points of a step."""
    if setup.optimizer not in STATES:
        raise ValueError(f"optimizer must be one of {', '.join(STATES)}, not {setup.optimizer!r}")
    if setup.backend not in ("native", "triton", "reference"):
        raise ValueError(f"backend must be native, triton or reference, not {setup.backend!r}")
    model = _Parameters.of(setup.config, setup.lora)
    e = setup.dtype.itemsize
    # Autocast's copies of the weights, kept until the end of the backward. The loops make none.
    casts = model.products * e if e < FP32 and not _uses_cpu_loops(setup) else 0
    share = setup.world_size if setup.fsdp else 1
    weights = _split(model.total, share) * FP32
    if setup.fsdp:  # gathered parameters: two blocks at a time, and the tables throughout
        weights += (2 * model.block + model.rest) * e
    optimizer = _split(model.trained, share) * FP32 * STATES[setup.optimizer]

    def at(gradients: int, activations: int, loss: int, casts: int) -> MemoryEstimate:
        return MemoryEstimate(setup, weights + casts, gradients, optimizer, activations, loss)

    moments = [at(*moment) for moment in _moments(setup, model, casts, share)]
    return max(moments, key=lambda moment: moment.total)


def _moments(
    setup: Setup, model: "_Parameters", casts: int, share: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (gradients, activations, loss, casts) at the points of a step that may be the peak.

    These are the forward and the backward of the loss, the backward of the last and of the first
    block, and the backward of the embedding.
    """
    config, n = setup.config, setup.micro_batch * setup.config.block_size
    e = setup.dtype.itemsize
    table = 0 if setup.lora else model.table * FP32
    # With DDP (its buckets) and gradient accumulation, all gradients exist from the start.
    # Otherwise each is allocated in the backward. The gradient of the head is kept until the end of
    # the backward, where the embedding's is added to it.
    all_gradients = _split(model.trained, share) * FP32
    if (
        setup.fsdp and not setup.lora
    ):  # unsharded gradients of a block and the tables, before the reduce-scatter
        all_gradients += (model.block + model.rest) * FP32
    early = setup.world_size > 1 or setup.sequences > setup.micro_batch
    before = all_gradients if early else 0
    waiting = table if early or config.tie_weights else 0
    tied_twice = config.tie_weights and not _uses_cpu_loops(setup)

    full = n * _kept_by_block(setup)
    kept = n * config.n_embd * (FP32 + e) if setup.recompute else full
    of_norm = FP32 if _uses_cpu_loops(setup) else e
    ends = n * config.n_embd * (FP32 + of_norm)  # the input and output of the final norm
    if config.dropout:
        ends += n * config.n_embd * _mask_bytes(setup)
    redone = full if setup.recompute else 0
    n_layer = config.n_layer
    inside = n * _backward_of_mlp(setup)
    one_cast = casts // n_layer if setup.recompute else casts

    forward, backward = _loss(setup, n)
    yield before, n_layer * kept + ends, forward, casts
    yield before, n_layer * kept + ends, backward, 0 if setup.recompute else casts
    # The backward of the last block, in the MLP, whose tensors are the largest. The gradient of one
    # of its weights (4C²) exists in the dtype of the products.
    gradients = (before or table) + (waiting if early else 0)
    if not setup.lora:
        gradients += 4 * config.n_embd**2 * e
    yield gradients, n_layer * kept + redone + ends + inside, 0, one_cast
    # The backward of the first block: the gradients of all blocks exist, the activations of the
    # others have been freed.
    gradients = all_gradients + (waiting if early else 0)
    yield gradients, kept + redone + inside, 0, one_cast // n_layer
    # The backward of the embedding: its gradient, that of the head, and the sum of both are each as
    # large as the table. The loops add the gradients of the rows to that of the head in place.
    tables = (int(early) + 2 * int(tied_twice)) * table
    yield all_gradients + tables, n * config.n_embd * FP32, 0, 0


def _kept_by_block(setup: Setup) -> int:
    """Return the bytes per token that autograd saves for one block.

    - Each of the two norms saves its input (the residual sum, fp32) and two statistics.
    - The four matrix products save their inputs, one of which is the output of attention.
    - Attention saves queries, keys and values and one value per head. It is fused, so that the
      T × T scores are not stored.
    - GELU saves its input, and dropout its masks.

    In units of the width C: 2 norm inputs, 2 norm outputs, 3 + 1 of attention, 4 + 4 of the MLP.
    """
    config, e = setup.config, setup.dtype.itemsize
    width, heads = config.n_embd, config.n_head
    if setup.backend == "reference":
        return _kept_by_reference(setup)
    kept = width * (2 * FP32 + 14 * e) + 2 * 2 * FP32 + heads * FP32
    if _uses_cpu_loops(setup):  # recompute the outputs of the norms (2C) and of GELU (4C)
        kept -= 6 * width * e
    if setup.lora:
        kept += _kept_by_lora(setup, setup.lora)
    if config.dropout:
        kept += 2 * width * _mask_bytes(setup)
        if setup.device == "cpu" and setup.backend == "native":
            # PyTorch has no fused attention with dropout on a CPU: it saves scores, mask and their
            # product in fp32, and copies of q, k and v.
            kept += 3 * heads * config.block_size * FP32 + 3 * width * FP32
    return kept


def _kept_by_lora(setup: Setup, lora: Lora) -> int:
    """Return the change, in bytes per token, of what is saved for one block with LoRA.

    The adapters save their inputs and the `rank` values between each pair of matrices. Without
    adapters, the loops recompute those inputs (the outputs of the norms and GELU). With other
    backends, they are already counted, and are subtracted for layers without adapters, whose
    frozen weights do not need them.
    """
    width, e = setup.config.n_embd, setup.dtype.itemsize
    n_layers = 2 * lora.of_attention + 2 * lora.of_mlp
    kept = n_layers * lora.rank * e
    if _uses_cpu_loops(setup):
        kept += width * (lora.of_attention + 5 * lora.of_mlp) * e
        if e < FP32:  # the input of GELU is saved in fp32
            kept += width * 4 * lora.of_mlp * (FP32 - e)
    else:
        kept -= width * (1 * (not lora.of_attention) + 5 * (not lora.of_mlp)) * e
    if lora.dropout:  # the masks, and the output of attention after dropout, saved only here
        kept += width * (2 * lora.of_attention + 5 * lora.of_mlp) * _mask_bytes(setup)
        kept += width * lora.of_attention * e
    return kept


def _kept_by_reference(setup: Setup) -> int:
    """Return the bytes per token that autograd saves for one block of the reference backend.

    It saves every intermediate result: per norm the centered and the scaled input (fp32) and the
    result; for GELU four tensors of width 4C in fp32 and the result; for attention the T × T
    probabilities, and q, k, v and the result in heads-first layout.
    """
    config, e = setup.config, setup.dtype.itemsize
    width, scores = config.n_embd, config.n_head * config.block_size
    kept = width * (2 * (2 * FP32 + e) + 4 * e + 4 * (4 * FP32 + e))
    # Except on a CPU, autocast computes softmax in fp32, and saves the rounded result in addition.
    kept += scores * (e if setup.device == "cpu" or e == FP32 else FP32 + e)
    if config.dropout:
        kept += 2 * width * _mask_bytes(setup)
        kept += 2 * scores * e
    return kept


def _uses_cpu_loops(setup: Setup) -> bool:
    """Whether the C++ loops of `fastgpt.ops.cpu` are used."""
    own_bf16 = setup.dtype == torch.bfloat16 and products.own_in_bf16()
    can = setup.dtype == torch.float32 or own_bf16
    return can and setup.device == "cpu" and setup.backend == "native"


def _mask_bytes(setup: Setup) -> int:
    """Return the bytes per element of a dropout mask: bool on CUDA, in the dtype on a CPU."""
    return setup.dtype.itemsize if setup.device == "cpu" else 1


def _backward_of_mlp(setup: Setup) -> int:
    """Return the bytes per token that the backward of the MLP's second product adds.

    These are the gradients of its output (C) and of its input (4C), less the tensors of the final
    norm, which have been freed by then.
    """
    e = setup.dtype.itemsize
    incoming = FP32  # the gradient of the residual stream
    if _uses_cpu_loops(setup) or e < FP32:
        incoming += e  # the recomputed output of the norm, or the gradient rounded for the branch
    return setup.config.n_embd * (incoming + 4 * e - FP32 - e)


def _loss(setup: Setup, n: int) -> tuple[int, int]:
    """Return the bytes of the forward of the loss, and of the start of its backward."""
    vocab, width, e = setup.config.vocab_size, setup.config.n_embd, setup.dtype.itemsize
    if setup.backend == "triton":
        return _loss_of_kernels(n, vocab, width, e, frozen=setup.lora is not None)
    if setup.backend == "reference":
        return n * vocab * (2 * FP32 + e % FP32), n * vocab * 5 * FP32
    trained = 0 if setup.lora else vocab  # rows of the head
    if _uses_cpu_loops(setup):  # one chunk of logits; the forward already computes the gradients
        return (cpu.rows_at_once(n, vocab) * vocab + (n + trained) * width) * FP32, 0
    if n * vocab <= MAX_LOGITS:
        # Forward: logits (in the dtype, then in fp32) and log-probabilities. Backward: in addition
        # their gradients.
        logits = FP32 if e == FP32 else e + FP32
        return n * vocab * (logits + FP32), n * vocab * 3 * FP32
    # In chunks: the logits of the last chunk and their gradient are alive while the next logits are
    # computed. The forward also computes the gradients, and the backward scales them by a factor.
    gradients = n * width * e + trained * width * FP32
    inputs = (n + vocab) * width * e if e < FP32 else 0  # cast for the products
    return MAX_LOGITS * 3 * FP32 + gradients + inputs, 2 * gradients


def _loss_of_kernels(n: int, vocab: int, width: int, e: int, frozen: bool) -> tuple[int, int]:
    """Return the same as `_loss` for the Triton kernels.

    They hold the logits of one chunk, and compute the gradients in fp32 in the forward. The
    vocabulary is padded to a multiple of 128.

    frozen: whether the head needs no gradient.
    """
    padded = -(-vocab // 128) * 128
    logits = n * padded * e
    summed = logits > KERNELS_LOGITS and e < FP32 and not frozen
    head = padded * width * (e + (FP32 if summed else 0))
    gradients = (n + (0 if frozen else padded)) * width * FP32
    rounded = n * width * e + (0 if frozen else vocab * width * FP32)
    return min(logits, KERNELS_LOGITS) + head + gradients, gradients + rounded


@dataclass(frozen=True)
class _Parameters:
    """Numbers of parameters."""

    table: int  # in the token embedding, and also in the head
    block: int  # in one block
    rest: int  # outside of the blocks
    products: int  # in the weights of matrix products
    total: int
    trained: int

    @classmethod
    def of(cls, config: GPTConfig, lora: Lora | None = None) -> "_Parameters":
        """Return the numbers of parameters of a model."""
        width = config.n_embd
        table = config.vocab_size * width
        matrices = 12 * width * width
        norm = width * (2 if config.bias else 1)
        block = matrices + 2 * norm + (9 * width if config.bias else 0)
        heads = 1 if config.tie_weights else 2
        rest = heads * table + config.block_size * width + norm
        products, total = config.n_layer * matrices + table, config.n_layer * block + rest
        added = lora.n_params(config) if lora else 0
        return cls(table, block, rest, products, total + added, added or total)


def _split(count: int, parts: int) -> int:
    """Return the size of the largest of `parts` nearly equal shards."""
    return -(-count // parts)


# --- what fits ---------------------------------------------------------------------------------


def _largest(setup: Setup, limit: int, most: int) -> int | None:
    """Return the largest batch size up to `most` that needs at most `limit` bytes, or None."""
    sizes = batches(setup.sequences, most)
    fits = (size for size in sizes if _estimate(_with_batch(setup, size)).total <= limit)
    return next(fits, None)


def _with_batch(setup: Setup, batch: int) -> Setup:
    return replace(setup, batch_size=batch, grad_accum=setup.sequences // batch)


def _batch_options(setup: Setup) -> str:
    return f"--batch-size {setup.batch_size} --grad-accum {setup.grad_accum}"


def _has_memory(try_step: Callable[[int], object], batch: int) -> bool:
    try:
        try_step(batch)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # After the except block the error is deleted, and with it the frames that referenced tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


# --- available memory of the system ------------------------------------------------------------


def _system_free(root: Path) -> Iterator[int]:
    """Yield the available memory as reported by Linux."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _cgroups_free(root: Path) -> Iterator[int]:
    """Yield the memory left by the control groups of this process and their ancestors."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # cgroup version 2
                yield from _levels_free(
                    root / "sys/fs/cgroup", path, "memory.max", "memory.current"
                )
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                yield from _levels_free(root / "sys/fs/cgroup/memory", path, *names)


def _levels_free(top: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    """Yield the limit minus the usage of a control group and of each of its ancestors.

    In a container, `path` may not exist; missing levels are skipped. The usage includes cached
    files, which the system can drop at any time: they are counted as available.
    """
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # the group does not exist, or the limit is "max"
            most = int((folder / limit).read_text(encoding="utf-8"))
            taken = int((folder / usage).read_text(encoding="utf-8"))
            yield max(0, most - taken + _cached_files(folder))
        if folder == top:
            return


def _cached_files(folder: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines():
            if line.startswith(("inactive_file ", "total_inactive_file ")):
                return int(line.split()[1])
    return 0
