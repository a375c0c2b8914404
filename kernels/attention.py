"""Causal self-attention on packed qkv (the twin of `fastgpt.ops.reference.causal_attention`).

The scores never exist as a whole: each program keeps a block of them, with a running maximum and
sum for the softmax (FlashAttention-2, Dao 2023, arXiv:2307.08691), and the backward recomputes the
probabilities from the logarithm of that sum. Queries, keys and values are read where they lie in
`[B, T, 3C]`, and their gradients are written where they belong in one packed gradient.

Exponentials are powers of two, with log2(e) as a part of the scale of the scores. Dropout computes
its mask anew from (seed, batch and head, query, key) wherever it is needed, whatever the blocks.
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
    multiplies_in_tf32,
    on_device,
    wide_dtype,
    widen,
)

LARGEST_HEAD = 128

# Offsets inside a block of at most 128 rows are int32; a row of a wider tensor is copied.
LARGEST_STRIDE = 2**23

# Triton loads 128 bits at a time where it knows a stride to be a multiple of this.
ALIGNED = 16

# Programs that run at the same time share keys and values in the L2 cache: half of an H100's.
SHARED_BYTES = 25 * 10**6


def _with_registers(
    table: dict[str, tuple[int, ...]], registers: int
) -> dict[str, tuple[int, ...]]:
    """Return the table with a limit of registers in each row."""
    return {kind: (*row[:4], registers) for kind, row in table.items()}


# Queries and keys in a block, warps, and stages in the pipeline of loads, for each kernel ("sums"
# is the backward in one pass), by whether the head dim is above 64 and whether there is dropout,
# whose random numbers take many registers. None of them spills. Those of sm_90 at head dim 64 and
# without dropout were the fastest of a dozen each on an H200: small blocks of four warps, several
# of which a multiprocessor holds at once, so that some compute exponentials while others multiply.
# That counts for more than the products' own overlap: with three stages Triton leaves a product
# unfinished from one round to the next, and then ptxas lets no two instructions of it overlap.
#
# A fifth number is the registers that a thread may have. Without it ptxas may spill a register or
# two, which ones depends on its version, for one more block on a multiprocessor.
Table = dict[tuple[bool, bool], dict[str, tuple[int, ...]]]
SMALL_90 = {
    "forward": (64, 64, 4, 3),
    "q": (64, 64, 4, 3),
    "kv": (32, 64, 4, 2),
    "sums": (64, 128, 8, 3),
}
# The others are chosen by the compiler's figures alone.
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
# Before sm_90, and on sm_120, operands take registers too, as do the masks of padded heads, and a
# block may have but 99 KB of shared memory. sm_100 hands out fewer registers at head dim 128.
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
    (False, True): HALVES[False, True] | {"sums": (32, 64, 4, 2, 255)},
    (True, False): HALVES[True, False] | {"q": (128, 32, 8, 2), "kv": (32, 128, 8, 2, 255)},
    (True, True): HALVES[True, True] | {"q": (64, 32, 8, 2), "kv": (16, 64, 8, 2)},
}
# fp32, multiplied without the matrix units, and (fp64 too) in the interpreter
IEEE_SMALL = dict.fromkeys(("q", "kv"), (32, 32, 8, 1))
IEEE_SMALL |= {"forward": (32, 32, 8, 1), "sums": (16, 16, 8, 1)}
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
# Of the forms that `variants` lists: dtype, precision, head dim, padded, dropout.
COMMON = {
    ("bf16", "ieee", 64, False, False),
    ("bf16", "ieee", 128, False, False),
    ("bf16", "ieee", 128, True, True),
    ("fp16", "ieee", 64, False, False),
    ("fp32", "ieee", 64, False, False),
}
DELTA_FORM = {"BLOCK_M": 32, "num_warps": 4, "enable_fp_fusion": True}

# Numbers that change from call to call: not worth a compilation for each kind of them.
CHANGING = ["n_time", "n_head", "n_heads", "group", "scale_dim", "threshold"]


def causal_attention_forward(
    qkv: Tensor, n_head: int, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attention `[B, T, C]`, contiguous, in the dtype of `qkv`, and its `lse`.

    qkv: `[B, T, 3C]`, any strides; fp32, fp16 or bf16, computed in fp32, or fp64 (in Triton's
    interpreter only). lse: `[B, H, T]`, for the backward: the base-2 logarithm of the sum of each
    query's exponentials, in fp32 (fp64 for fp64). seed: int64, one element, where qkv is, and read
    on the device: it decides which probabilities are dropped, each with probability `dropout_p`.
    ValueError for what is not supported, such as head dims outside 1 to 128.
    """
    head_dim = _check(qkv, n_head, dropout_p, seed)
    qkv = _readable(qkv, head_dim)
    n_batch, n_time, width = qkv.shape
    out = qkv.new_empty(n_batch, n_time, width // 3)
    lse = qkv.new_empty(n_batch, n_head, n_time, dtype=wide_dtype(qkv.dtype))
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
    """Return the gradient of `qkv`, `[B, T, 3C]`, contiguous, given `grad_out`, that of `out`.

    grad_out: shape and dtype of out, any strides (autograd's expanded ones too). out, lse: what the
    forward returned for the same qkv, n_head, dropout_p and seed. deterministic: the same inputs
    give the same bits; if False, all is done in one pass, which adds up the gradients of the
    queries with atomic additions, in whatever order programs get there. ValueError as the forward.
    """
    head_dim = _check(qkv, n_head, dropout_p, seed)
    _check_saved(grad_out, qkv, out, lse, n_head)
    qkv, grad_out = _readable(qkv, head_dim), _readable(grad_out, head_dim)
    grad_qkv = qkv.new_empty(qkv.shape)
    shared: dict[str, Any] = {
        "grad_out_ptr": grad_out,
        "delta_ptr": qkv.new_empty(lse.shape, dtype=lse.dtype),
        "stride_gb": grad_out.stride(0),
        "stride_gt": grad_out.stride(1),
    }
    saved = {"out_ptr": _readable(out, head_dim).contiguous()}
    given = {"lse_ptr": lse.contiguous(), "grad_qkv_ptr": grad_qkv}
    arguments = qkv, n_head, head_dim, dropout_p, seed
    if deterministic:  # the first kernel also leaves delta for the second
        _launch(_attention_backward_q, "q", *arguments, **shared, **saved, **given)
        _launch(_attention_backward_kv, "kv", *arguments, **shared, **given, grad_q_ptr=None)
    else:
        sums = qkv.new_zeros(grad_out.shape, dtype=lse.dtype)
        _run(_attention_delta, qkv, n_head, **shared, **saved, **DELTA_FORM)
        _launch(_attention_backward_kv, "sums", *arguments, **shared, **given, grad_q_ptr=sums)
        torch.mul(sums, head_dim**-0.5, out=grad_qkv[..., : sums.size(2)])
    return _unpad(grad_qkv, head_dim)


def variants(capability: int) -> Iterator[Variant]:
    """Yield what the launchers can launch on a GPU of a compute capability.

    All of bf16. What is left out of fp16, which takes as much as bf16, and of fp32, differs from
    what is listed in being padded, or in having a dim between two that are listed.
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
            form = _form(kind, capability, *case)
            yield _variant(kernel, form | {"DIM": dim}, **types, sums=kind == "sums")
        if precision == "ieee" and not dropout:  # both are nothing to it
            yield _variant(_attention_delta, DELTA_FORM | {"DIM": dim}, **types, sums=False)


def _cases() -> Iterator[tuple[str, str, int, bool, bool]]:
    """Yield dtype, precision, padded head dim, whether it is padded, whether there is dropout."""
    # `_readable` makes head dims multiples of 16: 16 and 32 themselves are never padded further
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
    """Describe one way to launch a kernel, as `_run` does it."""
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
        unaligned=tuple(name for name in names if name in CHANGING),
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
    """Run one of the kernels that compute scores."""
    dim = _tile_dim(head_dim)
    dropout = dropout_p > 0.0
    precision = "tf32" if multiplies_in_tf32() else "ieee"
    case = DTYPES[qkv.dtype], precision, dim, dim != qkv.size(2) // 3 // n_head, dropout
    form = _form(kind, capability(qkv.device), *case)
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
    """Run a kernel over all blocks of all heads."""
    n_batch, n_time, width = qkv.shape
    head_dim = width // 3 // n_head
    if n_batch * n_time == 0:  # CUDA has no empty grid
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


def _form(
    kind: str, capability: int, dtype: str, precision: str, dim: int, padded: bool, dropout: bool
) -> dict[str, Any]:
    """Return the block sizes, the precision and the options to launch a kernel with."""
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
    """Return the width that a head has in registers: the least that the matrix units take, or more.

    What is added is zero, and is never stored.
    """
    return max(16, triton.next_power_of_2(head_dim))


def _threshold(dropout_p: float) -> int:
    """Return the smallest int32 that is kept, if each is as likely as another."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def _readable(x: Tensor, head_dim: int) -> Tensor:
    """Return [B, T, heads] so that the kernels load rows of a head 128 bits at a time.

    Heads of a dim that is no multiple of 16 are padded with zeros. They and odd layouts (a slice at
    an odd address, the gradient of a sum) come up rarely, and are copied.
    """
    if head_dim % ALIGNED:
        x = torch.nn.functional.pad(x.unflatten(2, (-1, head_dim)), (0, -head_dim % ALIGNED))
        return x.flatten(2)
    aligned = all(n % ALIGNED == 0 for n in (x.stride(0), x.stride(1), x.data_ptr()))
    if x.stride(2) == 1 and aligned and x.stride(1) < LARGEST_STRIDE:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _unpad(x: Tensor, head_dim: int) -> Tensor:
    """Undo the padding of `_readable`."""
    if head_dim % ALIGNED == 0:
        return x
    padded = triton.cdiv(head_dim, ALIGNED) * ALIGNED
    return x.unflatten(2, (-1, padded))[..., :head_dim].flatten(2).contiguous()


def _check(qkv: Tensor, n_head: int, dropout_p: float, seed: Tensor | None) -> int:
    """Return the head dim; ValueError for what the kernels do not support."""
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
    """Raise ValueError unless the backward's inputs belong together."""
    name = "causal_attention"
    check_tensors(name, grad_out=grad_out, qkv=qkv, out=out, lse=lse)
    n_batch, n_time, width = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    expected = {
        "grad_out": (grad_out, (n_batch, n_time, width), qkv.dtype),
        "out": (out, (n_batch, n_time, width), qkv.dtype),
        "lse": (lse, (n_batch, n_head, n_time), wide_dtype(qkv.dtype)),
    }
    for what, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {what} must be {list(shape)} {dtype}, "
                f"not {list(tensor.shape)} {tensor.dtype}"
            )


