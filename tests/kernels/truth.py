"""The rule by which kernels are judged: FlashAttention's.

A result may be at most twice as far from the truth, computed in float64, as plain PyTorch is in the
precision of the inputs. bf16 runs on a GPU only: Triton's interpreter gets it silently wrong.
"""

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_GPU


def assert_as_good_as_plain(ours: Tensor, plain: Tensor, true: Tensor, what: str = "") -> None:
    """Hold `ours` against `true` (float64), with twice the error of `plain` allowed.

    A few units in the last place of `ours` more, for plain PyTorch may be right by luck: a first
    row's softmax over one score has a gradient of exactly 0 there, on any processor.
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
    """Return the largest absolute difference, in float64."""
    return (actual.double() - true.double()).abs().max().item()


def need_gpu_memory(gigabytes: float) -> None:
    """Skip the test unless a GPU has so much memory free."""
    if not HAS_GPU:
        pytest.skip("needs a GPU")
    torch.cuda.empty_cache()  # what earlier tests left there
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, and {free:.1f} are free")
