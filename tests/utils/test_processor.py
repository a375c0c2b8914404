"""Tests of reading processor features from /proc/cpuinfo."""

from pathlib import Path

import pytest

from fastgpt.utils import processor


@pytest.mark.parametrize(
    ("cpuinfo", "units"),
    [
        ("flags\t\t: fpu avx2 fma", None),
        ("flags : avx512f avx512_bf16", "AVX512-BF16"),
        ("flags : avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("Features\t: fp asimd bf16 i8mm", "Arm's bfloat16"),
        ("model name : bf16 amx_bf16\nflags : sse2", None),
        ("bugs : bf16\n\nsomething", None),
    ],
)
def test_bfloat16_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str, units: str | None
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo + "\n")
    monkeypatch.setattr(processor, "CPUINFO", path)
    assert processor.bfloat16_units() == units


def test_a_processor_of_which_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert processor.bfloat16_units() is None
    assert processor.processor_name()


def test_the_name_of_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name\t: A: B\n\nprocessor : 1\nmodel name\t: A: B\n")
    monkeypatch.setattr(processor, "CPUINFO", path)
    assert processor.processor_name() == "A: B"
