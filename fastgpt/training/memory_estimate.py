"""How much memory training takes, before it starts; and what to change when there is too little.

`estimate` adds up the tensors that live at once, from the shapes alone: of the model, of the
optimizer, and of what autograd keeps for the backward pass. What a library allocates besides
(CUDA's own context and workspaces, fragmentation) is not in it; `HEADROOM` is left for that.
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

HEADROOM = 0.1  # of what is free, for what no estimate sees
FP32 = 4  # bytes; also of the residual stream and of all weights, whatever the precision
KERNELS_LOGITS = 1_700_000_000  # bytes of logits that the Triton kernels hold at once
STATES = {"adamw": 2}  # numbers in fp32 that an optimizer keeps of each parameter


@dataclass(frozen=True)
class Setup:
    """What decides how much memory a step takes; see `estimate`."""

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
        """Sequences that a step consumes, over all processes."""
        return self.batch_size * self.grad_accum

    @property
    def micro_batch(self) -> int:
        """Sequences that a process computes at once."""
        return min(self.batch_size, -(-self.sequences // self.world_size))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device that are in use at the worst moment of a training step."""

    setup: Setup
    weights: int
    """In fp32, and their copies in the dtype of the products."""
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs of the forward, and its own temporary tensors."""
    loss: int
    """The logits, and what is made of them."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(size for _, size in self._parts())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self._parts())
        return f"{gigabytes(self.total)} ({parts})"

    def table(self) -> str:
        """Return the parts as lines of text, with their shares."""
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
    """Return the memory that a step of training takes on one device.

    batch_size, grad_accum: the recipe's, a step's sequences are their product, shared by
    `world_size` processes. dtype: of the products, as autocast has it; weights, gradients and
    optimizer are fp32. backend: that of `fastgpt.ops` which computes ("native", "triton",
    "reference"). fsdp: weights, gradients and optimizer are shared by the processes too; without
    it each has all. recompute: activations of a block are computed again in the backward. lora:
    small matrices are trained, and all else is frozen, with neither gradients nor moments.
    ValueError if a name is unknown.
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
    """Return the bytes that can still be allocated on a device; None if nobody knows.

    On CUDA what is free and what this process holds unused; on a CPU what the system calls
    available, or less if a control group (a container, a batch job) is allowed less. root: where
    `proc` and `sys` are looked for.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type != "cpu":
        return None
    return min((*_system_free(root), *_cgroups_free(root)), default=None)


def used(device: torch.device) -> int | None:
    """Return the most bytes that tensors had on a GPU, or those that the process has in memory.

    None if nobody knows. It takes some microseconds on a CPU, some hundred on CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # Linux alone has it
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def advice(needed: MemoryEstimate, free: int | None) -> str:
    """Say what lowers the memory of a step below `free` bytes, and by how much.

    The settings named leave the sequences of a step as they are, so that the run computes the same.
    With `free` None, at most half of the batch is proposed.
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
    """Return a line that warns of a batch too large for `free` bytes; None if it fits."""
    if free is None or needed.total <= int(free * (1 - HEADROOM)):
        return None
    return (
        f"batch {needed.setup.micro_batch} needs about {gigabytes(needed.total)}; there are "
        f"{gigabytes(free)}: {advice(needed, free)}"
    )


