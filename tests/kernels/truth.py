"""The accuracy criterion of the kernels, which is that of FlashAttention's tests.

The error of a result with respect to float64 may be at most twice that of plain PyTorch in the
dtype of the inputs. bf16 is tested on a GPU only: Triton's interpreter silently computes wrong
results for it.
"""

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU


def assert_as_good_as_plain(ours: Tensor, plain: Tensor, true: Tensor, what: str = "") -> None:
    """Compare `ours` with `true` (float64), with a tolerance of twice the error of `plain`.

    A few units in the last place are added, because plain PyTorch may be exact by chance: for
    example, the softmax of a first row, over one score, has a gradient of exactly 0.
    """
    assert ours.shape == true.shape, f"{what}: {list(ours.shape)} for {list(true.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype} for {plain.dtype}"
    assert ours.isfinite().all(), f"{what}: not finite"
    if not ours.numel():
        return
    eps = torch.finfo(torch.float32).eps if ours.dtype != torch.float64 else 1e-15
    floor = 8 * eps * max(1.0, true.abs().max().item())
    mine, allowed = error(ours, true), 2 * error(plain, true) + floor
    assert mine <= allowed, f"{what}: off by {mine:.2e}, more than {allowed:.2e}"


def error(actual: Tensor, true: Tensor) -> float:
    """Return the largest absolute difference, computed in float64."""
    return (actual.double() - true.double()).abs().max().item()


def require_gpu_memory(gigabytes: float) -> None:
    """Skip the test unless a GPU has this much free memory."""
    if not HAS_GPU:
        pytest.skip("needs a GPU")
    torch.cuda.empty_cache()  # release the memory of earlier tests
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, and {free:.1f} are free")
