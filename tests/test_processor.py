"""Which precision is chosen for what a processor says of itself."""

import re
from pathlib import Path

import pytest
import torch

from fastgpt import processor
from fastgpt.processor import choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 fma", "float32: this processor has no bfloat16 units"),
        ("flags : avx512f avx512_bf16", "bfloat16: .* units for it \\(AVX512-BF16\\)"),
        ("flags : avx512_bf16 amx_bf16 amx_tile", "bfloat16: .*\\(AMX\\)"),
        ("Features\t: fp asimd bf16 i8mm", "bfloat16: .*\\(Arm's bfloat16\\)"),
        ("model name : bf16 amx_bf16\nflags : sse2", "float32: .*"),
        ("bugs : bf16\n\nsomething", "float32: .*"),
    ],
)
def test_the_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str, expected: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo + "\n")
    monkeypatch.setattr(processor, "CPUINFO", path)
    assert re.fullmatch(expected, str(choose_dtype(CPU)))


def test_a_processor_of_which_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert choose_dtype(CPU).dtype == "float32"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, is_=supported: is_
        )
        assert choose_dtype(torch.device("cuda")).dtype == dtype
    assert choose_dtype(torch.device("mps")).dtype == "float32"
