"""FLOPs per token and peak FLOP/s of devices, from which the MFU is computed.

The model FLOPs utilization, MFU (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B), is
the rate of operations that the model requires, without any extra work of the implementation,
divided by the peak rate of the device's matrix units.
"""

import time
from dataclasses import dataclass

import torch

from fastgpt.model import GPTConfig

TRIAL_SECONDS = 0.25  # duration of the measurement for devices without a data sheet entry


@dataclass(frozen=True)
class Peak:
    """The peak floating-point operations per second of one device, from data sheet or measured."""

    flops: float
    measured: bool

    def __str__(self) -> str:
        source = "measured" if self.measured else "data-sheet"
        return f"{source} peak of {_tera(self.flops)} TFLOP/s"


def flops_per_token(config: GPTConfig, n_params: int, frozen: bool = False) -> int:
    """Return the floating-point operations for training on one token: 6·N + 12·L·C·T.

    The forward pass has one multiplication and one addition per weight (2·N), the backward twice
    that, in total 6·N. Attention's two matrix products have 4·C·T operations per layer (C: width,
    T: context), and three times that with the backward, in total 12·L·C·T. Masked scores are
    counted too, as in PaLM and nanoGPT, so that results are comparable.

    Args:
        config: The model configuration.
        n_params: The number of parameters without the position embedding, as returned by
            `GPT.num_params(embeddings=False)`.
        frozen: Whether almost all weights are frozen (LoRA) and need no gradients: 4·N instead of
            6·N.
    """
    # The token embedding is a lookup, which costs nothing. With tied weights its parameters count
    # once, for the product in the head. An untied head has its own, so one table is subtracted.
    if not config.tie_weights:
        n_params -= config.vocab_size * config.n_embd
    return (4 if frozen else 6) * n_params + 12 * config.n_layer * config.n_embd * config.block_size


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Return the peak of a device for matrix products in a dtype.

    GPUs listed in this module have the peak of their data sheet; other devices are measured, in
    less than half a second. For fp32 on a GPU with TF32 enabled
    (`torch.set_float32_matmul_precision`), this is the peak of TF32. Returns None if the device
    does not support matrix products in the dtype.
    """
    if device.type == "cuda":
        column = _column(dtype)
        listed = _data_sheet(torch.cuda.get_device_name(device))
        if listed and column and listed[column]:
            return Peak(listed[column] * 1e12, measured=False)
    try:
        return Peak(_measure(device, dtype), measured=True)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _column(dtype: torch.dtype) -> str | None:
    fp32 = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {torch.float32: fp32, torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)


def _data_sheet(name: str) -> dict[str, float] | None:
    """Return the TFLOP/s of a listed GPU by dtype, None if it is not listed.

    name: as reported by CUDA, for example "NVIDIA A100-SXM4-80GB".
    """
    words = name.replace("-", " ").upper().split()
    for key, row in _TFLOPS.items():
        if set(key.split()) <= set(words) and not set(words) & _OTHER_MODELS - set(key.split()):
            return dict(zip(("fp32", "tf32", "bf16", "fp16"), row, strict=True))
    return None


# Dense TFLOP/s (half of the values "with sparsity") as (fp32, TF32, bf16, fp16), the 16-bit types
# with fp32 accumulation; 0 if unsupported. Sources: NVIDIA's data sheets of each product; for
# GeForce and RTX appendix A of the architecture whitepapers (GA102, Ada, Blackwell). A GPU matches
# the first row all of whose words are in its name, so more specific rows come first.
_TFLOPS: dict[str, tuple[float, float, float, float]] = {
    "GB200": (80, 1250, 2500, 2500),
    "B200": (75, 1125, 2250, 2250),
    "H200 NVL": (60, 417.5, 835.5, 835.5),
    "H200": (67, 494.5, 989.5, 989.5),
    "GH200": (67, 494.5, 989.5, 989.5),
    "H100 NVL": (60, 417.5, 835.5, 835.5),
    "H100 PCIE": (51, 378, 756.5, 756.5),
    "H100": (67, 494.5, 989.5, 989.5),  # "NVIDIA H100 80GB HBM3" is the SXM form
    "H800 PCIE": (51, 378, 756.5, 756.5),
    "H800": (67, 494.5, 989.5, 989.5),
    "A100": (19.5, 156, 312, 312),
    "A800": (19.5, 156, 312, 312),
    "A30": (10.3, 82, 165, 165),
    "A40": (37.4, 74.8, 149.7, 149.7),
    "A10": (31.2, 62.5, 125, 125),
    "L40S": (91.6, 183, 362, 362),
    "L40": (90.5, 90.5, 181, 181),
    "L4": (30.3, 60, 121, 121),
    "T4": (8.1, 0, 0, 65),
    "V100 PCIE": (14, 0, 0, 112),
    "V100S PCIE": (16.4, 0, 0, 130),
    "V100": (15.7, 0, 0, 125),
    "RTX 6000 ADA": (91.1, 182.1, 364.2, 364.2),
    "RTX A6000": (38.7, 77.4, 154.8, 154.8),
    "RTX 5090": (104.8, 104.8, 209.5, 209.5),
    "RTX 4090": (82.6, 82.6, 165.2, 165.2),
    "RTX 4080": (48.7, 48.7, 97.5, 97.5),
    "RTX 3090": (35.6, 35.6, 71, 71),
}
# Words that denote a different product than the listed one. Such GPUs are measured instead.
_OTHER_MODELS = {"TI", "SUPER", "LAPTOP", "MAX", "Q", "D", "MOBILE", "NVL", "MIG"}


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Return the highest FLOP/s of square matrix products of growing size in `TRIAL_SECONDS`."""
    size, best = 256, 0.0
    _product_seconds(size, device, dtype)  # warm-up: load libraries, start threads
    began = time.perf_counter()
    while not best or time.perf_counter() - began < TRIAL_SECONDS:
        seconds = _product_seconds(size, device, dtype)
        best = max(best, 2.0 * size**3 / seconds)
        if seconds < TRIAL_SECONDS / 10:  # twice the size takes 8 times as long, still < 1 trial
            size = min(2 * size, 8192)
    return best


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the time of one `[size, size]` matrix product, synchronizing before and after."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    _wait(device)
    began = time.perf_counter()
    torch.mm(a, a)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    """Synchronize with the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"
