"""Estimate the memory of a training step.

`estimate` adds up the tensors that are alive at the same time, computed from their shapes: those of
the model and the optimizer, and those that autograd saves for the backward pass. Allocations of
libraries (the CUDA context, workspaces, fragmentation) are not included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastgpt.lora import Lora
from fastgpt.model import GPTConfig
from fastgpt.ops import MAX_LOGITS, cpu, products

FP32 = 4  # bytes; the residual stream and the weights are fp32 in every precision
KERNELS_LOGITS = 1_700_000_000  # maximum bytes of logits that the Triton kernels hold at once
PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Setup:
    """The settings that determine the memory of a step.

    Args:
        config: The model configuration.
        batch_size: Sequences per micro-batch.
        grad_accum: Micro-batches per step. The `batch_size * grad_accum` sequences of a step are
            divided between `world_size` processes.
        dtype: The dtype of the matrix products, as with autocast. Weights, gradients and AdamW's
            moments are fp32.
        backend: The backend of `fastgpt.ops`: "native", "triton" or "reference".
        device: The device type, such as "cpu" or "cuda".
        world_size: The number of processes.
        fsdp: Whether weights, gradients and moments are sharded over the processes; otherwise each
            process holds all.
        recompute: Whether the activations of a block are recomputed in the backward pass.
        lora: The LoRA configuration, if only its matrices are trained. All other weights are then
            frozen and have neither gradients nor moments.
    """

    config: GPTConfig
    batch_size: int
    grad_accum: int = 1
    dtype: torch.dtype = torch.float32
    backend: str = "native"
    device: str = "cpu"
    world_size: int = 1
    fsdp: bool = False
    recompute: bool = False
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.backend not in ("native", "triton", "reference"):
            raise ValueError(f"backend must be native, triton or reference, not {self.backend!r}")

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
        return sum(getattr(self, part) for part in PARTS)

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {gigabytes(getattr(self, part))}" for part in PARTS)
        return f"{gigabytes(self.total)} ({parts})"


def gigabytes(size: float) -> str:
    """Format a number of bytes in GB (10⁹ bytes), or in MB if it is small."""
    return f"{size / 1e9:,.1f} GB" if size >= 0.95e9 else f"{size / 1e6:,.0f} MB"


def estimate(setup: Setup) -> MemoryEstimate:
    """Return the estimated memory of a step on one device, at the peak of the step."""
    model = _Parameters.of(setup.config, setup.lora)
    e = setup.dtype.itemsize
    # Autocast's copies of the weights, kept until the end of the backward. The loops make none.
    casts = model.products * e if e < FP32 and not _uses_cpu_loops(setup) else 0
    share = setup.world_size if setup.fsdp else 1
    weights = _split(model.total, share) * FP32
    if setup.fsdp:  # gathered parameters: two blocks at a time, and the tables throughout
        weights += (2 * model.block + model.rest) * e
    optimizer = _split(model.trained, share) * 2 * FP32  # AdamW's moments
    peaks = (
        MemoryEstimate(setup, weights + casts, gradients, optimizer, activations, loss)
        for gradients, activations, loss, casts in _peaks(setup, model, casts, share)
    )
    return max(peaks, key=lambda peak: peak.total)


# Sizes are in bytes. n: tokens per micro-batch; C, V: width and vocabulary size; T: context length;
# e: bytes of an element in the dtype of the matrix products. "The loops" are the C++ implementation
# on CPUs (`fastgpt.ops.cpu`).


def _peaks(
    setup: Setup, model: "_Parameters", casts: int, share: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (gradients, activations, loss, casts) at the points of a step that may be the peak.

    These are the forward and the backward of the loss, the backward of the last and of the first
    block, and the backward of the embedding.
    """
    config, n, e = setup.config, setup.micro_batch * setup.config.block_size, setup.dtype.itemsize
    table = 0 if setup.lora else model.table * FP32
    all_gradients = _split(model.trained, share) * FP32
    if setup.fsdp and not setup.lora:
        # The unsharded gradients of a block and the tables, before the reduce-scatter.
        all_gradients += (model.block + model.rest) * FP32
    # With DDP (its buckets) and gradient accumulation, all gradients exist from the start.
    # Otherwise each is allocated in the backward. The gradient of the head is kept until the end of
    # the backward, where the embedding's is added to it.
    early = setup.world_size > 1 or setup.sequences > setup.micro_batch
    before, of_head = (all_gradients, table) if early else (0, 0)

    full = n * _kept_by_block(setup)
    kept, redone = (n * config.n_embd * (FP32 + e), full) if setup.recompute else (full, 0)
    ends = 2 * FP32 if _uses_cpu_loops(setup) else FP32 + e  # input and output of the final norm
    ends = n * config.n_embd * (ends + (_mask_bytes(setup) if config.dropout else 0))
    blocks = config.n_layer * kept + ends
    in_mlp = n * _backward_of_mlp(setup)
    one_cast = casts // config.n_layer if setup.recompute else casts

    forward, backward = _loss(setup, n)
    yield before, blocks, forward, casts
    yield before, blocks, backward, 0 if setup.recompute else casts
    # The backward of the last block, in the MLP, whose tensors are the largest. The gradient of one
    # of its weights (4C²) exists in the dtype of the products.
    of_weight = 0 if setup.lora else 4 * config.n_embd**2 * e
    yield (before or table) + of_head + of_weight, blocks + redone + in_mlp, 0, one_cast
    # The backward of the first block: the gradients of all blocks exist, the activations of the
    # others have been freed.
    yield all_gradients + of_head, kept + redone + in_mlp, 0, one_cast // config.n_layer
    # The backward of the embedding: its gradient, that of the head, and the sum of both are each as
    # large as the table. The loops add the gradients of the rows to that of the head in place.
    sums = 2 * table if config.tie_weights and not _uses_cpu_loops(setup) else 0
    yield all_gradients + of_head + sums, n * config.n_embd * FP32, 0, 0


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
