"""Every kernel compiles for the GPUs that matter, without spills and with wide memory accesses.

Triton's interpreter accepts what a GPU refuses; this part needs no GPU to find that out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastgpt.kernels import gelu

ROOT = Path(__file__).parents[2]
COMPUTE_CAPABILITIES = (80, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
MAX_REGISTERS = 48  # two thirds of the threads that fit a multiprocessor can be resident
KERNELS = {
    "_gelu_forward": (gelu, ["x_ptr", "y_ptr"]),
    "_gelu_backward": (gelu, ["grad_ptr", "x_ptr", "grad_x_ptr"]),
}
CASES = {
    f"{kernel}-{dtype}-sm_{compute_capability}": {
        "module": module.__name__,
        "kernel": kernel,
        "signature": dict.fromkeys(pointers, f"*{dtype}") | {"n_elements": "i64"},
        "constants": {"BLOCK": module.BLOCK},
        "options": module.OPTIONS,
        "compute_capability": compute_capability,
    }
    for kernel, (module, pointers) in KERNELS.items()
    for dtype in DTYPES
    for compute_capability in COMPUTE_CAPABILITIES
}


@pytest.fixture(scope="module")
def compiled():
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]  # this checkout's kernels
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_ahead.py")],
        input=json.dumps(list(CASES.values())),
        env=environ | {"PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills_into_wide_accesses(compiled, case):
    result = compiled[case]
    assert result["stack"] == 0
    assert result["registers"] <= MAX_REGISTERS
    for bits in (*result["load_bits"], *result["store_bits"]):
        assert bits >= 128
    assert len(result["load_bits"]) >= len(CASES[case]["signature"]) - 2  # all but the output and n
    assert result["store_bits"]
