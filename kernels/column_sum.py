"""Sums over rows for the gradients of weights and biases, in two stages and without atomics.

The kernels that walk over the rows anyway keep sums for their columns in registers, and each of
their programs writes its own once, as a row of partial sums; the kernel here adds those up. Every
number is added in a fixed order, so the same inputs give the same bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import DTYPES, Variant, check_tensors, n_processors, on_device

# Rows × columns that a program reads at once: 16 numbers a thread, in four 128-bit loads. The fewer
# columns the more programs, and 64 bytes of a row are still enough to read in one piece.
NARROW, WIDE = {"ROWS": 256, "COLUMNS": 16}, {"ROWS": 64, "COLUMNS": 64}
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def add_up(partials: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return `n_sums` (one or two) tensors `[C]` of `dtype`, the sums of ``partials[i]``.

    partials: contiguous `[n_sums, n_programs, C]`; without programs the sums are 0.
    """
    check_tensors("column_sum", partials=partials)
    n_sums, n_programs, width = partials.shape
    sums = [torch.empty(width, dtype=dtype, device=partials.device) for _ in range(n_sums)]
    if width == 0:  # CUDA has no empty grid
        return sums
    first, second = sums if n_sums == 2 else (*sums, None)
    enough = 4 * n_processors(partials.device) * NARROW["COLUMNS"]
    tile = NARROW if n_sums * width <= enough else WIDE
    with on_device(partials):
        _add_up[(triton.cdiv(width, tile["COLUMNS"]), n_sums)](
            partials, first, second, n_programs, width, **tile, **OPTIONS
        )
    return sums


def variants(capability: int) -> Iterator[Variant]:
    """Yield all that `add_up` can launch on a GPU of a compute capability."""
    for dtype in DTYPES.values():
        wide = "fp64" if dtype == "fp64" else "fp32"
        for second in (f"*{dtype}", None):
            pointers = {"partials_ptr": f"*{wide}", "first_ptr": f"*{dtype}", "second_ptr": second}
            given = {name: kind for name, kind in pointers.items() if kind}
            left_out = {name: None for name, kind in pointers.items() if not kind}
            signature = given | {"n_programs": "i32", "width": "i32"}
            for tile in (NARROW, WIDE):
                yield Variant(
                    _add_up.__name__,
                    signature,
                    left_out | tile,
                    OPTIONS,
                    unaligned=("n_programs",),
                )


@triton.jit
def _add_up(
    partials_ptr,
    first_ptr,
    second_ptr,
    n_programs,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    which = tl.program_id(1).to(tl.int64)
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