# ---- forward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=CHANGING)
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
    """One block of queries of one head, over all keys up to its last."""
    head, place, n_blocks = _place(n_heads, group, n_time, BLOCK_M)
    first = (n_blocks - 1 - place) * BLOCK_M  # the longest rows come first
    q_ptr, k_ptr, v_ptr = _inputs(qkv_ptr, stride_b, head, n_head, head_dim, DIM, PADDED)
    q_ptr += first.to(tl.int64) * stride_t
    q = _load(q_ptr, stride_t, n_time - first, head_dim, BLOCK_M, DIM, True, PADDED)
    scale = LOG2_E * _scale(scale_dim, widen(q).dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    maximum = tl.full([BLOCK_M], float("-inf"), scale.dtype)
    total = tl.zeros([BLOCK_M], scale.dtype)
    acc = tl.zeros([BLOCK_M, DIM], scale.dtype)
    shared = first // BLOCK_N * BLOCK_N  # all these queries see all keys before this one
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
            p, decay, maximum = _exponentials(scores, maximum, scale, q.dtype)
            total = total * decay + tl.sum(p, 1)  # of all, dropped or not
            if DROPOUT:
                kept = _kept(seed, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
                p = tl.where(kept, p, 0.0)
            acc *= decay[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    if q.dtype != tl.bfloat16:
        maximum *= scale
    _store_numbers(lse_ptr, maximum + tl.log2(total), head, first, n_time, BLOCK_M)
    if DROPOUT:
        acc *= _growth(threshold, scale.dtype)
    out_ptr += _start(head, first, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = acc / total[:, None]
    _store(out_ptr, out, n_head * head_dim, n_time - first, head_dim, BLOCK_M, DIM, PADDED)


# ---- backward ------------------------------------------------------------------------------------
# With S the scaled scores, P = softmax(S), O = P V and delta = rowsum(dO * O), the gradients are
# dV = Pᵀ dO, dS = P * (dO Vᵀ - delta), dQ = dS K / sqrt(D) and dK = dSᵀ Q / sqrt(D). Dropout
# multiplies P in O and dO Vᵀ in dS by a mask and by 1 / (1 - dropout_p).


@triton.jit(do_not_specialize=CHANGING)
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
    """Delta and the gradient of one block of queries of one head."""
    head, place, n_blocks = _place(n_heads, group, n_time, BLOCK_M)
    first = (n_blocks - 1 - place) * BLOCK_M  # the longest rows come first
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
    lse = _load_numbers(lse_ptr, head, first, n_time, BLOCK_M, True)
    scale = _scale(scale_dim, delta.dtype)
    growth = _growth(threshold, delta.dtype)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    grad_q = tl.zeros([BLOCK_M, DIM], delta.dtype)
    shared = first // BLOCK_N * BLOCK_N  # all these queries see all keys before this one
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
            p = _probabilities(scores, lse[:, None], LOG2_E * scale, q.dtype)
            grad_p = tl.dot(grad, v.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if DROPOUT:
                kept = _kept(seed, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
                grad_p = tl.where(kept, grad_p * growth, 0.0)
            grad_s = (p * (grad_p - delta[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_s, k, grad_q, input_precision=PRECISION, out_dtype=scale.dtype)

    grad_qkv_ptr += _start(head, first, n_time, n_head, head_dim, 3, DIM, PADDED)
    width = 3 * n_head * head_dim
    _store(grad_qkv_ptr, grad_q * scale, width, n_rows, head_dim, BLOCK_M, DIM, PADDED)


@triton.jit(do_not_specialize=CHANGING)
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
    """Delta of one block of queries of one head."""
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


@triton.jit(do_not_specialize=CHANGING)
def _attention_backward_kv(
    qkv_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    grad_q_ptr,  # None, or fp32 [B, T, C] to add the gradient of the queries to
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
    """The gradients of one block of keys and values of one head, over all queries that see them.

    Scores and what comes of them are transposed here, [BLOCK_N, BLOCK_M]: so each product's first
    factor is in registers already.
    """
    head, place, _ = _place(n_heads, group, n_time, BLOCK_N)
    first = place * BLOCK_N  # early keys have the most queries
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
    # Queries: first those among which the keys lie, then whole blocks, then what is left of one.
    later = tl.minimum(first + BLOCK_N, n_time)
    whole = later + tl.maximum(n_time - later, 0) // BLOCK_M * BLOCK_M
    for PART in tl.static_range(3):
        start = first if PART == 0 else (later if PART == 1 else whole)
        end = later if PART == 0 else (whole if PART == 1 else n_time)
        for query in range(start, end, BLOCK_M):
            n_left = n_time - query
            q = _load(q_ptr, stride_t, n_left, head_dim, BLOCK_M, DIM, PART != 1, PADDED)
            grad = _load(grad_out_ptr, stride_gt, n_left, head_dim, BLOCK_M, DIM, PART != 1, PADDED)
            lse = _load_numbers(lse_ptr, head, query, n_time, BLOCK_M, PART != 1)
            delta = _load_numbers(delta_ptr, head, query, n_time, BLOCK_M, PART != 1)
            q_ptr += BLOCK_M * stride_t
            grad_out_ptr += BLOCK_M * stride_gt
            scores = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=scale.dtype)
            if PART == 0:
                past = _past(query, first, BLOCK_M, BLOCK_N, True)
                scores = tl.where(past, scores, float("-inf"))
            p = _probabilities(scores, lse[None, :], LOG2_E * scale, q.dtype)
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


# ---- the mathematics they share ------------------------------------------------------------------


@triton.jit
def _scale(scale_dim, dtype: tl.constexpr):
    """1 / sqrt(D)."""
    return 1.0 / tl.sqrt(scale_dim.to(dtype))


@triton.jit
def _exponentials(scores, maximum, scale, dtype: tl.constexpr):
    """One step of the softmax: exponentials of a block of scores, and what they are relative to.

    Returns 2^(scaled scores - maximum), the factor for what was relative to the last maximum, and
    the new maximum. With bf16 that is a maximum of scaled scores, and scaling and subtraction are
    one instruction; its rounding may make an exponential larger than one where scores are in the
    millions, which is no harm, for all are relative to the same number. In fp16 such a one would
    overflow, so there (and where it costs nothing) it is a maximum of scores, and they subtract
    exactly.
    """
    if dtype == tl.bfloat16:
        new = tl.maximum(maximum, tl.max(scores, 1) * scale)
        p, decay = tl.exp2(scores * scale - new[:, None]), tl.exp2(maximum - new)
    else:
        new = tl.maximum(maximum, tl.max(scores, 1))
        p, decay = tl.exp2((scores - new[:, None]) * scale), tl.exp2((maximum - new) * scale)
    return p, decay, new


@triton.jit
def _probabilities(scores, lse, scale, dtype: tl.constexpr):
    """The softmax again, from its logarithm of the sum of exponentials."""
    power = scores * scale - lse
    if dtype != tl.bfloat16:  # lse of millions is too coarse to keep it from 0: fp16 would overflow
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
    """Load the gradient of a block of outputs; store its delta, and return both."""
    grad_out_ptr += _row(head, row, stride_gb, stride_gt, n_head, head_dim, DIM, PADDED)
    grad = _load(grad_out_ptr, stride_gt, n_time - row, head_dim, ROWS, DIM, True, PADDED)
    out_ptr += _start(head, row, n_time, n_head, head_dim, 1, DIM, PADDED)
    out = _load(out_ptr, n_head * head_dim, n_time - row, head_dim, ROWS, DIM, True, PADDED)
    delta = tl.sum(widen(grad) * widen(out), 1)
    _store_numbers(delta_ptr, delta, head, row, n_time, ROWS)
    return grad, delta


@triton.jit
def _past(query, key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which keys of a block each query of another may see: [BLOCK_M, BLOCK_N], or transposed."""
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
    """Which probabilities of a block dropout keeps: [BLOCK_M, BLOCK_N], or transposed.

    Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed
    as its key; its counter (key // 4, query, head) gives the numbers of four neighbouring keys.
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
    kept = tl.join(tl.join(a, c), tl.join(b, d))  # [..., 2, 2] with [[a, b], [c, d]] last
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        kept = tl.reshape(kept, [BLOCK_M, BLOCK_N])
    return kept


@triton.jit
def _growth(threshold, dtype: tl.constexpr):
    """1 / (1 - dropout_p), by how many of the int32 are not below `threshold`."""
    return 4294967296.0 / (2147483648.0 - threshold.to(dtype))


# ---- where things are ----------------------------------------------------------------------------


@triton.jit
def _place(n_heads, group, n_time, BLOCK: tl.constexpr):
    """Which head, and which of its blocks in order of length, a program works on.

    Heads are taken in groups whose keys and values fit in the L2 cache together; in a group the
    longest blocks of all heads come first, so that short ones fill the gaps at the end.
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
    """Where queries, keys and values of a head begin."""
    q_ptr = qkv_ptr + _row(head, head * 0, stride_b, 0, n_head, head_dim, DIM, PADDED)
    width = n_head * (head_dim if PADDED else DIM)
    return q_ptr, q_ptr + width, q_ptr + 2 * width


@triton.jit
def _row(head, row, stride_b, stride_t, n_head, head_dim, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The offset of a row of a head in [B, T, heads of one row side by side, ...]."""
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
    """The same in a contiguous [B, T, PARTS * C]."""
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
    """Load a block of rows of one head, zeros where there are none."""
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
    """Which elements of a block exist: of `n_rows` rows if BOUNDED, of `head_dim` if PADDED."""
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
def _load_numbers(pointer, head, row, n_time, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """Load one number for each row of a block, of [B, H, T]."""
    rows = row + tl.arange(0, ROWS)
    pointer += head.to(tl.int64) * n_time
    if BOUNDED:
        numbers = tl.load(pointer + rows, mask=rows < n_time, other=0.0)
    else:
        numbers = tl.load(pointer + rows)
    return numbers


@triton.jit
def _store_numbers(pointer, numbers, head, row, n_time, ROWS: tl.constexpr):
    """Store one number for each row of a block, in [B, H, T]."""
    rows = row + tl.arange(0, ROWS)
    tl.store(pointer + head.to(tl.int64) * n_time + rows, numbers, mask=rows < n_time)
