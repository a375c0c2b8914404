"""Every kernel compiles for sm_80, sm_90 and sm_100: common variants, and all in slow tests.

Triton's interpreter accepts code that does not compile for a GPU; these tests detect this without
a GPU. No variant may spill registers, and matrix products must use matrix instructions.
"""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from fastgpt.kernels import gelu, layer_norm
from fastgpt.kernels.common import DTYPES

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels").glob("*/__init__.py")]
MODULES = sorted({path.stem.replace("__init__", path.parent.name) for path in FILES} - {"common"})
# Shared memory limit of a block on sm_86, sm_89 and sm_120, which use the variants of sm_80.
SHARED_BYTES = 101_376
MATRIX_INSTRUCTIONS = {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA", "HMMA"}}


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return the results of a module; all modules that the selected tests use compile together."""
    module, *options = request.param
    wanted = {item.callspec.params["compiled"] for item in request.session.items if is_one(item)}
    modules = sorted(name for name, *others in wanted if others == options)
    results = compile_kernels(tuple(modules), *options)
    return [result for result in results if result["module"] == module]


def is_one(item: Any) -> bool:
    """Return whether a collected test uses the fixture `compiled`."""
    return hasattr(item, "callspec") and "compiled" in item.callspec.params


@functools.cache
def compile_kernels(
    modules: tuple[str, ...], capability: int, *options: str
) -> list[dict[str, Any]]:
    """Return the results of `benchmarks/compile_kernels.py`.

    It runs in a separate process: in a process with the interpreter enabled, `@triton.jit` does not
    create functions that can be compiled.
    """
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]  # the kernels of this checkout
    command = [sys.executable, ROOT / "benchmarks" / "compile_kernels.py", "--out", "-"]
    done = subprocess.run(
        [*command, "--modules", *modules, "--capabilities", str(capability), *options],
        env=environ | {"PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)["kernels"]


# By default the common variants for one GPU; the others take minutes.
CASES = [(module, 90) for module in MODULES]
SLOW_CASES = [(module, 90, "--all") for module in MODULES]
SLOW_CASES += [(module, capability) for module in MODULES for capability in (80, 100)]


@pytest.mark.parametrize(
    "compiled",
    CASES + [pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES],
    indirect=True,
    ids=lambda case: "-".join(map(str, case)).replace("--all", "every-form"),
)
def test_compiles_without_spills_to_the_expected_instructions(compiled: list[Any]) -> None:
    assert compiled
    wrong = {fault for result in compiled for fault in faults(result)}
    assert not wrong, "\n".join(sorted(wrong))


def faults(result: dict[str, Any]) -> list[str]:
    """Return descriptions of the defects of a compiled variant."""
    name = f"{result['kernel']} {result['dtypes']} {result['constants']} {result['options']}"
    if "error" in result:
        return [f"{name}: {result['error']}"]
    found = []
    if result["spilled_bytes"] or result["local_accesses"]:
        found.append(f"{name}: spills {result['spilled_bytes']} bytes")
    if not result["occupancy"]:
        found.append(f"{name}: no block fits on a multiprocessor")
    if result["capability"] == 80 and result["shared_bytes"] > SHARED_BYTES:
        found.append(f"{name}: {result['shared_bytes']} bytes of shared memory")
    expected = MATRIX_INSTRUCTIONS[result["capability"]]
    if result["matrix"] and is_half(result) and not expected & set(result["matrix_instructions"]):
        found.append(f"{name}: none of {expected}, only {result['matrix_instructions']}")
    if not result["store_bits"]:
        found.append(f"{name}: stores nothing")
    return found


def is_half(result: dict[str, Any]) -> bool:
    return bool({"fp16", "bf16"} & set(result["dtypes"]))


@pytest.mark.parametrize("compiled", [("gelu", 90)], indirect=True, ids=["gelu"])
def test_gelu_moves_128_bits_at_a_time_at_full_occupancy(compiled: list[Any]) -> None:
    flat = [result for result in compiled if "BLOCK" in result["constants"]]
    assert {result["dtypes"][0] for result in flat} == set(DTYPES.values())
    for result in flat:
        assert {*result["load_bits"], *result["store_bits"]} == {"128"}
        if result["dtypes"] != ["fp64"]:
            assert result["occupancy"] >= 0.75


@pytest.mark.parametrize(
    "compiled", [("gelu", 90), ("layer_norm", 90)], indirect=True, ids=["gelu", "layer_norm"]
)
def test_rows_are_moved_128_bits_at_a_time(compiled: list[Any]) -> None:
    by_rows = [result for result in compiled if "ROWS" in result["constants"]]
    odd = [result for result in by_rows if "16" in result["load_bits"]]
    assert len(odd) == 2  # forward and backward of a width that is not a multiple of 16
    for result in (result for result in by_rows if result not in odd):
        widths = Counter(result["load_bits"]) + Counter(result["store_bits"])
        # Narrow accesses: one per column (bias, column sums) or per row (mean, 1 / std).
        assert widths.total() - widths["128"] <= 2
        assert widths["128"] >= 2


@pytest.mark.parametrize("compiled", [("attention", 90)], indirect=True, ids=["attention"])
def test_attention_moves_rows_128_bits_at_a_time(compiled: list[Any]) -> None:
    halves = [result for result in compiled if is_half(result)]
    assert halves
    for result in halves:
        widths = Counter(result["load_bits"]) + Counter(result["store_bits"])
        # Narrow accesses: two statistics of the softmax per row, loaded and stored; the seed.
        assert widths.total() - widths["128"] <= 4, result
        assert widths["128"] >= 3


@pytest.mark.parametrize("compiled", [("gelu", 90)], indirect=True, ids=["gelu"])
def test_programs_of_gelu_with_a_bias_run_all_at_once(compiled: list[Any]) -> None:
    by_rows = [result for result in compiled if "ROWS" in result["constants"]]
    assert by_rows
    for result in by_rows:
        if result["dtypes"] != ["fp64"]:
            assert result["occupancy"] * 64 // result["warps"] >= gelu.FORWARD.programs_per_sm


@pytest.mark.parametrize("compiled", [("layer_norm", 90)], indirect=True, ids=["layer_norm"])
def test_programs_of_the_layer_norm_backward_run_all_at_once(compiled: list[Any]) -> None:
    backward = [result for result in compiled if result["kernel"] == "_layer_norm_backward"]
    assert {"bf16", "fp32"} <= {dtype for result in backward for dtype in result["dtypes"]}
    for result in backward:
        block = result["constants"]["BLOCK"]
        configs = (
            layer_norm.backward_config(width, n_bytes, 90)
            for width, n_bytes in product((block, block - 1), (2, 4, 8))
        )
        (programs,) = {  # of the configuration with which this variant is launched
            config.programs_per_sm
            for config in configs
            if config.options == result["options"]
            and config.constants.items() <= result["constants"].items()
        }
        assert result["occupancy"] * 64 // result["warps"] >= programs >= 1


@pytest.mark.parametrize(
    "compiled",
    [("attention", 90), pytest.param(("attention", 90, "--all"), marks=pytest.mark.slow)],
    indirect=True,
    ids=["common", "every-form"],
)
def test_matrix_instructions_of_attention_overlap(compiled: list[Any]) -> None:
    """The code waits only for the last instruction of a product.

    If a product is unfinished at the end of an iteration, as with three stages over keys, ptxas
    serializes all instructions. Configurations with three stages are exempt: they were measured to
    be faster nevertheless.
    """
    products = {  # number of loops × products in each loop
        "attention_forward": 2 * 2,
        "attention_backward_q": 2 * 3,
        "attention_backward_kv": 3 * 4,  # the fifth product is not an HGMMA
    }
    halves = [result for result in compiled if result["matrix"] and is_half(result)]
    assert {result["kernel"] for result in halves} == products.keys()
    for result in halves:
        if result["options"]["num_stages"] < 3:
            assert result["waiting_matrix_instructions"] <= products[result["kernel"]], result
