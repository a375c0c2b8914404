"""Causal self-attention on packed qkv.

The reference implementation is `fastgpt.ops.reference.causal_attention`.

The matrix of scores is never materialized: each program computes it block by block, with a running
maximum and sum for the softmax (FlashAttention-2, Dao 2023, arXiv:2307.08691). The backward
recomputes the probabilities from the logarithm of that sum. Queries, keys and values are read
directly from the packed `[B, T, 3C]`, and their gradients are written to one packed gradient of the
same shape.

Exponentials are computed as powers of two; log2(e) is folded into the scale of the scores. The
dropout mask is a function of (seed, batch and head, query, key) alone and is recomputed wherever it
is needed, so it does not depend on the block sizes.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import (
    DTYPES,
    INTERPRETED,
    LOG2_E,
    Variant,
    capability,
    check_devices,
    check_tensors,
    compute_dtype,
    on_device,
    uses_tf32,
    widen,
)

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


def _with_registers(
    table: dict[str, tuple[int, ...]], registers: int
) -> dict[str, tuple[int, ...]]:
    """Return the table with a register limit set in each row."""
    return {kind: (*row[:4], registers) for kind, row in table.items()}


# Launch configurations: (BLOCK_M, BLOCK_N, num_warps, num_stages) and optionally maxnreg. BLOCK_M
# is the number of queries and BLOCK_N the number of keys in a block. A table is indexed by (head
# dim > 64, dropout) and then by the kernel: "forward"; "q" and "kv", the two kernels of the
# deterministic backward; "sums", the backward in a single pass. Dropout has its own rows because
# its random numbers need many registers. No configuration spills.
#
# The configurations of sm_90 for head dims up to 64 without dropout were the fastest of about a
# dozen each on an H200. They are small blocks of few warps, so that a multiprocessor holds several
# of them and some compute exponentials while others multiply. This matters more than the overlap of
# the matrix instructions of one product: with three stages Triton leaves a product unfinished at
# the end of an iteration, and ptxas then serializes its instructions.
#
# maxnreg limits the registers of a thread. Without it, ptxas may spill one or two registers
# (depending on its version) in order to fit one more block on a multiprocessor.
Table = dict[tuple[bool, bool], dict[str, tuple[int, ...]]]
SMALL_90 = {
    "forward": (64, 64, 4, 3),
    "q": (64, 64, 4, 3),
    "kv": (32, 64, 4, 2),
    "sums": (64, 128, 8, 3),
}
# The remaining configurations were chosen from the compiler's statistics (registers, shared memory,
# spills), not from measurements.
HALVES: Table = {
    (False, False): {
        "forward": (64, 64, 4, 2),
        "q": (64, 64, 4, 2),
        "kv": (64, 128, 8, 3),
        "sums": (32, 128, 8, 2),
    },
    (False, True): {
        "forward": (64, 32, 4, 2),
        "q": (64, 32, 4, 2),
        "kv": (32, 64, 4, 2),
        "sums": (32, 64, 4, 2),
    },
    (True, False): {
        "forward": (128, 64, 8, 2),
        "q": (128, 64, 8, 2),
        "kv": (32, 128, 8, 2),
        "sums": (32, 128, 8, 2),
    },
    (True, True): {
        "forward": (128, 32, 8, 2),
        "q": (128, 32, 8, 2),
        "kv": (16, 128, 8, 2),
        "sums": (16, 128, 8, 2),
    },
}
HALVES_90: Table = HALVES | {(False, False): SMALL_90}
# Before sm_90 and on sm_120, the operands of matrix products are held in registers, as are the
# masks of padded heads, and a block is limited to 99 KB of shared memory. On sm_100 fewer registers
# are available at head dim 128.
HALVES_80: Table = {
    (False, False): HALVES[False, False],
    (False, True): HALVES[False, True] | {"sums": (16, 64, 8, 2)},
    (True, False): HALVES[True, False]
    | {"q": (128, 32, 8, 2), "kv": (32, 64, 8, 2), "sums": (32, 64, 8, 2)},
    (True, True): HALVES[True, True] | {"kv": (16, 64, 8, 2), "sums": (16, 64, 8, 2)},
}
HALVES_80_PADDED: Table = HALVES_80 | {
    (False, False): HALVES_80[False, False] | {"kv": (32, 128, 8, 3)}
}
HALVES_100: Table = HALVES | {
    (False, True): HALVES[False, True] | {"kv": (32, 64, 4, 2, 255), "sums": (32, 64, 4, 2, 255)},
    (True, False): HALVES[True, False] | {"q": (128, 32, 8, 2), "kv": (32, 128, 8, 2, 255)},
    (True, True): HALVES[True, True] | {"q": (64, 32, 8, 2), "kv": (16, 64, 8, 2)},
}
# fp32 without TF32, which is multiplied without the matrix units, and fp64 (interpreter only).
IEEE_SMALL: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "kv"), (32, 32, 8, 1))
IEEE_SMALL |= {"forward": (32, 32, 8, 1, 128), "sums": (16, 16, 8, 1)}
IEEE_LARGE: dict[str, tuple[int, ...]] = {
    "forward": (16, 32, 8, 1, 128),
    "q": (16, 16, 8, 1),
    "kv": (16, 32, 8, 1, 255),
    "sums": (16, 32, 8, 1, 255),
}
IEEE: Table = {
    (False, False): IEEE_SMALL,
    (False, True): _with_registers(IEEE_SMALL, 255),
    (True, False): IEEE_LARGE,
    (True, True): _with_registers(IEEE_LARGE, 255) | {"forward": (16, 32, 8, 1, 128)},
}
TF32_SMALL: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "sums"), (32, 32, 8, 1))
TF32_SMALL |= {"forward": (32, 32, 4, 1), "kv": (32, 32, 4, 1, 255)}
TF32_LARGE = dict.fromkeys(("forward", "q", "kv"), (32, 32, 8, 1, 255)) | {"sums": (16, 32, 8, 1)}
TF32: Table = {
    (False, False): TF32_SMALL,
    (False, True): TF32_SMALL | {"forward": (32, 32, 8, 1)},
    (True, False): TF32_LARGE,
    (True, True): TF32_LARGE,
}
# The configurations that `variants` marks as common: dtype, precision, head dim, padded, dropout.
COMMON = {
    ("bf16", "ieee", 64, False, False),
    ("bf16", "ieee", 128, False, False),
    ("bf16", "ieee", 128, True, True),
    ("fp16", "ieee", 64, False, False),
    ("fp32", "ieee", 64, False, False),
}
DELTA_CONFIG = {"BLOCK_M": 32, "num_warps": 4, "enable_fp_fusion": True}

# Arguments whose values vary between calls. They are not specialized: specialization on 1 and on
# multiples of 16 would compile each kernel several times and gain nothing.
UNSPECIALIZED = ["n_time", "n_head", "n_heads", "group", "scale_dim", "threshold"]


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
    arguments = qkv, n_head, head_dim, dropout_p, seed
    _launch(_attention_forward, "forward", *arguments, out_ptr=out, lse_ptr=lse)
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
    qkv, grad_out = _aligned_layout(qkv, head_dim), _aligned_layout(grad_out, head_dim)
    grad_qkv = qkv.new_empty(qkv.shape)
    shared: dict[str, Any] = {
        "grad_out_ptr": grad_out,
        "delta_ptr": qkv.new_empty(lse.shape, dtype=lse.dtype),
        "stride_gb": grad_out.stride(0),
        "stride_gt": grad_out.stride(1),
    }
    saved = {"out_ptr": _aligned_layout(out, head_dim).contiguous()}
    given = {"lse_ptr": lse.contiguous(), "grad_qkv_ptr": grad_qkv}
    arguments = qkv, n_head, head_dim, dropout_p, seed
    if deterministic:  # the first kernel also stores delta, which the second one reads
        _launch(_attention_backward_q, "q", *arguments, **shared, **saved, **given)
        _launch(_attention_backward_kv, "kv", *arguments, **shared, **given, grad_q_ptr=None)
    else:
        sums = qkv.new_zeros(grad_out.shape, dtype=lse.dtype)
        _run(_attention_delta, qkv, n_head, **shared, **saved, **DELTA_CONFIG)
        _launch(_attention_backward_kv, "sums", *arguments, **shared, **given, grad_q_ptr=sums)
        # The kernel accumulates unscaled gradients in fp32; scale, round and store them.
        torch.mul(sums, head_dim**-0.5, out=grad_qkv[..., : sums.size(2)])
    return _unpad(grad_qkv, head_dim)


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that the launchers can launch on a GPU of a compute capability.

    All configurations of bf16 are listed. Those of fp16, which needs the same resources as bf16,
    and of fp32 are a selection: the others differ from it only in padding, or have a head dim
    between two of the listed ones.
    """
    for case in _cases():
        dtype, precision, dim, padded, dropout = case
        types = {"dtype": dtype, "padded": padded, "dropout": dropout, "common": case in COMMON}
        for kind, kernel in (
            ("forward", _attention_forward),
            ("q", _attention_backward_q),
            ("kv", _attention_backward_kv),
            ("sums", _attention_backward_kv),
        ):
            form = _launch_config(kind, capability, *case)
            yield _variant(kernel, form | {"DIM": dim}, **types, sums=kind == "sums")
        if precision == "ieee" and not dropout:  # the kernel depends on neither
            yield _variant(_attention_delta, DELTA_CONFIG | {"DIM": dim}, **types, sums=False)


