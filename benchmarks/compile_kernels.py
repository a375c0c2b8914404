"""Compile every kernel in every form that can be launched, for GPUs that need not be there.

    python benchmarks/compile_kernels.py                                  # all of it, as a table
    python benchmarks/compile_kernels.py --modules gelu --capabilities 90
    python benchmarks/compile_kernels.py --out benchmarks/results/kernels-compiled.json

What comes out says much about speed: registers and shared memory bound how many blocks a
multiprocessor holds at once (the occupancy), a spill costs memory traffic in the innermost loop,
and a product without matrix instructions is an order of magnitude slow.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
import tyro
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (
    "attention",
    "cached_attention",
    "layer_norm",
    "gelu",
    "column_sum",
    "cross_entropy",
    "adamw",
)
CAPABILITIES = (80, 90, 100)

# What a multiprocessor has: 32-bit registers, bytes of shared memory, threads, blocks
# (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS, THREADS, BLOCKS = 65_536, 2048, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED = 1024  # by the system, for each block


@dataclass(frozen=True)
class Options:
    """What to compile, and where to write what came out."""

    modules: tuple[str, ...] = MODULES
    """Files of kernels/."""
    capabilities: tuple[int, ...] = CAPABILITIES
    """Compute capabilities: 80 is an A100, 90 an H100 or H200, 100 a B200."""
    dtypes: tuple[str, ...] = ()
    """Only variants with a tensor of one of these (fp32, fp16, bf16, fp64); all unless given."""
    out: Path | None = None
    """Write JSON here ("-": to standard output, and no table)."""
    workers: int = os.cpu_count() or 1
    """Processes that compile."""


def main(options: Options) -> None:
    # a fresh interpreter each: Triton may not be forked while it compiles
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_case, cases(options), chunksize=4))
    text = json.dumps({"triton": triton.__version__, "kernels": results}, indent=1)
    if options.out == Path("-"):
        print(text)
        return
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    Console(width=160).print(table(results))


def cases(options: Options) -> Iterator[dict[str, Any]]:
    """Yield each variant of each module for each GPU, as plain data."""
    for module in options.modules:
        variants = importlib.import_module(f"fastgpt.kernels.{module}").variants
        for capability in options.capabilities:
            for variant in variants(capability):
                types = {kind.removeprefix("*") for kind in variant.signature.values()}
                if not options.dtypes or types & set(options.dtypes):
                    yield {"module": module, "capability": capability} | asdict(variant)


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant; the result says what it is and what the machine code uses."""
    kernel = getattr(importlib.import_module(f"fastgpt.kernels.{case['module']}"), case["kernel"])
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    # What the launcher finds out at run time: addresses and most sizes are multiples of 16.
    aligned = {
        place[name]: [["tt.divisibility", 16]]
        for name, kind in case["signature"].items()
        if kind[0] in "*i" and name not in case["unaligned"]
    }
    try:
        compiled = triton.compile(
            ASTSource(
                kernel,
                case["signature"] | dict.fromkeys(case["constants"], "constexpr"),
                {place[name]: value for name, value in case["constants"].items()},
                aligned,
            ),
            target=GPUTarget("cuda", case["capability"], 32),
            options=case["options"],
        )
    except Exception as error:  # whatever a compiler may raise: the table is to name the variant
        return describe(case) | {"error": f"{type(error).__name__}: {error}"}
    return describe(case) | measure(compiled, case["capability"])


def describe(case: dict[str, Any]) -> dict[str, Any]:
    kinds = dict.fromkeys(t[1:] for t in case["signature"].values() if t.startswith("*"))
    return {
        "module": case["module"],
        "kernel": case["kernel"],
        "capability": case["capability"],
        "dtypes": list(kinds),
        "constants": case["constants"],
        "options": case["options"],
        "matrix": case["matrix"],
    }


def measure(compiled: Any, capability: int) -> dict[str, Any]:
    """Return what the machine code uses and the occupancy that this allows."""
    usage = disassemble(compiled.asm["cubin"], "-res-usage")
    counts = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    sass = disassemble(compiled.asm["cubin"], "-sass")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.M)
    matrix = sorted({name for name in instructions if name.endswith("MMA")})
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return {
        "registers": counts["REG"],
        # where registers spill to: memory of the thread's own
        "spilled_bytes": counts["STACK"] + counts["LOCAL"],
        "local_accesses": sum(name in ("LDL", "STL") for name in instructions),
        "shared_bytes": shared,
        "warps": warps,
        "occupancy": occupancy(counts["REG"], shared, warps, capability),
        "instructions": len(instructions),
        "matrix_instructions": {name: instructions.count(name) for name in matrix},
        "load_bits": access_bits("ld", compiled.asm["ptx"]),
        "store_bits": access_bits("st", compiled.asm["ptx"]),
    }


def occupancy(registers: int, shared: int, warps: int, capability: int) -> float:
    """Return the share of a multiprocessor's threads that can be resident: 0 if none fits."""
    a_warp = -(-registers * 32 // 256) * 256  # registers are handed out 256 at a time to a warp
    fitting = min(
        BLOCKS,
        THREADS // (32 * warps),
        REGISTERS // max(a_warp, 1) // warps,
        SHARED[capability] // (shared + RESERVED_SHARED),
    )
    return fitting * warps * 32 / THREADS


def disassemble(cubin: bytes, what: str) -> str:
    """Ask the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def access_bits(direction: str, ptx: str) -> list[int]:
    """Return how wide each access to global memory is: ``ld.global.v4.b32`` counts 128."""
    accesses = re.findall(rf"\b{direction}\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    return [int(vector or 1) * int(bits) for vector, bits in accesses]


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(
        "kernel", "sm", "types", "constants", "registers", "spilled", "shared", "occupancy"
    )
    shown.add_column("matrix instructions")
    for result in results:
        constants = ", ".join(
            f"{k}={v}" for k, v in (result["constants"] | result["options"]).items()
        )
        row = [result["kernel"], str(result["capability"]), "/".join(result["dtypes"]), constants]
        if "error" in result:
            shown.add_row(*row, "[red]" + result["error"][:60])
            continue
        numbers = (result[name] for name in ("registers", "spilled_bytes", "shared_bytes"))
        matrix = ", ".join(f"{n} {name}" for name, n in result["matrix_instructions"].items())
        shown.add_row(*row, *map(str, numbers), f"{result['occupancy']:.0%}", matrix)
    return shown


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the interpreter leaves nothing to compile; unset it")
    main(tyro.cli(Options, description=__doc__))
