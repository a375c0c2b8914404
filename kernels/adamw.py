"""AdamW for all parameters at once, including the gradient norm and its clipping.

The reference implementations are `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW`
(Loshchilov & Hutter 2019, arXiv:1711.05101). A step takes three launches for any number of tensors
at any addresses: sums of squares of all gradients; a single program that computes the norm and the
factors of each tensor; the update. There is no synchronization with the host, and the values that
change between steps (learning rates, step counts) are on the device, so that a step can be captured
in a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import LaunchConfig, Variant, check_devices, describe, on_device

BLOCK = 2048  # elements per program
# Aligned: 8 elements per thread in two 128-bit loads. Elements loaded one at a time need twice the
# registers, so these launches use twice the warps.
ALIGNED = LaunchConfig({"BLOCK": BLOCK, "ALIGNED": True}, num_warps=8)
UNALIGNED = LaunchConfig({"BLOCK": BLOCK, "ALIGNED": False}, num_warps=16)
PREPARE = LaunchConfig({"BLOCK": 1024}, num_warps=8)
HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")  # the columns of `hyper`

# The rows of the table of addresses, and the columns of the table of factors: `_prepare` computes
# the factors, `_update` reads them (see `_store_factors`).
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP = (tl.constexpr(row) for row in range(5))
CLIP, DECAY, TAKE1, KEEP2, TAKE2, RATE, ROOT, EPS = (tl.constexpr(column) for column in range(8))
N_FACTORS = tl.constexpr(8)


@dataclass(frozen=True)
class Tensors:
    """Device tables of the addresses and sizes of the tensors of a step.

    They are copied to the device once and serve for all steps with the same tensors. They hold
    addresses, not references: the caller must keep the tensors alive and must not move them.
    """

    addresses: Tensor
    """int64 `[5, n]`: addresses of the parameters, gradients, first and second moments, steps."""
    sizes: Tensor
    """int64 `[n]`: number of elements of each parameter."""
    block_tensor: Tensor
    """int64 `[n_blocks]`: index of the tensor that each program processes."""
    block_start: Tensor
    """int64 `[n_blocks]`: index of the first element that each program processes."""
    aligned: bool
    """Whether all addresses and sizes are multiples of 16, which allows 128-bit accesses."""


def make_tensor_tables(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    before: Tensors | None = None,
) -> Tensors:
    """Return the device tables through which `adamw` finds the tensors.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, steps: the tensors of a step, fp32, on one device.
            Parameters must be dense in memory; their gradients and moments must have the same
            shapes and strides; steps must be scalars.
        before: the result of an earlier call for parameters of the same sizes, some of whose
            tensors have moved since. Its tables of sizes and blocks, a megabyte for GPT-2, are
            reused.

    Raises:
        ValueError: if a tensor does not meet these conditions.
    """
    rows = (params, grads, exp_avgs, exp_avg_sqs, steps)
    _check(*rows)
    sizes = [param.numel() for param in params]
    addresses = [[tensor.data_ptr() for tensor in row] for row in rows]
    aligned = not any(number % 16 for row in (sizes, *addresses[:4]) for number in row)
    table = to_device(torch.tensor(addresses), params[0].device)
    if before is not None:
        return replace(before, addresses=table, aligned=aligned)
    host = torch.tensor(sizes), *_blocks(sizes)
    return Tensors(table, *(to_device(table, params[0].device) for table in host), aligned)


def adamw(tensors: Tensors, hyper: Tensor, max_norm: float = float("inf")) -> Tensor:
    """Perform one step of AdamW in place; return the norm of all gradients before clipping.

    Gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))`` when they are used, but are not
    modified in memory. If the norm is non-finite, the step is skipped: parameters, moments and step
    counts remain unchanged.

    Args:
        tensors: the result of `make_tensor_tables`.
        hyper: fp64 `[n, 5]` on the device, the values of `HYPER` for each parameter.
        max_norm: maximum norm of the gradients.

    Returns:
        The norm, an fp32 scalar on the device.
    """
    n_tensors = tensors.sizes.numel()
    check_devices("adamw", hyper=hyper, tensors=tensors.sizes)
    if hyper.shape != (n_tensors, len(HYPER)) or hyper.dtype != torch.float64:
        raise ValueError(
            f"adamw: hyper must be torch.float64 {[n_tensors, len(HYPER)]}, "
            f"{', '.join(HYPER)} of each parameter, not {hyper.dtype} {list(hyper.shape)}"
        )
    n_blocks = tensors.block_tensor.numel()
    norm = hyper.new_empty((), dtype=torch.float32)
    sums = hyper.new_empty(n_blocks, dtype=torch.float32)
    factors = hyper.new_empty(n_tensors, N_FACTORS.value, dtype=torch.float32)
    where = tensors.addresses, tensors.sizes, tensors.block_tensor, tensors.block_start
    config = ALIGNED if tensors.aligned else UNALIGNED
    with on_device(hyper):
        if n_blocks:  # CUDA rejects empty grids
            _square_sums[(n_blocks,)](*where, sums, n_tensors, **config.kwargs)
        _prepare[(1,)](
            tensors.addresses,
            hyper.contiguous(),
            sums,
            norm,
            factors,
            n_tensors,
            n_blocks,
            max_norm,
            **PREPARE.kwargs,
        )
        if n_blocks:
            _update[(n_blocks,)](*where, factors, norm, n_tensors, **config.kwargs)
    return norm


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that the launcher can launch on a GPU of a compute capability."""
    names = ("addresses_ptr", "sizes_ptr", "tensor_ptr", "start_ptr")
    types: dict[str, str | None] = dict.fromkeys(names, "*i64")
    types |= dict.fromkeys(("sums_ptr", "factors_ptr", "norm_ptr"), "*fp32")
    types |= {"hyper_ptr": "*fp64", "max_norm": "fp32"}
    for config in (ALIGNED, UNALIGNED):
        yield describe(_square_sums, types, config)
        yield describe(_update, types, config)
    yield describe(_prepare, types, PREPARE)


