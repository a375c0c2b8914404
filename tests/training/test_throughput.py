"""Tests of FLOPs per token and of the peak FLOP/s of devices."""

import time

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.training.throughput import Peak, _data_sheet, device_peak, flops_per_token

CPU = torch.device("cpu")


def counted_flops(config: GPTConfig, *, attention: bool) -> float:
    """Return the FLOPs per token of the matrix products, counted independently."""
    width, layers = config.n_embd, config.n_layer
    forward = layers * 2 * (3 + 1 + 4 + 4) * width * width + 2 * width * config.vocab_size
    if attention:
        forward += layers * 2 * 2 * config.block_size * width
    return 3 * forward


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_those_of_the_products(tied: bool) -> None:
    """6N also counts biases and norm weights, less than 1% of a model of this width."""
    config = GPTConfig(300, 64, 3, 4, 256, tie_weights=tied)
    with torch.device("meta"):
        n_params = GPT(config).num_params(embeddings=False)
    assert flops_per_token(config, n_params) == pytest.approx(
        counted_flops(config, attention=True), rel=0.01
    )
    shorter = GPTConfig(300, 32, 3, 4, 256, tie_weights=tied)
    assert flops_per_token(config, n_params) - flops_per_token(shorter, n_params) == (
        12 * 3 * 256 * 32
    )


def test_gpt2_is_as_nanogpt_counts() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    flops = flops_per_token(model.config, model.num_params(embeddings=False))
    assert flops == 6 * 123_653_376 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("Tesla T4", 0),
        ("Tesla V100-SXM2-16GB", 0),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ],
)
def test_names_as_cuda_has_them(name: str, bf16: float) -> None:
    row = _data_sheet(name)
    assert row is not None
    assert row["bf16"] == bf16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",  # slower than the A10
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA H20",
        "Quadro RTX 6000",
    ],
)
def test_another_product_is_not_taken_for_a_listed_one(name: str) -> None:
    assert _data_sheet(name) is None


def test_a_listed_gpu_has_its_data_sheets_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    cuda = torch.device("cuda")
    peak = device_peak(cuda, torch.bfloat16)
    assert peak == Peak(312e12, measured=False)
    assert str(peak) == "data-sheet peak of 312 TFLOP/s"
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "highest")
    assert device_peak(cuda, torch.float32) == Peak(19.5e12, measured=False)
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high")
    assert device_peak(cuda, torch.float32) == Peak(156e12, measured=False)


def test_others_are_measured_at_once() -> None:
    began = time.perf_counter()
    peak = device_peak(CPU, torch.float32)
    assert time.perf_counter() - began < 2  # half a second on an idle machine
    assert peak is not None
    assert peak.measured
    assert 1e9 < peak.flops < 1e14
    assert str(peak).startswith("measured peak of ")


def test_a_dtype_without_products_has_no_peak() -> None:
    assert device_peak(CPU, torch.bool) is None
