"""Sums over rows for the gradients of weights and biases, in two stages and without atomics.

In the first stage, each program of another kernel that iterates over the rows accumulates column
sums in registers and stores them as one row of partial sums. The kernel in this module adds up
these rows. The order of additions is fixed, so the same inputs give bitwise identical results.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import (
    DTYPES,
    LaunchConfig,
    Variant,
    check_tensors,
    describe,
    n_multiprocessors,
    on_device,
)

# Rows × columns that a program reads in one iteration: 16 elements per thread in four 128-bit
# loads. Narrow tiles give more programs; their 64 bytes of a row are still read efficiently.
NARROW = LaunchConfig({"ROWS": 256, "COLUMNS": 16}, num_warps=8)
WIDE = LaunchConfig({"ROWS": 64, "COLUMNS": 64}, num_warps=8)


def add_up(partials: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the sums of the rows of each ``partials[i]``, as tensors `[C]` of `dtype`.

    partials: contiguous `[n_sums, n_programs, C]`, with n_sums one or two. If n_programs is 0, the
    sums are 0.
    """
    check_tensors("column_sum", partials=partials)
    n_sums, n_programs, width = partials.shape
    sums = [torch.empty(width, dtype=dtype, device=partials.device) for _ in range(n_sums)]
    if width == 0:  # CUDA rejects empty grids
        return sums
    first, second = sums if n_sums == 2 else (*sums, None)
    columns = NARROW.constants["COLUMNS"]
    fills_gpu = n_sums * width > 4 * n_multiprocessors(partials.device) * columns
    config = WIDE if fills_gpu else NARROW
    with on_device(partials):
        _add_up[(triton.cdiv(width, config.constants["COLUMNS"]), n_sums)](
            partials, first, second, n_programs, width, **config.kwargs
        )
    return sums


def variants(capability: int) -> Iterator[Variant]:
    """Yield the configurations that `add_up` can launch on a GPU of a compute capability."""
    for dtype in DTYPES.values():
        wide = "*fp64" if dtype == "fp64" else "*fp32"
        for second in (f"*{dtype}", None):
            types = {"partials_ptr": wide, "first_ptr": f"*{dtype}", "second_ptr": second}
            for config in (NARROW, WIDE):
                yield describe(_add_up, types, config, unaligned=("n_programs",))


@triton.jit
def _add_up(
    partials_ptr, first_ptr, second_ptr, n_programs, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1).to(tl.int64)  # the sum: first or second
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    added = tl.zeros([ROWS, COLUMNS], partials_ptr.dtype.element_ty)
    for start in range(0, n_programs, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
        offsets = (which * n_programs + rows) * width + columns[None, :]
        mask = (rows < n_programs) & inside[None, :]
        added += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(added, axis=0).to(first_ptr.dtype.element_ty)
    if which == 0:
        tl.store(first_ptr + columns, total, mask=inside)
    elif second_ptr is not None:
        tl.store(second_ptr + columns, total, mask=inside)
