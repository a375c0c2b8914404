"""Products of every instruction set compared to float64, and whole networks of odd shapes."""

import platform

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.inference.engine import Engine
from fastgpt.inference.quantization import dequantize, quantize
from tests.engine.models import DTYPES, INSTRUCTION_SETS, prompt, random_model, round_inputs

SHAPES = [(61, 48), (32, 64), (33, 80), (31, 100), (96, 33), (1, 1), (65, 300)]


def one_matrix(weight: torch.Tensor, dtype: str, instruction_set: str, group: int = 64) -> Engine:
    """Return an engine whose token embedding is the given matrix."""
    rows, columns = weight.shape
    model = random_model(GPTConfig(rows, 4, 1, 1, columns))
    with torch.no_grad():
        model.wte.weight.copy_(weight)
    return Engine.from_model(model, dtype, 1, instruction_set=instruction_set, group=group)


def truth(x: torch.Tensor, weight: torch.Tensor, dtype: str, group: int = 64) -> torch.Tensor:
    if dtype == "bfloat16":
        weight = weight.bfloat16()
    elif dtype != "float32":
        weight = dequantize(*quantize(weight, 8 if dtype == "int8" else 4, group), weight.shape)
    return round_inputs(x, dtype, group) @ weight.double().T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 31])
def test_products(instruction_set: str, dtype: str, shape: tuple[int, int], rows: int) -> None:
    weight, x = torch.randn(shape), torch.randn(rows, shape[1]) * 3
    x[0, 0] = 100.0  # an outlier, as GPT-2's activations have
    got = one_matrix(weight, dtype, instruction_set)._core.multiply("wte.weight", x, rows)
    expected = truth(x, weight, dtype)
    scale = (x.abs().double() @ weight.abs().double().T).amax()
    assert (torch.from_numpy(got) - expected).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("width", [32, 48, 80, 100, 128])
@pytest.mark.parametrize("rows", [1, 3, 12, 17])
def test_products_of_four_bits(instruction_set: str, group: int, width: int, rows: int) -> None:
    model = random_model(GPTConfig(7, 4, 1, 1, width))
    engine = Engine.from_model(model, "int4", 1, instruction_set=instruction_set, group=group)
    x = torch.randn(rows, 4 * width)
    got = torch.from_numpy(engine._core.multiply("h.0.mlp.c_proj.weight", x, rows))
    weight, bias = model.h[0].mlp.c_proj.weight.detach(), model.h[0].mlp.c_proj.bias.detach()
    expected = truth(x, weight, "int4", group) + bias.double()
    scale = (x.abs().double() @ weight.abs().double().T).amax()
    assert (got - expected).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_extreme_inputs_and_weights_do_not_overflow(instruction_set: str, dtype: str) -> None:
    """Sums of the largest integers must fit wherever they are accumulated in 16 bits."""
    weight = torch.ones(64, 256)
    weight[::2] = -1
    x = torch.ones(2, 256)
    x[1] = -1
    got = torch.from_numpy(
        one_matrix(weight, dtype, instruction_set)._core.multiply("wte.weight", x, 2)
    )
    expected = torch.tensor([-256.0, 256.0]).repeat(32)
    assert torch.allclose(got, torch.stack([expected, -expected]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_zeros_and_tiny_numbers_stay_finite(instruction_set: str, dtype: str) -> None:
    weight = torch.randn(8, 128)
    weight[2] = 0.0
    weight[3] = 1e-40
    x = torch.randn(3, 128)
    x[1] = 0.0
    x[2] = 1e-39
    got = torch.from_numpy(
        one_matrix(weight, dtype, instruction_set)._core.multiply("wte.weight", x, 3)
    )
    assert (got[1:].abs() < 1e-30).all()
    assert got[0, 2:4].abs().max() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_rows_do_not_depend_on_others(instruction_set: str, dtype: str) -> None:
    weight, x = torch.randn(70, 300), torch.randn(29, 300)
    core = one_matrix(weight, dtype, instruction_set)._core
    together = torch.from_numpy(core.multiply("wte.weight", x, 29))
    for row in (0, 11, 28):
        alone = torch.from_numpy(core.multiply("wte.weight", x[row : row + 1].contiguous(), 1))
        assert torch.equal(together[row], alone[0])


NETWORKS = [
    GPTConfig(61, 24, 2, 3, 48),  # head dimension 16
    GPTConfig(61, 70, 2, 2, 80),  # 40
    GPTConfig(33, 20, 1, 4, 100),  # 25
    GPTConfig(17, 130, 1, 1, 128),  # 128
    GPTConfig(61, 32, 2, 2, 64, bias=False, tie_weights=False),
    GPTConfig(5, 8, 1, 7, 7),  # 1
]


@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: f"{c.n_embd}-{c.n_head}")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_networks_in_float32(config: GPTConfig, instruction_set: str, threads: int) -> None:
    model = random_model(config, std=0.2)
    ids = prompt(2, config.block_size, config.vocab_size)
    expected = model.double()(ids)
    got = Engine.from_model(model, "float32", threads, instruction_set=instruction_set).logits(ids)
    assert (got - expected).abs().max() <= 2e-5 * expected.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: f"{c.n_embd}-{c.n_head}")
def test_all_codes_agree(config: GPTConfig, dtype: str) -> None:
    """Instruction sets differ only in the order of summation."""
    model = random_model(config, std=0.2)
    ids = prompt(1, config.block_size, config.vocab_size)
    first, *others = (
        Engine.from_model(model, dtype, 1, instruction_set=instruction_set).logits(ids)
        for instruction_set in INSTRUCTION_SETS
    )
    for other in others:
        assert (other - first).abs().max() <= 0.03 * first.std()


@pytest.mark.parametrize(("dtype", "far"), [("bfloat16", 0.03), ("int8", 0.06), ("int4", 0.6)])
def test_rounding_moves_logits_little(dtype: str, far: float) -> None:
    model = random_model(GPTConfig(200, 64, 3, 4, 128), std=0.05)
    ids = prompt(1, 64, 200)
    expected = model(ids).detach()
    error = (Engine.from_model(model, dtype, 2).logits(ids) - expected).pow(2).mean().sqrt()
    assert 1e-6 < error / expected.std() < far


def test_the_vocabulary_of_gpt2() -> None:
    model = random_model(GPTConfig(50257, 8, 1, 2, 64), std=0.1)
    ids = torch.tensor([[0, 50256, 777]])
    expected = model.double()(ids)
    got = Engine.from_model(model, "float32", 2).logits(ids)
    assert (got - expected).abs().max() <= 2e-5 * expected.std()


def test_arm_has_code_of_its_own() -> None:
    assert ("neon" in INSTRUCTION_SETS) == (platform.machine() in ("aarch64", "arm64"))


def test_an_unknown_code_is_refused() -> None:
    message = 'instruction set "sse9" is not available on this processor; available: best, portable'
    with pytest.raises(ValueError, match=message):
        Engine.from_model(random_model(GPTConfig(5, 8, 1, 1, 8)), instruction_set="sse9")
