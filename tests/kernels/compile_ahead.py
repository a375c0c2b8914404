"""Compile kernels for GPUs that need not be there, and print what came out.

Reads a JSON list of cases on standard input and writes a list of results. A program of its own,
because Triton's interpreter, once switched on, leaves no real `@triton.jit` function in a process.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    signature = case["signature"] | dict.fromkeys(case["constants"], "constexpr")
    constants = {(kernel.arg_names.index(name),): v for name, v in case["constants"].items()}
    # What the launcher finds out at run time: addresses and sizes are multiples of 16, as usual.
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in case["signature"]}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", case["compute_capability"], 32),
        options=case["options"],
    )
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],  # where registers spill to
        "load_bits": access_bits("ld", compiled.asm["ptx"]),
        "store_bits": access_bits("st", compiled.asm["ptx"]),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Ask the cuobjdump that comes with Triton what the machine code uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def access_bits(direction: str, ptx: str) -> list[int]:
    """Return how wide each access to global memory is: ``ld.global.v4.b32`` counts 128."""
    accesses = re.findall(rf"\b{direction}\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    return [int(vector or 1) * int(bits) for vector, bits in accesses]


if __name__ == "__main__":
    json.dump([compile_case(case) for case in json.load(sys.stdin)], sys.stdout)