@triton.jit(do_not_specialize=("n_tensors",))
def _square_sums(
    addresses_ptr,
    sizes_ptr,
    tensor_ptr,
    start_ptr,
    sums_ptr,  # [n_blocks]
    n_tensors,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store the sum of the squares of a block of a gradient."""
    tensor, offsets, inside = _block(sizes_ptr, tensor_ptr, start_ptr, BLOCK, ALIGNED)
    grad_ptr = _pointer(addresses_ptr, GRAD, tensor, n_tensors, ALIGNED)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(grad * grad))


@triton.jit(do_not_specialize=("n_tensors", "n_blocks"))
def _prepare(
    addresses_ptr,
    hyper_ptr,  # [n_tensors, 5]
    sums_ptr,  # [n_blocks]
    norm_ptr,
    factors_ptr,  # [n_tensors, N_FACTORS]
    n_tensors,
    n_blocks,
    max_norm,
    BLOCK: tl.constexpr,
):
    """Store the norm and the factors of each tensor, and increment the step counts.

    A single program computes all of it, in fp64: in fp32, 1 - beta2 and the bias corrections would
    lose digits. Its lanes iterate first over the partial sums and then over the tensors.
    """
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_blocks, BLOCK):
        inside = start + lanes < n_blocks
        total += tl.load(sums_ptr + start + lanes, mask=inside, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total)).to(tl.float32)
    tl.store(norm_ptr, norm)
    if norm < float("inf"):  # False for NaN, too: a non-finite norm skips the step
        clip = tl.minimum(1.0, max_norm / (norm + 1e-6))
        for start in range(0, n_tensors, BLOCK):
            tensor = start + lanes
            inside = tensor < n_tensors
            # One pointer per lane, to the step count of its tensor.
            address = tl.load(addresses_ptr + STEP * n_tensors + tensor, mask=inside, other=0)
            step_ptr = address.to(tl.pointer_type(tl.float32))
            step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
            tl.store(step_ptr, step, mask=inside)
            _store_factors(hyper_ptr, factors_ptr, tensor, inside, step, clip)


@triton.jit
def _store_factors(hyper_ptr, factors_ptr, tensor, inside, step, clip):
    """Compute the factors of the update of each tensor in fp64 and store them in fp32.

    With g the clipped gradient, the update in `_update` is

        m += (g - m) * TAKE1                   TAKE1 = 1 - beta1
        v = v * KEEP2 + g^2 * TAKE2            KEEP2 = beta2, TAKE2 = 1 - beta2
        p = p * DECAY                          DECAY = 1 - lr * weight_decay
        p -= RATE * m / (sqrt(v) * ROOT + EPS)

    where RATE = lr / (1 - beta1^step) and ROOT = 1 / sqrt(1 - beta2^step) correct the bias of the
    moments.
    """
    hyper_ptr += tensor * 5
    lr = tl.load(hyper_ptr, mask=inside, other=0.0)
    beta1 = tl.load(hyper_ptr + 1, mask=inside, other=0.5)
    beta2 = tl.load(hyper_ptr + 2, mask=inside, other=0.5)
    eps = tl.load(hyper_ptr + 3, mask=inside, other=0.0)
    weight_decay = tl.load(hyper_ptr + 4, mask=inside, other=0.0)
    bias1 = 1.0 - _power(beta1, step)
    bias2 = 1.0 - _power(beta2, step)
    factors_ptr += tensor * N_FACTORS
    tl.store(factors_ptr + CLIP, tl.zeros_like(lr).to(tl.float32) + clip, mask=inside)
    tl.store(factors_ptr + DECAY, (1.0 - lr * weight_decay).to(tl.float32), mask=inside)
    tl.store(factors_ptr + TAKE1, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(factors_ptr + KEEP2, beta2.to(tl.float32), mask=inside)
    tl.store(factors_ptr + TAKE2, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(factors_ptr + RATE, (lr / bias1).to(tl.float32), mask=inside)
    tl.store(factors_ptr + ROOT, tl.sqrt(1.0 / bias2).to(tl.float32), mask=inside)
    tl.store(factors_ptr + EPS, eps.to(tl.float32), mask=inside)


@triton.jit
def _power(base, exponent):
    """Return base^exponent in fp64, for a base from 0 to 1."""
    # log2(0) is -inf. Replacing 0 by 1e-300 changes nothing: 1 minus any power of it is 1.
    return tl.exp2(exponent.to(tl.float64) * tl.log2(tl.maximum(base, 1e-300)))


@triton.jit(do_not_specialize=("n_tensors",))
def _update(
    addresses_ptr,
    sizes_ptr,
    tensor_ptr,
    start_ptr,
    factors_ptr,  # [n_tensors, N_FACTORS]
    norm_ptr,
    n_tensors,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update a block of a parameter and of its moments (see `_store_factors` for the formulas)."""
    if tl.load(norm_ptr) < float("inf"):
        tensor, offsets, inside = _block(sizes_ptr, tensor_ptr, start_ptr, BLOCK, ALIGNED)
        factors_ptr += tensor * N_FACTORS
        grad_ptr = _pointer(addresses_ptr, GRAD, tensor, n_tensors, ALIGNED) + offsets
        avg_ptr = _pointer(addresses_ptr, EXP_AVG, tensor, n_tensors, ALIGNED) + offsets
        sq_ptr = _pointer(addresses_ptr, EXP_AVG_SQ, tensor, n_tensors, ALIGNED) + offsets
        param_ptr = _pointer(addresses_ptr, PARAM, tensor, n_tensors, ALIGNED) + offsets

        grad = tl.load(grad_ptr, mask=inside, other=0.0) * tl.load(factors_ptr + CLIP)
        avg = tl.load(avg_ptr, mask=inside, other=0.0)
        avg += (grad - avg) * tl.load(factors_ptr + TAKE1)
        sq = tl.load(sq_ptr, mask=inside, other=0.0) * tl.load(factors_ptr + KEEP2)
        sq += grad * grad * tl.load(factors_ptr + TAKE2)
        root = tl.sqrt(sq) * tl.load(factors_ptr + ROOT) + tl.load(factors_ptr + EPS)
        param = tl.load(param_ptr, mask=inside, other=0.0) * tl.load(factors_ptr + DECAY)
        param -= tl.load(factors_ptr + RATE) * (avg / root)

        tl.store(avg_ptr, avg, mask=inside)
        tl.store(sq_ptr, sq, mask=inside)
        tl.store(param_ptr, param, mask=inside)


@triton.jit
def _block(sizes_ptr, tensor_ptr, start_ptr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the index of this program's tensor, its offsets in it, and their mask."""
    tensor = tl.load(tensor_ptr + tl.program_id(0))
    start = tl.multiple_of(tl.load(start_ptr + tl.program_id(0)), BLOCK)
    size = tl.load(sizes_ptr + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # the mask is then uniform within each 128-bit access
    offsets = start + tl.arange(0, BLOCK)
    return tensor, offsets, offsets < size


@triton.jit
def _pointer(addresses_ptr, row: tl.constexpr, tensor, n_tensors, ALIGNED: tl.constexpr):
    """Return the address of a tensor from a row of the table, as an fp32 pointer."""
    address = tl.load(addresses_ptr + row * n_tensors + tensor)
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def _blocks(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return, for each block of the launch, the index of its tensor and of its first element."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    first = counts.cumsum(0) - counts  # the first block of each tensor
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    return tensor, (torch.arange(tensor.numel()) - first[tensor]) * BLOCK


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device asynchronously."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check(params: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """Raise ValueError unless the kernels can access all of the tensors by their addresses."""
    names = ("a gradient", "an exp_avg", "an exp_avg_sq", "a step")
    if not params or any(len(row) != len(params) for row in others):
        counts = [len(params), *map(len, others)]
        raise ValueError(
            "adamw: params, grads, exp_avgs, exp_avg_sqs and steps must have the same length, at "
            f"least 1, not {counts}"
        )
    named = {"a parameter": params} | dict(zip(names, others, strict=True))
    for name, row in named.items():
        for i, (tensor, param) in enumerate(zip(row, params, strict=True)):
            check_devices("adamw", **{name: tensor, "the first parameter": params[0]})
            if tensor.dtype != torch.float32:
                raise ValueError(
                    f"adamw: {name} must be torch.float32, not {tensor.dtype} (no. {i})"
                )
            expected = torch.Size() if name == "a step" else param.shape
            if tensor.shape != expected or (expected and tensor.stride() != param.stride()):
                raise ValueError(
                    f"adamw: {name} must have shape {list(expected)} (and, except a step, the "
                    f"strides of its parameter, {list(param.stride())}), not shape "
                    f"{list(tensor.shape)} and strides {list(tensor.stride())} (no. {i})"
                )
    for i, param in enumerate(params):
        if not _dense(param):
            raise ValueError(
                f"adamw: a parameter must fill its memory without gaps or overlaps, not "
                f"{list(param.shape)} strided {list(param.stride())} (no. {i})"
            )


def _dense(tensor: Tensor) -> bool:
    """Return whether a tensor occupies memory without gaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