def largest_batch(needed: MemoryEstimate, free: int) -> int | None:
    """Return the largest batch that fits into `free` bytes, by the estimate; None if not even 1.

    It divides the sequences of a step, which stay as many: ``grad_accum = sequences // batch``.
    """
    setup = needed.setup
    limit = int(free * (1 - HEADROOM))
    return _largest(setup, limit, -(-setup.sequences // setup.world_size))


def batches(sequences: int, most: int) -> list[int]:
    """Return the batch sizes up to `most` that divide a step's sequences, largest first."""
    return [size for size in range(min(most, sequences), 0, -1) if sequences % size == 0]


def find_batch(try_step: Callable[[int], object], candidates: Sequence[int]) -> int:
    """Return the largest of `candidates` with which `try_step(batch_size)` has memory enough.

    It really does the step, and frees what a failed one left before it tries the next. Other errors
    pass through; UsageError if no candidate works.
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
    """Turn an error for want of memory into a UsageError that says what to change.

    free: the bytes that were available before training, where known.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        had = "" if free is None else f", and there were {gigabytes(free)}"
        if free is not None:  # it did not do, so whatever is proposed must be smaller
            free = min(free, needed.total)
        raise UsageError(
            f"out of memory: a step with batch {needed.setup.micro_batch} needs about {needed}"
            f"{had}; {advice(needed, free)}"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def gigabytes(size: float) -> str:
    """Write a number of bytes in GB of 10⁹, small ones in MB."""
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
# Sizes are in bytes. n: tokens of a micro-batch; C, V: width and vocabulary; e: bytes of a number
# in the dtype of the products.


def _estimate(setup: Setup) -> MemoryEstimate:
    """Go through the moments of a step that may be the worst, and return the one that is."""
    if setup.optimizer not in STATES:
        raise ValueError(f"optimizer must be one of {', '.join(STATES)}, not {setup.optimizer!r}")
    if setup.backend not in ("native", "triton", "reference"):
        raise ValueError(f"backend must be native, triton or reference, not {setup.backend!r}")
    model = _Parameters.of(setup.config, setup.lora)
    e = setup.dtype.itemsize
    # Autocast's copies, kept until the backward is through; the loops' products need none.
    casts = model.products * e if e < FP32 and not _by_loops(setup) else 0
    share = setup.world_size if setup.fsdp else 1
    weights = _split(model.total, share) * FP32
    if setup.fsdp:  # what is gathered from the others: two blocks, and the tables throughout
        weights += (2 * model.block + model.rest) * e
    optimizer = _split(model.trained, share) * FP32 * STATES[setup.optimizer]

    def at(gradients: int, activations: int, loss: int, casts: int) -> MemoryEstimate:
        return MemoryEstimate(setup, weights + casts, gradients, optimizer, activations, loss)

    moments = [at(*moment) for moment in _moments(setup, model, casts, share)]
    return max(moments, key=lambda moment: moment.total)


def _moments(
    setup: Setup, model: "_Parameters", casts: int, share: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (gradients, activations, loss, casts) of the moments that may be the worst."""
    config, n = setup.config, setup.micro_batch * setup.config.block_size
    e = setup.dtype.itemsize
    table = 0 if setup.lora else model.table * FP32
    # DDP's buckets, and what earlier micro-batches added, are there from the start; otherwise each
    # gradient appears in the backward. The head's waits for the embedding's, to be added to it.
    all_gradients = _split(model.trained, share) * FP32
    if (
        setup.fsdp and not setup.lora
    ):  # those of a block and of the tables, before they are shared out
        all_gradients += (model.block + model.rest) * FP32
    early = setup.world_size > 1 or setup.sequences > setup.micro_batch
    before = all_gradients if early else 0
    waiting = table if early or config.tie_weights else 0
    tied_twice = config.tie_weights and not _by_loops(setup)

    full = n * _kept_by_block(setup)
    kept = n * config.n_embd * (FP32 + e) if setup.recompute else full
    of_norm = FP32 if _by_loops(setup) else e
    ends = n * config.n_embd * (FP32 + of_norm)  # the last norm's sum and result
    if config.dropout:
        ends += n * config.n_embd * _mask_bytes(setup)
    redone = full if setup.recompute else 0
    n_layer = config.n_layer
    inside = n * _backward_of_mlp(setup)
    one_cast = casts // n_layer if setup.recompute else casts

    forward, backward = _loss(setup, n)
    yield before, n_layer * kept + ends, forward, casts
    yield before, n_layer * kept + ends, backward, 0 if setup.recompute else casts
    # The backward of the last block: of the MLP's first product, the largest of its tensors ...
    gradients = (before or table) + (waiting if early else 0)
    if not setup.lora:
        gradients += 4 * config.n_embd**2 * e
    yield gradients, n_layer * kept + redone + ends + inside, 0, one_cast
    # ... and of the first: all other blocks' gradients are there, and none of their activations.
    gradients = all_gradients + (waiting if early else 0)
    yield gradients, kept + redone + inside, 0, one_cast // n_layer
    # The embedding's gradient is as large as the table, and so are the head's, which waits for it,
    # and the sum of both. The loops add the rows' to the head's where it is.
    tables = (int(early) + 2 * int(tied_twice)) * table
    yield all_gradients + tables, n * config.n_embd * FP32, 0, 0


def _kept_by_block(setup: Setup) -> int:
    """Return the bytes per token that autograd keeps of one block.

    The two norms keep the sum that they norm, in fp32, and two statistics; the four products keep
    their inputs, of which attention's result is one; attention keeps queries, keys and values and a
    number per head (it is fused: no T × T scores), GELU what it is applied to. In numbers of width
    C: 2 sums, 2 normed, 3 + 1 of attention, 4 + 4 of the MLP. Dropout keeps its masks.
    """
    config, e = setup.config, setup.dtype.itemsize
    width, heads = config.n_embd, config.n_head
    if setup.backend == "reference":
        return _kept_by_reference(setup)
    kept = width * (2 * FP32 + 14 * e) + 2 * 2 * FP32 + heads * FP32
    if _by_loops(setup):  # which compute what the norms and GELU put out again
        kept -= 6 * width * e
    if setup.lora:
        kept += _kept_by_lora(setup, setup.lora)
    if config.dropout:
        kept += 2 * width * _mask_bytes(setup)
        if setup.device == "cpu" and setup.backend == "native":
            # PyTorch has no fused attention with dropout there: scores, mask and product are kept
            # in fp32, and copies of q, k and v.
            kept += 3 * heads * config.block_size * FP32 + 3 * width * FP32
    return kept


def _kept_by_lora(setup: Setup, lora: Lora) -> int:
    """Return the bytes per token that the matrices beside a block's weights keep.

    What they are multiplied with, which without them the loops compute again (the norms' results,
    and GELU's) or nobody asks for, the weights being frozen; and the `rank` numbers between each
    pair of matrices.
    """
    width, e = setup.config.n_embd, setup.dtype.itemsize
    n_layers = 2 * lora.of_attention + 2 * lora.of_mlp
    kept = n_layers * lora.rank * e
    if _by_loops(setup):
        kept += width * (lora.of_attention + 5 * lora.of_mlp) * e
        if e < FP32:  # what the norms and GELU work on stays in fp32
            kept += width * 4 * lora.of_mlp * (FP32 - e)
    else:
        kept -= width * (1 * (not lora.of_attention) + 5 * (not lora.of_mlp)) * e
    if lora.dropout:  # masks, and, for nothing else keeps it, what is left of attention's result
        kept += width * (2 * lora.of_attention + 5 * lora.of_mlp) * _mask_bytes(setup)
        kept += width * lora.of_attention * e
    return kept


def _kept_by_reference(setup: Setup) -> int:
    """Return what the plain formulas keep: each step of theirs, and all scores of attention.

    Per norm the centred and the scaled input, and the result; of GELU four tensors of 4C in fp32,
    and the result; of attention the probabilities, and q, k, v and the result heads first.
    """
    config, e = setup.config, setup.dtype.itemsize
    width, scores = config.n_embd, config.n_head * config.block_size
    kept = width * (2 * (2 * FP32 + e) + 4 * e + 4 * (4 * FP32 + e))
    # Off a CPU autocast has softmax in fp32, and rounds its result for the product.
    kept += scores * (e if setup.device == "cpu" or e == FP32 else FP32 + e)
    if config.dropout:
        kept += 2 * width * _mask_bytes(setup)
        kept += 2 * scores * e
    return kept


def _by_loops(setup: Setup) -> bool:
    """Whether the loops of `fastgpt.ops.cpu` compute."""
    own_bf16 = setup.dtype == torch.bfloat16 and products.own_in_bf16()
    can = setup.dtype == torch.float32 or own_bf16
    return can and setup.device == "cpu" and setup.backend == "native"


def _mask_bytes(setup: Setup) -> int:
    """Return the bytes per number of a dropout mask: bool on CUDA, in the dtype on a CPU."""
    return setup.dtype.itemsize if setup.device == "cpu" else 1


def _backward_of_mlp(setup: Setup) -> int:
    """Return the bytes per token that its second product's backward adds to what is kept.

    The gradients of its result and of its input (4C); by then the last norm's tensors are gone.
    """
    e = setup.dtype.itemsize
    incoming = FP32  # of the residual stream
    if _by_loops(setup) or e < FP32:
        incoming += e  # the norm's result, once more; or the stream's, rounded for the branch
    return setup.config.n_embd * (incoming + 4 * e - FP32 - e)


def _loss(setup: Setup, n: int) -> tuple[int, int]:
    """Return the bytes of the loss's forward, and of the start of its backward."""
    vocab, width, e = setup.config.vocab_size, setup.config.n_embd, setup.dtype.itemsize
    if setup.backend == "triton":
        return _loss_of_kernels(n, vocab, width, e, frozen=setup.lora is not None)
    if setup.backend == "reference":
        return n * vocab * (2 * FP32 + e % FP32), n * vocab * 5 * FP32
    trained = 0 if setup.lora else vocab  # rows of the head
    if _by_loops(setup):  # one chunk, and the gradients at once
        return (cpu.rows_at_once(n, vocab) * vocab + (n + trained) * width) * FP32, 0
    if n * vocab <= MAX_LOGITS:
        # The logits (rounded, then in fp32), and their logarithms; then the gradients of both.
        logits = FP32 if e == FP32 else e + FP32
        return n * vocab * (logits + FP32), n * vocab * 3 * FP32
    # Chunks: the last logits and their gradient are there while the next are made. The gradients
    # are ready before the backward, which multiplies them by a factor.
    gradients = n * width * e + trained * width * FP32
    inputs = (n + vocab) * width * e if e < FP32 else 0  # cast for the products
    return MAX_LOGITS * 3 * FP32 + gradients + inputs, 2 * gradients


def _loss_of_kernels(n: int, vocab: int, width: int, e: int, frozen: bool) -> tuple[int, int]:
    """Return the same of the Triton kernels: one chunk's logits, gradients in fp32 at once.

    frozen: the head needs no gradient.
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
    """How many parameters there are."""

    table: int  # the token table, and so the head
    block: int
    rest: int  # all outside of the blocks
    products: int  # those in matrices that something is multiplied with
    total: int
    trained: int

    @classmethod
    def of(cls, config: GPTConfig, lora: Lora | None = None) -> "_Parameters":
        """Count them."""
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
    return -(-count // parts)


# --- what fits ---------------------------------------------------------------------------------


def _largest(setup: Setup, limit: int, most: int) -> int | None:
    """Return the largest batch of up to `most` sequences that needs at most `limit` bytes."""
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
    # Out here the error is gone, and with it the frames whose tensors it held.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


# --- what the system says ----------------------------------------------------------------------


def _system_free(root: Path) -> Iterator[int]:
    """Yield what Linux says is available."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _cgroups_free(root: Path) -> Iterator[int]:
    """Yield what the control groups of this process, and those above them, leave to it."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                yield from _levels_free(
                    root / "sys/fs/cgroup", path, "memory.max", "memory.current"
                )
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                yield from _levels_free(root / "sys/fs/cgroup/memory", path, *names)


def _levels_free(top: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    """Yield limit less usage of a group and of each above it; in a container `path` may not exist.

    What the group uses includes files that the system keeps in memory, and drops when asked.
    """
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no such group; "max": no limit
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