def _cases() -> Iterator[tuple[str, str, int, bool, bool]]:
    """Yield (dtype, precision, padded head dim, whether it is padded, whether there is dropout)."""
    # `_aligned_layout` pads head dims to multiples of 16. Those that need further padding to a
    # power of two are thus above 32: tiles 16 and 32 wide are never padded.
    every = [(16, False), (32, False), (64, False), (64, True), (128, False), (128, True)]
    forms = {"bf16": every, "fp16": every[2::2], "fp32": every[::2]}
    for dtype, dims in forms.items():
        for precision in ("ieee", "tf32")[: 1 + (dtype == "fp32")]:
            for (dim, padded), dropout in product(dims, (False, True)):
                yield dtype, precision, dim, padded, dropout


def _variant(
    kernel: triton.JITFunction,
    form: dict[str, Any],
    dtype: str,
    padded: bool,
    dropout: bool,
    common: bool,
    sums: bool,
) -> Variant:
    """Return the description of one configuration in which `_run` launches a kernel."""
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    types = dict.fromkeys(("qkv_ptr", "out_ptr", "grad_out_ptr", "grad_qkv_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("lse_ptr", "delta_ptr", "grad_q_ptr"), wide)
    types |= {"seed_ptr": "*i64", "stride_b": "i64", "stride_gb": "i64"}
    values = {name: form[name] for name in form if name.isupper()}
    values |= {"PADDED": padded, "DROPOUT": dropout}
    values |= {} if sums else {"grad_q_ptr": None}
    values |= {} if dropout else {"seed_ptr": None}
    names = kernel.arg_names
    return Variant(
        kernel.__name__,
        {name: types.get(name, "i32") for name in names if name not in values},
        {name: value for name, value in values.items() if name in names},
        {name: form[name] for name in form if name.islower()},
        matrix=kernel is not _attention_delta,
        unaligned=tuple(name for name in names if name in UNSPECIALIZED),
        common=common,
    )


def _launch(
    kernel: triton.JITFunction,
    kind: str,
    qkv: Tensor,
    n_head: int,
    head_dim: int,
    dropout_p: float,
    seed: Tensor | None,
    **arguments: Any,
) -> None:
    """Launch one of the kernels that compute scores, with the configuration from the tables."""
    dim = _tile_dim(head_dim)
    dropout = dropout_p > 0.0
    precision = "tf32" if uses_tf32() else "ieee"
    case = DTYPES[qkv.dtype], precision, dim, dim != qkv.size(2) // 3 // n_head, dropout
    form = _launch_config(kind, capability(qkv.device), *case)
    bytes_a_head = 2 * qkv.size(1) * head_dim * qkv.element_size()
    arguments |= {
        "qkv_ptr": qkv,
        "seed_ptr": seed if dropout else None,
        "stride_b": qkv.stride(0),
        "stride_t": qkv.stride(1),
        "scale_dim": head_dim,
        "group": max(1, SHARED_BYTES // max(bytes_a_head, 1)),
        "threshold": _threshold(dropout_p),
        "DROPOUT": dropout,
    }
    _run(kernel, qkv, n_head, **arguments, **form)


def _run(kernel: triton.JITFunction, qkv: Tensor, n_head: int, **arguments: Any) -> None:
    """Launch a kernel with one program for each block of each head."""
    n_batch, n_time, width = qkv.shape
    head_dim = width // 3 // n_head
    if n_batch * n_time == 0:  # CUDA rejects empty grids
        return
    dim = _tile_dim(head_dim)
    rows = arguments["BLOCK_N" if kernel is _attention_backward_kv else "BLOCK_M"]
    with on_device(qkv):
        kernel[(n_batch * n_head * triton.cdiv(n_time, rows),)](
            n_time=n_time,
            n_head=n_head,
            head_dim=head_dim,
            n_heads=n_batch * n_head,
            DIM=dim,
            PADDED=dim != head_dim,
            **arguments,
        )


def _launch_config(
    kind: str, capability: int, dtype: str, precision: str, dim: int, padded: bool, dropout: bool
) -> dict[str, Any]:
    """Return the block sizes, the precision and the launch options of a kernel."""
    if dtype in ("fp16", "bf16"):
        table = HALVES_80_PADDED if padded else HALVES_80
        table = {9: HALVES_90, 10: HALVES_100, 11: HALVES_100}.get(capability // 10, table)
    else:
        table = TF32 if precision == "tf32" and dtype == "fp32" else IEEE
    block_m, block_n, warps, stages, *registers = table[dim > 64, dropout][kind]
    form = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PRECISION": precision if dtype == "fp32" else "ieee",
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    return form | ({"maxnreg": registers[0]} if registers else {})


def _tile_dim(head_dim: int) -> int:
    """Return the width of a head in registers: a power of two, at least 16 for the matrix units.

    The additional columns are zero and are never stored.
    """
    return max(16, triton.next_power_of_2(head_dim))


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


# ---- forward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_forward(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    seed_ptr,
    stride_b: tl.int64,
    stride_t,
    n_time,
    n_head,
    head_dim,
    n_heads,
    group,
    scale_dim,
    threshold,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the attention of one block of queries of one head over all keys up to its last."""
    head, place, n_blocks = _place(n_heads, group, n_time, BLOCK_M)
    first = (n_blocks - 1 - place) * BLOCK_M  # the last queries, which see the most keys, first
    q_ptr, k_ptr, v_ptr = _inputs(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    q_ptr += first.to(tl.int64) * stride_t
    q = _load(q_ptr, stride_t, n_time - first, head_dim, BLOCK_M, DIM, True, PADDED)
    scale = LOG2_E * _scale(scale_dim, widen(q).dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    maximum = tl.full([BLOCK_M], float("-inf"), scale.dtype)
    total = tl.zeros([BLOCK_M], scale.dtype)
    acc = tl.zeros([BLOCK_M, DIM], scale.dtype)
    # All queries of the block see all keys before `shared`: these blocks need no mask. The other
    # blocks, on the diagonal, are masked, which also excludes keys past the end. `static_range`
    # compiles both loops from one body. The first block of keys contains key 0, which every query
    # sees, so the maximum is finite from the first iteration on and -inf - -inf does not occur.
    shared = first // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        start = shared if MASKED else 0
        end = tl.minimum(first + BLOCK_M, n_time) if MASKED else shared
        for key in range(start, end, BLOCK_N):
            k = _load(k_ptr, stride_t, n_time - key, head_dim, BLOCK_N, DIM, MASKED, PADDED)
            v = _load(v_ptr, stride_t, n_time - key, head_dim, BLOCK_N, DIM, MASKED, PADDED)
            k_ptr += BLOCK_N * stride_t
            v_ptr += BLOCK_N * stride_t
            scores = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if MASKED:
                past = _past(first, key, BLOCK_M, BLOCK_N, False)
                scores = tl.where(past, scores, float("-inf"))
            p, decay, maximum = _online_softmax_step(scores, maximum, scale, q.dtype)
            total = total * decay + tl.sum(p, 1)  # dropout does not change the normalization
            if DROPOUT:
                kept = _kept(seed, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
                p = tl.where(kept, p, 0.0)
            acc *= decay[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    if q.dtype != tl.bfloat16:  # for bf16, `_online_softmax_step` returns a scaled maximum
        maximum *= scale
    _store_row_values(lse_ptr, maximum + tl.log2(total), head, first, n_time, BLOCK_M)
    if DROPOUT:
        acc *= _growth(threshold, scale.dtype)
    out_ptr += _start(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = acc / total[:, None]
    _store(out_ptr, out, n_head * head_dim, n_time - first, head_dim, BLOCK_M, DIM, PADDED)


# ---- backward ------------------------------------------------------------------------------------
# With S the scaled scores, P = softmax(S), O = P V and delta = rowsum(dO * O), the gradients are
# dV = Pᵀ dO, dS = P * (dO Vᵀ - delta), dQ = dS K / sqrt(D) and dK = dSᵀ Q / sqrt(D). Dropout
# multiplies P in O (and thus in dV) and dO Vᵀ in dS by the mask and by 1 / (1 - dropout_p).
#
# P is recomputed as 2^(S log2(e) - lse). Queries past the end are loaded as zeros, with lse and
# delta 0: their P is 1, but their dO, dO Vᵀ and delta are 0, so they contribute nothing.


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_backward_q(
    qkv_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    seed_ptr,
    stride_b: tl.int64,
    stride_t,
    stride_gb: tl.int64,
    stride_gt,
    n_time,
    n_head,
    head_dim,
    n_heads,
    group,
    scale_dim,
    threshold,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute delta and the gradient of one block of queries of one head."""
    head, place, n_blocks = _place(n_heads, group, n_time, BLOCK_M)
    first = (n_blocks - 1 - place) * BLOCK_M  # the last queries, which see the most keys, first
    n_rows = n_time - first
    q_ptr, k_ptr, v_ptr = _inputs(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    q_ptr += first.to(tl.int64) * stride_t
    q = _load(q_ptr, stride_t, n_rows, head_dim, BLOCK_M, DIM, True, PADDED)
    grad, delta = _gradient(
        grad_out_ptr,
        out_ptr,
        delta_ptr,
        stride_gb,
        stride_gt,
        head,
        first,
        n_time,
        n_head,
        head_dim,
        BLOCK_M,
        DIM,
        PADDED,
    )
    lse = _load_row_values(lse_ptr, head, first, n_time, BLOCK_M, True)
    scale = _scale(scale_dim, delta.dtype)
    growth = _growth(threshold, delta.dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    grad_q = tl.zeros([BLOCK_M, DIM], delta.dtype)
    shared = first // BLOCK_N * BLOCK_N  # blocks of keys before it need no mask, as in the forward
    for MASKED in tl.static_range(2):
        start = shared if MASKED else 0
        end = tl.minimum(first + BLOCK_M, n_time) if MASKED else shared
        for key in range(start, end, BLOCK_N):
            k = _load(k_ptr, stride_t, n_time - key, head_dim, BLOCK_N, DIM, MASKED, PADDED)
            v = _load(v_ptr, stride_t, n_time - key, head_dim, BLOCK_N, DIM, MASKED, PADDED)
            k_ptr += BLOCK_N * stride_t
            v_ptr += BLOCK_N * stride_t
            scores = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if MASKED:
                past = _past(first, key, BLOCK_M, BLOCK_N, False)
                scores = tl.where(past, scores, float("-inf"))
            p = _recompute_probabilities(scores, lse[:, None], LOG2_E * scale, q.dtype)
            grad_p = tl.dot(grad, v.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if DROPOUT:
                kept = _kept(seed, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
                grad_p = tl.where(kept, grad_p * growth, 0.0)
            grad_s = (p * (grad_p - delta[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_s, k, grad_q, input_precision=PRECISION, out_dtype=scale.dtype)

    grad_qkv_ptr += _start(head, first, n_time, n_head, head_dim, 3, DIM, PADDED)
    width = 3 * n_head * head_dim
    _store(grad_qkv_ptr, grad_q * scale, width, n_rows, head_dim, BLOCK_M, DIM, PADDED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_delta(
    out_ptr,
    grad_out_ptr,
    delta_ptr,
    stride_gb: tl.int64,
    stride_gt,
    n_time,
    n_head,
    head_dim,
    n_heads,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute delta for one block of queries of one head."""
    head, place, _ = _place(n_heads, n_heads, n_time, BLOCK_M)
    first = place * BLOCK_M
    _gradient(
        grad_out_ptr,
        out_ptr,
        delta_ptr,
        stride_gb,
        stride_gt,
        head,
        first,
        n_time,
        n_head,
        head_dim,
        BLOCK_M,
        DIM,
        PADDED,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_backward_kv(
    qkv_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    grad_q_ptr,  # None, or fp32 [B, T, C]: accumulates the unscaled gradient of the queries
    seed_ptr,
    stride_b: tl.int64,
    stride_t,
    stride_gb: tl.int64,
    stride_gt,
    n_time,
    n_head,
    head_dim,
    n_heads,
    group,
    scale_dim,
    threshold,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the gradients of one block of keys and values of one head.

    The loop runs over all queries that see them. Scores, probabilities and their gradients are
    transposed, [BLOCK_N, BLOCK_M]: the first operands of the products for dV and dK are then
    results that are already in registers.
    """
    head, place, _ = _place(n_heads, group, n_time, BLOCK_N)
    first = place * BLOCK_N  # the first keys, which are seen by the most queries, first
    q_ptr, k_ptr, v_ptr = _inputs(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    n_rows = n_time - first
    k_ptr += first.to(tl.int64) * stride_t
    v_ptr += first.to(tl.int64) * stride_t
    k = _load(k_ptr, stride_t, n_rows, head_dim, BLOCK_N, DIM, True, PADDED)
    v = _load(v_ptr, stride_t, n_rows, head_dim, BLOCK_N, DIM, True, PADDED)
    scale = _scale(scale_dim, widen(k).dtype)
    growth = _growth(threshold, scale.dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    q_ptr += first.to(tl.int64) * stride_t
    grad_out_ptr += _row(head, first, stride_gb, stride_gt, n_head, head_dim, DIM, PADDED)
    if grad_q_ptr is not None:
        grad_q_ptr += _start(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)

    grad_k = tl.zeros([BLOCK_N, DIM], scale.dtype)
    grad_v = tl.zeros([BLOCK_N, DIM], scale.dtype)
    # The queries in three parts: those on the diagonal, which need the causal mask (BLOCK_M divides
    # BLOCK_N); whole blocks without any mask; and a last, partial block with bounds checks only.
    later = tl.minimum(first + BLOCK_N, n_time)
    whole = later + tl.maximum(n_time - later, 0) // BLOCK_M * BLOCK_M
    for PART in tl.static_range(3):
        start = first if PART == 0 else (later if PART == 1 else whole)
        end = later if PART == 0 else (whole if PART == 1 else n_time)
        for query in range(start, end, BLOCK_M):
            n_left = n_time - query
            q = _load(q_ptr, stride_t, n_left, head_dim, BLOCK_M, DIM, PART != 1, PADDED)
            grad = _load(grad_out_ptr, stride_gt, n_left, head_dim, BLOCK_M, DIM, PART != 1, PADDED)
            lse = _load_row_values(lse_ptr, head, query, n_time, BLOCK_M, PART != 1)
            delta = _load_row_values(delta_ptr, head, query, n_time, BLOCK_M, PART != 1)
            q_ptr += BLOCK_M * stride_t
            grad_out_ptr += BLOCK_M * stride_gt
            scores = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if PART == 0:
                past = _past(query, first, BLOCK_M, BLOCK_N, True)
                scores = tl.where(past, scores, float("-inf"))
            p = _recompute_probabilities(scores, lse[None, :], LOG2_E * scale, q.dtype)
            grad_p = tl.dot(v, grad.T, input_precision=PRECISION, out_dtype=scale.dtype)
            dropped = p
            if DROPOUT:
                kept = _kept(seed, head, query, first, threshold, BLOCK_M, BLOCK_N, True)
                dropped = tl.where(kept, p, 0.0)
                grad_p = tl.where(kept, grad_p * growth, 0.0)
            dropped = dropped.to(q.dtype)
            grad_v = tl.dot(dropped, grad, grad_v, input_precision=PRECISION, out_dtype=scale.dtype)
            grad_s = (p * (grad_p - delta[None, :])).to(q.dtype)
            grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION, out_dtype=scale.dtype)
            # Single pass: each block of keys contributes to the gradients of these queries, so the
            # programs of a head accumulate them atomically.
            if grad_q_ptr is not None:
                grad_q = tl.dot(grad_s.T, k, input_precision=PRECISION, out_dtype=scale.dtype)
                pointers = grad_q_ptr + _offsets(n_head * head_dim, BLOCK_M, DIM)
                inside = _inside(n_left, head_dim, BLOCK_M, DIM, True, PADDED)
                tl.atomic_add(pointers, grad_q, mask=inside, sem="relaxed")
                grad_q_ptr += BLOCK_M * n_head * head_dim

    if DROPOUT:
        grad_v *= growth
    width = n_head * head_dim
    grad_qkv_ptr += _start(head, first, n_time, n_head, head_dim, 3, DIM, PADDED) + width
    _store(grad_qkv_ptr, grad_k * scale, 3 * width, n_rows, head_dim, BLOCK_N, DIM, PADDED)
    grad_qkv_ptr += width
    _store(grad_qkv_ptr, grad_v, 3 * width, n_rows, head_dim, BLOCK_N, DIM, PADDED)


# ---- mathematics shared by forward and backward --------------------------------------------------


@triton.jit
def _scale(scale_dim, dtype: tl.constexpr):
    """Return 1 / sqrt(D)."""
    return 1.0 / tl.sqrt(scale_dim.to(dtype))


@triton.jit
def _online_softmax_step(scores, maximum, scale, dtype: tl.constexpr):
    """Perform one step of the online softmax on a block of scores.

    Returns the exponentials 2^(scaled scores - maximum); the factor that rescales sums relative to
    the previous maximum; and the new running maximum.

    For bf16 the maximum is that of the scaled scores, so that scaling and subtraction are one fused
    multiply-add. Its rounding can make an exponential larger than 1 if scores are in the millions.
    This is harmless, because all exponentials are relative to the same number. In fp16 such a value
    would overflow. For fp16, and for the other dtypes, where it costs nothing, the maximum is that
    of the unscaled scores, and the subtraction comes before the scaling: no exponent exceeds 0.
    """
    if dtype == tl.bfloat16:
        new = tl.maximum(maximum, tl.max(scores, 1) * scale)
        p, decay = tl.exp2(scores * scale - new[:, None]), tl.exp2(maximum - new)
    else:
        new = tl.maximum(maximum, tl.max(scores, 1))
        p, decay = tl.exp2((scores - new[:, None]) * scale), tl.exp2((maximum - new) * scale)
    return p, decay, new


@triton.jit
def _recompute_probabilities(scores, lse, scale, dtype: tl.constexpr):
    """Recompute the softmax probabilities from the logarithm of the sum of exponentials."""
    power = scores * scale - lse
    # The exact value is at most 0, but if lse is in the millions its rounding error can make the
    # difference positive, and the exponential would overflow in fp16.
    if dtype != tl.bfloat16:
        power = tl.minimum(power, 0.0)
    return tl.exp2(power)


@triton.jit
def _gradient(
    grad_out_ptr,
    out_ptr,
    delta_ptr,
    stride_gb,
    stride_gt,
    head,
    row,
    n_time,
    n_head,
    head_dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Load the gradient of a block of outputs, store its delta, and return both."""
    grad_out_ptr += _row(head, row, stride_gb, stride_gt, n_head, head_dim, DIM, PADDED)
    grad = _load(grad_out_ptr, stride_gt, n_time - row, head_dim, ROWS, DIM, True, PADDED)
    out_ptr += _start(head, row, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = _load(out_ptr, n_head * head_dim, n_time - row, head_dim, ROWS, DIM, True, PADDED)
    delta = tl.sum(widen(grad) * widen(out), 1)
    _store_row_values(delta_ptr, delta, head, row, n_time, ROWS)
    return grad, delta


@triton.jit
def _past(query, key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return the causal mask of a block of queries and keys: [BLOCK_M, BLOCK_N], or transposed."""
    queries = query + tl.arange(0, BLOCK_M)
    keys = key + tl.arange(0, BLOCK_N)
    transposed = keys[:, None] <= queries[None, :]
    return transposed if TRANSPOSED else keys[None, :] <= queries[:, None]


@triton.jit
def _kept(
    seed,
    head,
    query,
    key,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return the dropout mask of a block, True if kept: [BLOCK_M, BLOCK_N], or transposed.

    The random numbers come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3") with the seed as its key. The counter (key // 4, query, head) yields four
    numbers, one for each of four neighboring keys, so the mask depends on positions only. `key`
    must be a multiple of 4.
    """
    queries = query + tl.arange(0, BLOCK_M)
    fours = key // 4 + tl.arange(0, BLOCK_N // 4)
    if TRANSPOSED:
        fours, queries = tl.broadcast(fours[:, None], queries[None, :])
    else:
        fours, queries = tl.broadcast(fours[None, :], queries[:, None])
    a, b, c, d = tl.philox(seed, fours, queries, head, 0)
    a = a.to(tl.int32, bitcast=True) >= threshold
    b = b.to(tl.int32, bitcast=True) >= threshold
    c = c.to(tl.int32, bitcast=True) >= threshold
    d = d.to(tl.int32, bitcast=True) >= threshold
    # Interleave the four masks so that keys 4 i, 4 i + 1, ... take a, b, c, d of counter i: each
    # join adds a last dimension, which gives [..., 2, 2] with [[a, b], [c, d]]. Flattening the last
    # two dimensions into that of the counters yields the order of the keys.
    kept = tl.join(tl.join(a, c), tl.join(b, d))
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        kept = tl.reshape(kept, [BLOCK_M, BLOCK_N])
    return kept


@triton.jit
def _growth(threshold, dtype: tl.constexpr):
    """Return 1 / (1 - dropout_p): 2^32 over the number of int32 values not below `threshold`."""
    return 4294967296.0 / (2147483648.0 - threshold.to(dtype))


# ---- indexing, loads and stores ------------------------------------------------------------------


@triton.jit
def _place(n_heads, group, n_time, BLOCK: tl.constexpr):
    """Return the head of a program, the rank of its block by length, and the number of blocks.

    Heads are processed in groups whose keys and values fit into the L2 cache together. Within a
    group, the longest blocks of all heads come first, so that the short ones balance the load at
    the end. The last group may be smaller.
    """
    n_blocks = tl.cdiv(n_time, BLOCK)
    in_group = group * n_blocks
    program = tl.program_id(0)
    first = program // in_group * group
    size = tl.minimum(group, n_heads - first)
    program %= in_group
    return first + program % size, program // size, n_blocks


@triton.jit
def _inputs(qkv_ptr, stride_b, head, n_head, head_dim, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Return pointers to the first row of the queries, keys and values of a head."""
    # `head * 0` is a zero of a tensor type, which `_row` casts to int64.
    q_ptr = qkv_ptr + _row(head, head * 0, stride_b, 0, n_head, head_dim, DIM, PADDED)
    width = n_head * (head_dim if PADDED else DIM)
    return q_ptr, q_ptr + width, q_ptr + 2 * width


@triton.jit
def _row(head, row, stride_b, stride_t, n_head, head_dim, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Return the offset of a row of a head in [B, T, C] or [B, T, 3C], whose heads are adjacent."""
    # Without padding, the head dim is the constant DIM, so that the compiler knows the alignment.
    offset = (head // n_head).to(tl.int64) * stride_b + row.to(tl.int64) * stride_t
    return offset + head % n_head * (head_dim if PADDED else DIM)


@triton.jit
def _start(
    head,
    row,
    n_time,
    n_head,
    head_dim,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return the offset of a row of a head in a contiguous [B, T, PARTS * C]."""
    width = PARTS * n_head * (head_dim if PADDED else DIM)
    stride_b = width.to(tl.int64) * n_time
    return _row(head, row, stride_b, width, n_head, head_dim, DIM, PADDED)


@triton.jit
def _load(
    pointer,
    stride,
    n_rows,
    head_dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Load a block of rows of one head, with zeros outside of the tensor."""
    pointers = pointer + _offsets(stride, ROWS, DIM)
    if BOUNDED or PADDED:
        inside = _inside(n_rows, head_dim, ROWS, DIM, BOUNDED, PADDED)
        block = tl.load(pointers, mask=inside, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def _store(
    pointer,
    block,
    stride,
    n_rows,
    head_dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store a block of rows of one head in the dtype of the pointer."""
    inside = _inside(n_rows, head_dim, ROWS, DIM, True, PADDED)
    block = block.to(pointer.dtype.element_ty)
    tl.store(pointer + _offsets(stride, ROWS, DIM), block, mask=inside)


@triton.jit
def _offsets(stride, ROWS: tl.constexpr, DIM: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, DIM)[None, :]


@triton.jit
def _inside(
    n_rows,
    head_dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return a mask of a block: rows below `n_rows` if BOUNDED, columns < `head_dim` if PADDED."""
    rows = tl.arange(0, ROWS)[:, None] < n_rows
    columns = tl.arange(0, DIM)[None, :] < head_dim
    if BOUNDED and PADDED:
        inside = rows & columns
    elif BOUNDED:
        inside = tl.broadcast_to(rows, [ROWS, DIM])
    else:
        inside = tl.broadcast_to(columns, [ROWS, DIM])
    return inside


@triton.jit
def _load_row_values(pointer, head, row, n_time, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """Load one number for each row of a block from [B, H, T]."""
    rows = row + tl.arange(0, ROWS)
    pointer += head.to(tl.int64) * n_time
    if BOUNDED:
        numbers = tl.load(pointer + rows, mask=rows < n_time, other=0.0)
    else:
        numbers = tl.load(pointer + rows)
    return numbers


@triton.jit
def _store_row_values(pointer, numbers, head, row, n_time, ROWS: tl.constexpr):
    """Store one number for each row of a block in [B, H, T]."""
    rows = row + tl.arange(0, ROWS)
    tl.store(pointer + head.to(tl.int64) * n_time + rows, numbers, mask=rows < n_time)
