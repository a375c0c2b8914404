"""Quantized weights and their files."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastgpt import _C, GPTConfig
from fastgpt.inference.engine import Engine
from fastgpt.inference.quantization import QuantizationError, dequantize, quantize
from fastgpt.utils.errors import UsageError
from tests.engine.models import DTYPES, prompt, random_model, small_model


@pytest.mark.parametrize("shape", [(5, 64), (3, 100), (40, 33), (1, 1)])
def test_eight_bits_round_to_the_nearest(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    integers, scales = quantize(weight, 8)
    assert (integers.dtype, integers.shape, scales.shape) == (torch.int8, shape, shape[:1])
    assert torch.equal(integers.abs().amax(1), torch.full((shape[0],), 127, dtype=torch.int8))
    error = (dequantize(integers, scales, shape) - weight).abs()
    assert (error <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("shape", [(5, 64), (3, 100), (40, 33), (1, 1)])
def test_four_bits_beat_the_plain_scale(shape: tuple[int, int], group: int) -> None:
    """The plain scale maps the weight of largest magnitude to -8."""
    weight = torch.randn(shape)
    integers, scales = quantize(weight, 4, group)
    assert torch.equal(scales, scales.bfloat16().float())
    got = (dequantize(integers, scales, shape) - weight).square().sum()
    padded = torch.nn.functional.pad(weight, (0, -shape[1] % group)).unflatten(1, (-1, group))
    extreme = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).bfloat16().float()
    plain = (padded / scale).round().clamp(-8, 7) * scale
    assert got <= (plain - padded).square().sum() * 1.0001


def test_threads_change_nothing() -> None:
    weight = torch.randn(37, 100)
    for bits in (8, 4):
        for one, many in zip(
            quantize(weight, bits), quantize(weight, bits, threads=5), strict=True
        ):
            assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = random_model(GPTConfig(61, 16, 2, 3, 48, bias=tied, tie_weights=tied))
    engine = Engine.from_model(model, dtype, 2, group=32)
    engine.save(tmp_path / "weights.safetensors")
    loaded = Engine.load(tmp_path / "weights.safetensors", 1)
    assert (loaded.config, loaded.dtype, loaded.group) == (engine.config, dtype, 32)
    assert torch.equal(loaded.logits(prompt()), engine.logits(prompt()))
    loaded.save(tmp_path / "again.safetensors")
    first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("weights", "again"))
    assert first == second


def test_files_are_as_small_as_they_should_be(tmp_path: Path) -> None:
    model = random_model(GPTConfig(64, 8, 2, 2, 128))
    sizes = {}
    for dtype in DTYPES:
        Engine.from_model(model, dtype).save(tmp_path / dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert 0.45 < sizes["bfloat16"] / sizes["float32"] < 0.55
    assert 0.24 < sizes["int8"] / sizes["float32"] < 0.30
    assert 0.13 < sizes["int4"] / sizes["float32"] < 0.19


def saved(path: Path, dtype: str = "int4") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    Engine.from_model(small_model(), dtype, 1).save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fastgpt"])
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def without_checksum(about: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that format 1 had."""
    return {name: value for name, value in about.items() if name != "crc32c"} | {"format": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_without_a_checksum_are_loaded(tmp_path: Path, dtype: str) -> None:
    tensors, about = saved(tmp_path / "new", dtype)
    save_file(tensors, tmp_path / "old", {"fastgpt": json.dumps(without_checksum(about))})
    logits = [Engine.load(tmp_path / name).logits(prompt()) for name in ("new", "old")]
    assert torch.equal(*logits)


def test_the_checksum_is_the_crc32c_of_all_that_matters(tmp_path: Path) -> None:
    tensors, about = saved(tmp_path / "weights", "int8")
    checksum = about.pop("crc32c")
    parts = [json.dumps(about, sort_keys=True).encode()]
    for name in sorted(tensors):
        parts += [name.encode(), tensors[name].numpy().tobytes()]
    assert checksum == f"{_C.crc32c(b''.join(parts)):08x}"  # tested in tests/interop


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_damage_is_noticed(tmp_path: Path, dtype: str) -> None:
    """Bits flipped anywhere or in the header, other characters in it, a block of zeros."""
    saved(tmp_path / "whole", dtype)
    content = (tmp_path / "whole").read_bytes()
    header, random = 8 + int.from_bytes(content[:8], "little"), Random(1)
    for round_ in range(400):
        damaged, block = bytearray(content), 64 if round_ % 4 == 3 else 1
        at = random.randrange(header if round_ % 4 in (1, 2) else len(content) - block)
        flipped = bytes([content[at] ^ 1 << random.randrange(8)])
        letter = random.choice(b'0123456789,:"{}[]-.e').to_bytes()
        damaged[at : at + block] = (flipped, flipped, letter, bytes(block))[round_ % 4]
        if damaged != content:
            (tmp_path / "damaged").write_bytes(damaged)
            with pytest.raises(QuantizationError):
                Engine.load(tmp_path / "damaged", 1)


@pytest.mark.parametrize(
    "change", [{"format": 1}, {"crc32c": None}, {"crc32c": "00000000"}, {"dtype": "int8"}]
)
def test_a_changed_checksum_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    tensors, about = saved(tmp_path / "whole", "bfloat16")
    save_file(tensors, tmp_path / "damaged", {"fastgpt": json.dumps(about | change)})
    with pytest.raises(QuantizationError, match="damaged: its checksum differs; copy it again"):
        Engine.load(tmp_path / "damaged")


def damaged(kind: str, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    name = "h.0.mlp.c_fc.weight"
    changes: dict[str, Any] = {
        "missing": lambda: tensors.pop(name),
        "scales missing": lambda: tensors.pop(f"{name}.scales"),
        "unknown": lambda: tensors.update(extra=torch.zeros(3)),
        "shape": lambda: tensors.update({name: tensors[name][:-1].contiguous()}),
        "dtype": lambda: tensors.update({name: tensors[name].int()}),
        "not finite": lambda: tensors[f"{name}.scales"].fill_(float("inf")),
        "-128": lambda: tensors["wte.weight"].fill_(-128),
        "format": lambda: about.update(format=9),
        "other dtype": lambda: about.update(dtype="int3"),
        "group": lambda: about.update(group=48),
        "config": lambda: about["config"].update(n_embd=33),
        "layers": lambda: about["config"].update(n_layer=10**7),
        "vocabulary": lambda: about["config"].update(vocab_size=10**30),
        "width": lambda: about["config"].update(n_embd=32.0),
        "config incomplete": lambda: about["config"].pop("n_layer"),
        "no config": lambda: about.pop("config"),
    }
    changes[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "h.0.mlp.c_fc.weight is missing"),
        ("scales missing", "h.0.mlp.c_fc.weight.scales is missing"),
        ("unknown", "extra is not a weight of this model"),
        ("shape", r"h.0.mlp.c_fc.weight is .*127, 32.*, not .*128, 32"),
        ("dtype", "h.0.mlp.c_fc.weight is .*int32.*, not .*uint8"),
        ("not finite", "h.0.mlp.c_fc.weight's scales contains NaN or infinity"),
        ("-128", "wte.weight contains -128"),
        ("format", "has format 9, but this version reads formats 1 to 2"),
        ("other dtype", "does not hold engine weights: .*int3"),
        ("group", "does not hold engine weights: .*48"),
        ("config", "does not hold engine weights: .*multiple of n_head"),
        ("layers", "does not hold engine weights: .*too few tensors"),
        ("vocabulary", "does not hold engine weights: "),
        ("width", "does not hold engine weights: "),
        ("config incomplete", "does not hold engine weights: .*incomplete config"),
        ("no config", "does not hold engine weights: .*config"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    """Also without a checksum."""
    tensors, about = saved(tmp_path / "whole")
    about = without_checksum(about)
    damaged(kind, tensors, about)
    save_file(tensors, tmp_path / "damaged", {"fastgpt": json.dumps(about)})
    with pytest.raises(QuantizationError, match=message):
        Engine.load(tmp_path / "damaged")


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="none cannot be read"):
        Engine.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(QuantizationError, match="text cannot be read"):
        Engine.load(tmp_path / "text")
    whole = tmp_path / "whole"
    Engine.from_model(small_model(), "int8", 1).save(whole)
    (tmp_path / "half").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(QuantizationError, match="half cannot be read"):
        Engine.load(tmp_path / "half")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(QuantizationError, match="other does not hold engine weights"):
        Engine.load(tmp_path / "other")


@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize("size", [1e-25, 1e20, 3e37])
def test_weights_of_any_size_keep_it(n_bits: int, size: float) -> None:
    weight = torch.randn(4, 64).clamp(-3, 3) * size
    error = (dequantize(*quantize(weight, n_bits), (4, 64)) / size - weight / size).abs().max()
    assert error < (0.02 if n_bits == 8 else 0.4)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        Engine.from_model(small_model(), "int8").save(tmp_path / "nowhere" / "model.safetensors")


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        quantize(torch.tensor([[1.0, float("nan")]]), 8)
