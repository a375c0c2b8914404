"""Tests of the memory pool for training on a CPU."""

import subprocess
import sys

import pytest
import torch

from fastgpt import _C
from fastgpt.utils.host_memory import SMALLEST, empty, empty_like

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the pool needs Linux")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (SMALLEST,), (SMALLEST + 1, 3), (4, 0)])
def test_tensors_are_of_shape_and_dtype_and_ones_own(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    first, second = empty(*shape, dtype=dtype).fill_(1.0), empty(*shape, dtype=dtype)
    second.fill_(2.0)
    like = empty_like(first).fill_(3.0)
    for tensor, value in ((first, 1.0), (second, 2.0), (like, 3.0)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.eq(value).all()


@on_linux
def test_bf16_takes_half() -> None:
    before = _C.pool_usage()[1]
    kept = [empty(2 * SMALLEST, dtype=torch.bfloat16)]
    assert _C.pool_usage()[1] - before == 4 * SMALLEST
    kept.append(empty(2 * SMALLEST))
    assert _C.pool_usage()[1] - before == 12 * SMALLEST


# Prints by how many MB the memory of the process decreases when 64 MB of tensors are freed, and
# when they are returned to the system. A smaller tensor between them must keep its values.
TRIM = """
import os
from fastgpt import _C
from fastgpt.utils.host_memory import empty, trim_pool
def used():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
first, kept, last = empty(2**22).fill_(1), empty(2**16 + 5).fill_(7), empty(2**23 + 2**22).fill_(1)
full = used()
del first, last
freed, held = used(), _C.pool_usage()[0]
trim_pool()
print(full - freed, full - used(), _C.pool_usage()[0] < held, bool(kept.eq(7).all()))
again = empty(2**23).fill_(2)
print(bool(again.eq(2).all()), bool(kept.eq(7).all()))
"""


@on_linux
def test_the_system_gets_back_what_is_not_in_use() -> None:
    done = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True)
    freed, trimmed, lower, kept, *more = done.stdout.split()
    assert float(freed) < 4
    assert 56 < float(trimmed) < 72
    assert [lower, kept, *more] == ["True"] * 4
