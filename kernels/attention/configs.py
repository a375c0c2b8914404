"""Block sizes and compiler options of the attention kernels, and the rule that selects them."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from fastgpt.kernels.common import LaunchConfig


class Specialization(NamedTuple):
    """The properties of a call for which the kernels are compiled separately."""

    dtype: str
    """fp32, fp16, bf16 or fp64 (interpreter only)."""
    precision: str
    """Precision of the products: `tf32` (of fp32 only) or `ieee`."""
    dim: int
    """Width of a head in registers, a power of two."""
    padded: bool
    """Whether that is more than the width in memory."""
    dropout: bool


class TileConfig(NamedTuple):
    """Block sizes and compiler options of one kernel.

    A limit of registers per thread is set where ptxas (in some of its versions) would spill one or
    two registers in order to fit one more block on a multiprocessor. The limit tells it that this
    block is not wanted.
    """

    block_m: int
    """Number of queries in a block."""
    block_n: int
    """Number of keys in a block."""
    num_warps: int
    num_stages: int | None = None
    max_registers: int | None = None


class KernelConfigs(NamedTuple):
    """The configurations of all kernels."""

    forward: TileConfig
    backward_q: TileConfig
    backward_kv: TileConfig
    backward_one_pass: TileConfig
    delta: TileConfig = TileConfig(32, 0, 4)


class ConfigTable(NamedTuple):
    """The configurations by head dim, small (up to 64) or large, and dropout.

    Dropout has its own configurations because its random numbers need many registers.
    """

    small: KernelConfigs
    small_dropout: KernelConfigs
    large: KernelConfigs
    large_dropout: KernelConfigs


# No configuration spills. Except for SMALL_90 they were chosen from the compiler's statistics
# (registers, shared memory, spills), not from measurements.
CONFIGS_16BIT = ConfigTable(
    small=KernelConfigs(
        forward=TileConfig(64, 64, 4, 2),
        backward_q=TileConfig(64, 64, 4, 2),
        backward_kv=TileConfig(64, 128, 8, 3),
        backward_one_pass=TileConfig(32, 128, 8, 2),
    ),
    small_dropout=KernelConfigs(
        forward=TileConfig(64, 32, 4, 2),
        backward_q=TileConfig(64, 32, 4, 2),
        backward_kv=TileConfig(32, 64, 4, 2),
        backward_one_pass=TileConfig(32, 64, 4, 2),
    ),
    large=KernelConfigs(
        forward=TileConfig(128, 64, 8, 2),
        backward_q=TileConfig(128, 64, 8, 2),
        backward_kv=TileConfig(32, 128, 8, 2),
        backward_one_pass=TileConfig(32, 128, 8, 2),
    ),
    large_dropout=KernelConfigs(
        forward=TileConfig(128, 32, 8, 2),
        backward_q=TileConfig(128, 32, 8, 2),
        backward_kv=TileConfig(16, 128, 8, 2),
        backward_one_pass=TileConfig(16, 128, 8, 2),
    ),
)
# The configurations of sm_90 for head dims up to 64 without dropout were the fastest of about a
# dozen each on an H200. They are small blocks of few warps, so that a multiprocessor holds several
# of them and some compute exponentials while others multiply. This is faster although their matrix
# instructions do not overlap: with three stages Triton leaves a product unfinished at the end of an
# iteration, and ptxas then serializes its instructions.
SMALL_90 = KernelConfigs(
    forward=TileConfig(64, 64, 4, 3),
    backward_q=TileConfig(64, 64, 4, 3),
    backward_kv=TileConfig(32, 64, 4, 2),
    backward_one_pass=TileConfig(64, 128, 8, 3),
)
CONFIGS_16BIT_90 = CONFIGS_16BIT._replace(small=SMALL_90)
# Before sm_90 and on sm_120, the operands of matrix products are held in registers, as are the
# masks of padded heads, and a block is limited to 99 KB of shared memory.
CONFIGS_16BIT_80 = CONFIGS_16BIT._replace(
    small_dropout=CONFIGS_16BIT.small_dropout._replace(backward_one_pass=TileConfig(16, 64, 8, 2)),
    large=CONFIGS_16BIT.large._replace(
        backward_q=TileConfig(128, 32, 8, 2),
        backward_kv=TileConfig(32, 64, 8, 2),
        backward_one_pass=TileConfig(32, 64, 8, 2),
    ),
    large_dropout=CONFIGS_16BIT.large_dropout._replace(
        backward_kv=TileConfig(16, 64, 8, 2), backward_one_pass=TileConfig(16, 64, 8, 2)
    ),
)
CONFIGS_16BIT_80_PADDED = CONFIGS_16BIT_80._replace(
    small=CONFIGS_16BIT_80.small._replace(backward_kv=TileConfig(32, 128, 8, 3))
)
# On sm_100 fewer registers are available at head dim 128.
CONFIGS_16BIT_100 = CONFIGS_16BIT._replace(
    small_dropout=CONFIGS_16BIT.small_dropout._replace(
        backward_kv=TileConfig(32, 64, 4, 2, 255), backward_one_pass=TileConfig(32, 64, 4, 2, 255)
    ),
    large=CONFIGS_16BIT.large._replace(
        backward_q=TileConfig(128, 32, 8, 2), backward_kv=TileConfig(32, 128, 8, 2, 255)
    ),
    large_dropout=CONFIGS_16BIT.large_dropout._replace(
        backward_q=TileConfig(64, 32, 8, 2), backward_kv=TileConfig(16, 64, 8, 2)
    ),
)
# fp32 without TF32, which is multiplied without the matrix units, and fp64 (interpreter only).
IEEE = ConfigTable(
    small=KernelConfigs(
        forward=TileConfig(32, 32, 8, 1, 128),
        backward_q=TileConfig(32, 32, 8, 1),
        backward_kv=TileConfig(32, 32, 8, 1),
        backward_one_pass=TileConfig(16, 16, 8, 1),
    ),
    small_dropout=KernelConfigs(
        forward=TileConfig(32, 32, 8, 1, 255),
        backward_q=TileConfig(32, 32, 8, 1, 255),
        backward_kv=TileConfig(32, 32, 8, 1, 255),
        backward_one_pass=TileConfig(16, 16, 8, 1, 255),
    ),
    large=KernelConfigs(
        forward=TileConfig(16, 32, 8, 1, 128),
        backward_q=TileConfig(16, 16, 8, 1),
        backward_kv=TileConfig(16, 32, 8, 1, 255),
        backward_one_pass=TileConfig(16, 32, 8, 1, 255),
    ),
    large_dropout=KernelConfigs(
        forward=TileConfig(16, 32, 8, 1, 128),
        backward_q=TileConfig(16, 16, 8, 1, 255),
        backward_kv=TileConfig(16, 32, 8, 1, 255),
        backward_one_pass=TileConfig(16, 32, 8, 1, 255),
    ),
)
TF32_SMALL = KernelConfigs(
    forward=TileConfig(32, 32, 4, 1),
    backward_q=TileConfig(32, 32, 8, 1),
    backward_kv=TileConfig(32, 32, 4, 1, 255),
    backward_one_pass=TileConfig(32, 32, 8, 1),
)
TF32_LARGE = KernelConfigs(
    forward=TileConfig(32, 32, 8, 1, 255),
    backward_q=TileConfig(32, 32, 8, 1, 255),
    backward_kv=TileConfig(32, 32, 8, 1, 255),
    backward_one_pass=TileConfig(16, 32, 8, 1),
)
TF32 = ConfigTable(
    small=TF32_SMALL,
    small_dropout=TF32_SMALL._replace(forward=TileConfig(32, 32, 8, 1)),
    large=TF32_LARGE,
    large_dropout=TF32_LARGE,
)

# The specializations that `variants` marks as common.
COMMON = {
    Specialization("bf16", "ieee", 64, padded=False, dropout=False),
    Specialization("bf16", "ieee", 128, padded=False, dropout=False),
    Specialization("bf16", "ieee", 128, padded=True, dropout=True),
    Specialization("fp16", "ieee", 64, padded=False, dropout=False),
    Specialization("fp32", "ieee", 64, padded=False, dropout=False),
}


def select_config(kernel: str, spec: Specialization, capability: int) -> LaunchConfig:
    """Return the configuration of a kernel (a field of `KernelConfigs`) on a GPU."""
    if spec.dtype in ("fp16", "bf16"):
        table = CONFIGS_16BIT_80_PADDED if spec.padded else CONFIGS_16BIT_80
        table = {9: CONFIGS_16BIT_90, 10: CONFIGS_16BIT_100, 11: CONFIGS_16BIT_100}.get(
            capability // 10, table
        )
    else:
        table = TF32 if spec.precision == "tf32" else IEEE
    name = ("large" if spec.dim > 64 else "small") + "_dropout" * spec.dropout
    tile: TileConfig = getattr(getattr(table, name), kernel)
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": spec.precision,
        "DIM": spec.dim,
        "PADDED": spec.padded,
        "DROPOUT": spec.dropout,
    }
    return LaunchConfig(constants, tile.num_warps, tile.num_stages, tile.max_registers)


def specializations() -> Iterator[Specialization]:
    """Yield the specializations that are compiled ahead of time.

    All of bf16 are listed. Those of fp16, which needs the same resources as bf16, and of fp32 are a
    selection: the others differ from it only in padding, or have a head dim between two of the
    listed ones.
    """
    # The launchers pad head dims to multiples of 16. Those that need further padding to a power of
    # two are thus above 32: tiles 16 and 32 wide are never padded.
    every = [(16, False), (32, False), (64, False), (64, True), (128, False), (128, True)]
    dims = {"bf16": every, "fp16": every[2::2], "fp32": every[::2]}
    for dtype in dims:
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            for (dim, padded), dropout in product(dims[dtype], (False, True)):
                yield Specialization(dtype, precision, dim, padded, dropout)
