"""The launchers of the attention kernels."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fastgpt.kernels.attention.backward import (
    attention_backward_kv,
    attention_backward_q,
    attention_delta,
)
from fastgpt.kernels.attention.configs import (
    COMMON,
    Specialization,
    select_config,
    specializations,
)
from fastgpt.kernels.attention.forward import attention_forward
from fastgpt.kernels.common import (
    DTYPES,
    INTERPRETED,
    Variant,
    capability,
    check_devices,
    check_tensors,
    compute_dtype,
    describe,
    on_device,
    uses_tf32,
)

# The kernels by their names in `KernelConfigs`.
KERNELS = {
    "forward": attention_forward,
    "backward_q": attention_backward_q,
    "backward_kv": attention_backward_kv,
    "backward_one_pass": attention_backward_kv,
    "delta": attention_delta,
}

LARGEST_HEAD = 128

# Offsets inside a block of at most 128 rows are int32: tensors with row strides of this or more
# are copied.
MAX_ROW_STRIDE = 2**23

# Triton specializes integer arguments that are multiples of 16. With such strides it can prove that
# rows are aligned and uses 128-bit loads.
ALIGNED = 16

# Target size of the keys and values that concurrent programs share in the L2 cache: half of the
# L2 cache of an H100.
SHARED_BYTES = 25 * 10**6


def causal_attention_forward(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute causal self-attention; return the output and the statistics for the backward.

    Args:
        qkv: `[B, T, 3C]`, any strides; fp32, fp16 or bf16 (computed in fp32), or fp64 (in Triton's
            interpreter only).
        n_head: number of heads; the head dim C / n_head must be from 1 to 128.
        dropout_p: probability with which each attention probability is dropped.
        seed: int64 tensor with one element on the device of `qkv`, which determines the dropped
            probabilities. It is read on the device, without a synchronization.

    Returns:
        The output `[B, T, C]`, contiguous, in the dtype of `qkv`; and lse `[B, H, T]`, the base-2
        logarithm of the sum of each query's exponentials, in fp32 (fp64 for fp64).

    Raises:
        ValueError: for unsupported inputs.
    """
    head_dim = _check(qkv, n_head, dropout_p, seed)
    qkv = _aligned_layout(qkv, head_dim)
    n_batch, n_time, width = qkv.shape
    out = qkv.new_empty(n_batch, n_time, width // 3)
    lse = qkv.new_empty(n_batch, n_head, n_time, dtype=compute_dtype(qkv.dtype))
    _launch("forward", qkv, n_head, head_dim, dropout_p, seed, out_ptr=out, lse_ptr=lse)
    return _unpad(out, head_dim), lse


def causal_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Return the gradient of `qkv`, `[B, T, 3C]`, contiguous.

    Args:
        grad_out: gradient of `out`, in its shape and dtype; any strides, including the expanded
            gradients of autograd.
        qkv, n_head, dropout_p, seed: the arguments of the forward.
        out, lse: the results of the forward for these arguments.
        deterministic: whether the same inputs must give bitwise identical results. If False, a
            single pass computes all gradients and accumulates those of the queries with atomic
            additions, whose order varies.

    Raises:
        ValueError: for unsupported or inconsistent inputs.
    """
    head_dim = _check(qkv, n_head, dropout_p, seed)
    _check_saved(grad_out, qkv, out, lse, n_head)
    qkv, grad_out, out = (_aligned_layout(x, head_dim) for x in (qkv, grad_out, out))
    out, lse, delta = out.contiguous(), lse.contiguous(), lse.new_empty(lse.shape)
    grad_qkv = qkv.new_empty(qkv.shape)
    sums = None if deterministic else qkv.new_zeros(grad_out.shape, dtype=lse.dtype)
    # The first kernel computes delta, and the second one reads it.
    two_passes, one_pass = ("backward_q", "backward_kv"), ("delta", "backward_one_pass")
    for name in two_passes if deterministic else one_pass:
        _launch(
            *(name, qkv, n_head, head_dim, dropout_p, seed),
            out_ptr=out,
            grad_out_ptr=grad_out,
            lse_ptr=lse,
            delta_ptr=delta,
            grad_qkv_ptr=grad_qkv,
            grad_q_ptr=sums,
            stride_gb=grad_out.stride(0),
            stride_gt=grad_out.stride(1),
        )
    if sums is not None:
        # The kernel accumulates unscaled gradients in fp32; scale, round and store them.
        torch.mul(sums, head_dim**-0.5, out=grad_qkv[..., : sums.size(2)])
    return _unpad(grad_qkv, head_dim)


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that the launchers can launch on a GPU of a compute capability."""
    for spec in specializations():
        wide = "*fp64" if spec.dtype == "fp64" else "*fp32"
        types: dict[str, str | None] = {"stride_b": "i64", "stride_gb": "i64"}
        names = ("qkv_ptr", "out_ptr", "grad_out_ptr", "grad_qkv_ptr")
        types |= dict.fromkeys(names, f"*{spec.dtype}") | {"lse_ptr": wide, "delta_ptr": wide}
        types["seed_ptr"] = "*i64" if spec.dropout else None
        for name, kernel in KERNELS.items():
            if name == "delta" and (spec.precision == "tf32" or spec.dropout):
                continue  # does not depend on them
            types["grad_q_ptr"] = wide if name == "backward_one_pass" else None
            yield describe(
                kernel,
                types,
                select_config(name, spec, capability),
                matrix=name != "delta",
                common=spec in COMMON,
            )


def _launch(
    name: str,
    qkv: Tensor,
    n_head: int,
    head_dim: int,
    dropout_p: float,
    seed: Tensor | None,
    **arguments: Any,
) -> None:
    """Launch a kernel with one program for each block of each head.

    head_dim: the head dim before the padding of `_aligned_layout`. arguments: the remaining ones of
    the kernel; those that it does not have are ignored.
    """
    n_batch, n_time, width = qkv.shape
    if n_batch * n_time == 0:  # CUDA rejects empty grids
        return
    kernel = KERNELS[name]
    aligned_dim = width // 3 // n_head
    dim = max(16, triton.next_power_of_2(aligned_dim))  # the matrix units need at least 16
    precision = "tf32" if qkv.dtype == torch.float32 and uses_tf32() else "ieee"
    spec = Specialization(DTYPES[qkv.dtype], precision, dim, dim != aligned_dim, dropout_p > 0.0)
    config = select_config(name, spec, capability(qkv.device))
    bytes_per_head = 2 * n_time * head_dim * qkv.element_size()  # of keys and values
    arguments |= config.constants | {
        "qkv_ptr": qkv,
        "seed_ptr": seed if spec.dropout else None,
        "stride_b": qkv.stride(0),
        "stride_t": qkv.stride(1),
        "n_time": n_time,
        "n_head": n_head,
        "head_dim": aligned_dim,
        "n_heads": n_batch * n_head,
        "heads_per_group": max(1, SHARED_BYTES // bytes_per_head),
        "scale_dim": head_dim,
        "threshold": _threshold(dropout_p),
    }
    rows = arguments["BLOCK_N" if kernel is attention_backward_kv else "BLOCK_M"]
    with on_device(qkv):
        kernel[(n_batch * n_head * triton.cdiv(n_time, rows),)](
            **{argument: arguments[argument] for argument in kernel.arg_names}, **config.options
        )


def _threshold(dropout_p: float) -> int:
    """Return the smallest int32 random number at which a probability is kept.

    A uniformly distributed int32 is below it with probability `dropout_p`.
    """
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def _aligned_layout(x: Tensor, head_dim: int) -> Tensor:
    """Return `x`, `[B, T, heads]`, in a layout whose rows the kernels can load 128 bits at a time.

    Head dims that are not multiples of 16 are padded with zeros. Unaligned layouts (a slice at an
    unaligned address, the expanded gradient of a sum) are copied. Both are rare.
    """
    if head_dim % ALIGNED:
        x = torch.nn.functional.pad(x.unflatten(2, (-1, head_dim)), (0, -head_dim % ALIGNED))
        return x.flatten(2)
    aligned = all(n % ALIGNED == 0 for n in (x.stride(0), x.stride(1), x.data_ptr()))
    if x.stride(2) == 1 and aligned and x.stride(1) < MAX_ROW_STRIDE:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _unpad(x: Tensor, head_dim: int) -> Tensor:
    """Undo the padding of `_aligned_layout`."""
    if head_dim % ALIGNED == 0:
        return x
    padded = triton.cdiv(head_dim, ALIGNED) * ALIGNED
    return x.unflatten(2, (-1, padded))[..., :head_dim].flatten(2).contiguous()


def _check(qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None) -> int:
    """Return the head dim; raise ValueError for unsupported inputs."""
    name = "causal_attention"
    check_tensors(name, qkv=qkv)
    if qkv.dtype == torch.float64 and not INTERPRETED:
        raise ValueError(
            f"{name}: float64 runs in Triton's interpreter only, for tests; cast qkv to float32, "
            'or use ops="reference"'
        )
    if qkv.ndim != 3 or qkv.size(2) % 3:
        raise ValueError(f"{name}: qkv must be [B, T, 3C], not {list(qkv.shape)}")
    width = qkv.size(2) // 3
    if n_head < 1 or width % n_head:
        raise ValueError(f"{name}: n_head must divide the width, {width}; {n_head} does not")
    if not 1 <= width // n_head <= LARGEST_HEAD:
        raise ValueError(
            f"{name}: head dims (C / n_head) from 1 to {LARGEST_HEAD} are supported, "
            f'not {width // n_head}; choose another n_head, or use ops="native"'
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p must be at least 0 and below 1, not {dropout_p}")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"{name}: dropout needs a seed, an int64 tensor with one element")
    if dropout_p > 0.0 and seed is not None:
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"{name}: seed must be an int64 tensor with one element, "
                f"not {seed.numel()} of {seed.dtype}"
            )
        check_devices(name, qkv=qkv, seed=seed)
    return width // n_head


def _check_saved(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> None:
    """Raise ValueError unless the shapes and dtypes of the backward's inputs are consistent."""
    name = "causal_attention"
    check_tensors(name, grad_out=grad_out, qkv=qkv, out=out, lse=lse)
    n_batch, n_time, width = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    expected = {
        "grad_out": (grad_out, (n_batch, n_time, width), qkv.dtype),
        "out": (out, (n_batch, n_time, width), qkv.dtype),
        "lse": (lse, (n_batch, n_head, n_time), compute_dtype(qkv.dtype)),
    }
    for what, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {what} must be {list(shape)} {dtype}, "
                f"not {list(tensor.shape)} {tensor.dtype}"
            )
