"""AdamW over all parameters at once, with the norm of the gradient and its clipping.

The twin of `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW` (Loshchilov & Hutter 2019,
arXiv:1711.05101). Three launches for any number of tensors, wherever they lie: the sums of squares
of all gradients; one program that turns them into the norm and each tensor's factors; the update.
Nothing is waited for, and what changes from step to step (rates, step counts) lies on the device,
so that a step can be recorded into a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import Variant, check_devices, on_device

BLOCK = 2048  # elements of a program
# 8 elements a thread in two 128-bit loads; one at a time they need twice the registers.
OPTIONS = {
    True: {"num_warps": 8, "enable_fp_fusion": True},
    False: {"num_warps": 16, "enable_fp_fusion": True},
}
PREPARE_BLOCK = 1024
HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")  # the columns of `hyper`

# The rows of the table of addresses, and the columns of the factors that an update uses.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP = (tl.constexpr(row) for row in range(5))
CLIP, DECAY, TAKE1, KEEP2, TAKE2, RATE, ROOT, EPS = (tl.constexpr(column) for column in range(8))
N_FACTORS = tl.constexpr(8)


@dataclass(frozen=True)
class Tensors:
    """Where the tensors of a step lie, told to the device once for all steps with the same ones.

    It holds addresses, not tensors: whoever steps with it keeps them alive and in their place.
    """

    addresses: Tensor
    """int64 `[5, n]`: of each parameter, gradient, first and second moment, step count."""
    sizes: Tensor
    """int64 `[n]`: elements of each."""
    block_tensor: Tensor
    """int64 `[n_blocks]`: whose elements each program works on."""
    block_start: Tensor
    """int64 `[n_blocks]`: and from which one."""
    aligned: bool
    """Whether all addresses and sizes are multiples of 16: 128 bits are then moved at once."""


def tensors_of_a_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    before: Tensors | None = None,
) -> Tensors:
    """Return what `adamw` needs to find the tensors.

    All in fp32 on one device; those of a parameter dense in memory and with its shape and strides,
    the steps scalars. ValueError if not. before: what this returned for parameters of these sizes,
    some of whose tensors have moved: the tables of sizes, a megabyte for GPT-2, are taken from it.
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
    """Do one step of AdamW in place and return the norm of all gradients before it, a scalar.

    hyper: fp64 `[n, 5]` on the device, the `HYPER` of each parameter. Gradients are used, not
    stored, times ``min(1, max_norm / (norm + 1e-6))``. If the norm is not finite, nothing is
    written: no parameter, no moment, no step count.
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
    blocks: dict[str, Any] = {
        "BLOCK": BLOCK,
        "ALIGNED": tensors.aligned,
        **OPTIONS[tensors.aligned],
    }
    with on_device(hyper):
        if n_blocks:  # CUDA has no empty grid
            _square_sums[(n_blocks,)](*where, sums, n_tensors, **blocks)
        _prepare[(1,)](
            tensors.addresses,
            hyper.contiguous(),
            sums,
            norm,
            factors,
            n_tensors,
            n_blocks,
            max_norm,
            BLOCK=PREPARE_BLOCK,
            **OPTIONS[True],
        )
        if n_blocks:
            _update[(n_blocks,)](*where, factors, norm, n_tensors, **blocks)
    return norm


def variants(capability: int) -> Iterator[Variant]:
    """Yield all that the launcher can launch on a GPU of a compute capability."""
    where = dict.fromkeys(("addresses_ptr", "sizes_ptr", "tensor_ptr", "start_ptr"), "*i64")
    count, counts = {"n_tensors": "i32"}, ("n_tensors", "n_blocks")
    for aligned in (True, False):
        for name, pointers in (
            ("_square_sums", {"sums_ptr": "*fp32"}),
            ("_update", {"factors_ptr": "*fp32", "norm_ptr": "*fp32"}),
        ):
            constants = {"BLOCK": BLOCK, "ALIGNED": aligned}
            signature = where | pointers | count
            yield Variant(name, signature, constants, OPTIONS[aligned], unaligned=counts[:1])
    signature = {
        "addresses_ptr": "*i64",
        "hyper_ptr": "*fp64",
        "sums_ptr": "*fp32",
        "norm_ptr": "*fp32",
        "factors_ptr": "*fp32",
        "n_tensors": "i32",
        "n_blocks": "i32",
        "max_norm": "fp32",
    }
    yield Variant("_prepare", signature, {"BLOCK": PREPARE_BLOCK}, OPTIONS[True], unaligned=counts)


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
    """Write the sum of the squares of a block of a gradient."""
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
    """Write the norm and what each tensor's update needs, and count the step.

    One program, in fp64: 1 - beta2 and the corrections of the bias lose digits in fp32.
    """
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_blocks, BLOCK):
        inside = start + lanes < n_blocks
        total += tl.load(sums_ptr + start + lanes, mask=inside, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total)).to(tl.float32)
    tl.store(norm_ptr, norm)
    if norm < float("inf"):  # which NaN is not either
        clip = tl.minimum(1.0, max_norm / (norm + 1e-6))
        for start in range(0, n_tensors, BLOCK):
            tensor = start + lanes
            inside = tensor < n_tensors
            address = tl.load(addresses_ptr + STEP * n_tensors + tensor, mask=inside, other=0)
            step_ptr = address.to(tl.pointer_type(tl.float32))
            step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
            tl.store(step_ptr, step, mask=inside)
            _store_factors(hyper_ptr, factors_ptr, tensor, inside, step, clip)


@triton.jit
def _store_factors(hyper_ptr, factors_ptr, tensor, inside, step, clip):
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
    # A base of 0 has no logarithm, and any power of 1e-300 is as good as 0 here.
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
    """Update a block of a parameter and of its moments."""
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
    """Return whose block this program's is, its offsets there and which of them exist."""
    tensor = tl.load(tensor_ptr + tl.program_id(0))
    start = tl.multiple_of(tl.load(start_ptr + tl.program_id(0)), BLOCK)
    size = tl.load(sizes_ptr + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # so that a mask covers 128 bits or none of them
    offsets = start + tl.arange(0, BLOCK)
    return tensor, offsets, offsets < size


@triton.jit
def _pointer(addresses_ptr, row: tl.constexpr, tensor, n_tensors, ALIGNED: tl.constexpr):
    address = tl.load(addresses_ptr + row * n_tensors + tensor)
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def _blocks(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return for each block of the launch whose elements it has, and from which one."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    first = counts.cumsum(0) - counts  # block of each tensor
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    return tensor, (torch.arange(tensor.numel()) - first[tensor]) * BLOCK


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check(params: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """Raise ValueError unless the kernels can work on all of the tensors by their addresses."""
    names = ("a gradient", "an exp_avg", "an exp_avg_sq", "a step")
    if not params or any(len(row) != len(params) for row in others):
        counts = [len(params), *map(len, others)]
        raise ValueError(f"adamw: there must be one of each for each parameter, not {counts}")
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
                    f"adamw: {name} must be laid out as {list(expected)} strided "
                    f"{list(param.stride())}, as its parameter asks, not {list(tensor.shape)} "
                    f"strided {list(tensor.stride())} (no. {i})"
                )
    for i, param in enumerate(params):
        if not _dense(param):
            raise ValueError(
                f"adamw: a parameter must fill its memory without gaps or overlaps, not "
                f"{list(param.shape)} strided {list(param.stride())} (no. {i})"
            )


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a piece of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
