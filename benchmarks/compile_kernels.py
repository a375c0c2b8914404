r"""Compile all variants of all kernels ahead of time; this does not need a GPU.

    python benchmarks/compile_kernels.py                        # the common variants, as a table
    python benchmarks/compile_kernels.py --modules gelu --capabilities 90
    python benchmarks/compile_kernels.py --all \
        --out benchmarks/results/kernels-compiled.json \
        --markdown benchmarks/results/kernels-compiled.md       # all variants: half an hour

The statistics of the compiled code predict much of its speed: registers and shared memory limit the
number of blocks that a multiprocessor holds at once (the occupancy); spills cause memory traffic in
the innermost loop; a product without matrix instructions is an order of magnitude slower; and
matrix instructions of sm_90 that each wait for their own completion leave the matrix units idle in
between.
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

# Limits of a multiprocessor: threads, blocks and bytes of shared memory, by compute capability; and
# 32-bit registers (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
LIMITS = {
    80: (2048, 32, 164 * 1024),
    86: (1536, 16, 100 * 1024),
    89: (1536, 24, 100 * 1024),
    90: (2048, 32, 228 * 1024),
    100: (2048, 32, 228 * 1024),
    120: (1536, 24, 100 * 1024),
}
REGISTERS = 65_536
RESERVED_SHARED = 1024  # bytes that the system reserves for each block


@dataclass(frozen=True)
class Options:
    """Select the kernels to compile and the output."""

    modules: tuple[str, ...] = MODULES
    """Modules of kernels/."""
    capabilities: tuple[int, ...] = CAPABILITIES
    """Compute capabilities: 80 is an A100, 86 and 89 GeForce 30 and 40, 90 an H100 or H200, 100 a
    B200, 120 GeForce 50."""
    dtypes: tuple[str, ...] = ()
    """Only variants with a tensor of one of these: fp32, fp16, bf16, fp64 (default: all)."""
    all: bool = False
    """Compile all variants, not only the common ones."""
    out: Path | None = None
    """JSON file to write, one row per variant ("-": all details to standard output, no table)."""
    markdown: Path | None = None
    """Markdown file to write a table of the common variants to."""
    workers: int = os.cpu_count() or 1
    """Number of processes that compile."""


def main(options: Options) -> None:
    # Spawn the workers: forking a process that uses Triton's compiler is not safe.
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_case, cases(options)))
    if options.out == Path("-"):
        print(json.dumps({"triton": triton.__version__, "kernels": results}))
        return
    if options.out:
        options.out.write_text(rows_of_json(results), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
    Console(width=170).print(table(results))


def cases(options: Options) -> Iterator[dict[str, Any]]:
    """Yield each variant of each operation for each GPU, as plain data."""
    for module in options.modules:
        variants = importlib.import_module(f"fastgpt.kernels.{module}").variants
        for capability in options.capabilities:
            for variant in variants(capability):
                types = {kind.removeprefix("*") for kind in variant.signature.values()}
                if not (variant.common or options.all):
                    continue
                if not options.dtypes or types & set(options.dtypes):
                    yield asdict(variant) | {"name": module, "capability": capability}


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant; return its description and the statistics of the machine code."""
    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    # The launcher determines this at run time: addresses and most sizes are multiples of 16.
    unaligned = {*case["unaligned"], *(kernel.do_not_specialize or ())}
    aligned = {
        place[name]: [["tt.divisibility", 16]]
        for name, kind in case["signature"].items()
        if kind[0] in "*i" and name not in unaligned
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
    except Exception as error:  # any error of the compiler becomes a row of the table
        return describe(case) | {"error": f"{type(error).__name__}: {error}"}
    return describe(case) | measure(compiled, case["capability"])


def describe(case: dict[str, Any]) -> dict[str, Any]:
    kinds = dict.fromkeys(t[1:] for t in case["signature"].values() if t.startswith("*"))
    return {
        "module": case["name"],
        "kernel": case["kernel"],
        "capability": case["capability"],
        "dtypes": list(kinds),
        "constants": case["constants"],
        "options": case["options"],
        "matrix": case["matrix"],
        "common": case["common"],
    }


def measure(compiled: Any, capability: int) -> dict[str, Any]:
    """Return the resources that the machine code uses and the resulting occupancy."""
    usage = disassemble(compiled.asm["cubin"], "-res-usage")
    counts = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    sass = disassemble(compiled.asm["cubin"], "-sass")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.M)
    matrix = sorted({name for name in instructions if name.endswith("MMA")})
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return {
        "registers": counts["REG"],
        # registers are spilled to the thread's local memory
        "spilled_bytes": counts["STACK"] + counts["LOCAL"],
        "local_accesses": sum(name in ("LDL", "STL") for name in instructions),
        "shared_bytes": shared,
        "warps": warps,
        "occupancy": occupancy(counts["REG"], shared, warps, capability),
        "instructions": len(instructions),
        "matrix_instructions": {name: instructions.count(name) for name in matrix},
        # Instructions marked gsb0 signal their completion, and the code waits for them. Ideally
        # this is only the last instruction of a product.
        "waiting_matrix_instructions": len(re.findall(r"\bHGMMA\b.*\bgsb0\b", sass)),
        "load_bits": access_bits("ld", compiled.asm["ptx"]),
        "store_bits": access_bits("st", compiled.asm["ptx"]),
    }


def occupancy(registers: int, shared: int, warps: int, capability: int) -> float:
    """Return the fraction of a multiprocessor's threads that can be resident; 0 if none fits."""
    a_warp = -(-registers * 32 // 256) * 256  # a warp's registers are allocated in units of 256
    threads, blocks, shared_bytes = LIMITS[capability]
    fitting = min(
        blocks,
        threads // (32 * warps),
        REGISTERS // max(a_warp, 1) // warps,
        shared_bytes // (shared + RESERVED_SHARED),
    )
    return fitting * warps * 32 / threads


def disassemble(cubin: bytes, what: str) -> str:
    """Return the output of Triton's cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def access_bits(direction: str, ptx: str) -> dict[str, int]:
    """Count accesses to global memory by width in bits: ``ld.global.v4.b32`` is one of 128."""
    accesses = re.findall(rf"\b{direction}\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    widths = [int(vector or 1) * int(bits) for vector, bits in accesses]
    return {str(width): widths.count(width) for width in sorted(set(widths))}


def rows_of_json(results: list[dict[str, Any]]) -> str:
    """Return the results as JSON: the column names once, and one line per variant."""
    rows = [summary(result) for result in results]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [json.dumps([row.get(name) for name in columns]) for row in rows]
    head = f'{{"triton": "{triton.__version__}",\n"columns": {json.dumps(columns)},\n"rows": [\n'
    return head + ",\n".join(lines) + "\n]}\n"


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return a compact result: structured values as one string, access widths as [min, max]."""
    options = {k: v for k, v in result["options"].items() if k != "enable_fp_fusion"}
    constants = (result["constants"] | options).items()
    short = {
        "module": result["module"],
        "kernel": result["kernel"],
        "sm": result["capability"],
        "types": "/".join(result["dtypes"]),
        "constants": ", ".join(f"{name}={value}" for name, value in constants),
        "common": result["common"],
    }
    if "error" in result:
        return short | {"error": result["error"]}
    matrix = result["matrix_instructions"].items()
    for name in ("registers", "spilled_bytes", "local_accesses", "shared_bytes"):
        short[name] = result[name]
    short["occupancy"] = round(result["occupancy"], 4)
    short["matrix"] = ", ".join(f"{n} {name}" for name, n in matrix)
    short["waiting"] = result["waiting_matrix_instructions"]
    for name in ("load_bits", "store_bits"):
        widths = [int(width) for width in result[name]]
        short[name] = [min(widths, default=0), max(widths, default=0)]
    return short


SHOWN = {
    "kernel": "kernel",
    "sm": "sm",
    "types": "types",
    "constants": "constants",
    "registers": "registers",
    "spilled_bytes": "spilled",
    "shared_bytes": "shared",
    "occupancy": "occupancy",
    "matrix": "matrix instructions",
    "waiting": "waiting",
}


def cells(result: dict[str, Any]) -> list[str]:
    """Return the cells of a result in tables, in the order of SHOWN."""
    short = summary(result)
    if "error" in short:
        return [*(str(short[name]) for name in list(SHOWN)[:4]), short["error"][:60]]
    return [str(short[n]) if n != "occupancy" else f"{short[n]:.0%}" for n in SHOWN]


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(*SHOWN.values())
    for result in results:
        shown.add_row(*cells(result), style="red" if "error" in result else None)
    return shown


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the common variants as Markdown, one table per module."""
    lines = [
        "# Compiled kernels",
        "",
        f"Statistics of the common variants with Triton {triton.__version__}, generated by",
        "`benchmarks/compile_kernels.py`; the JSON file of the same name has more details.",
        "Registers are per thread, shared memory is per block, in bytes. The occupancy is the",
        "fraction of a multiprocessor's threads that can be resident. `waiting` is the number of",
        "matrix instructions that wait for their own completion.",
    ]
    for module in dict.fromkeys(result["module"] for result in results):
        lines += ["", f"## {module}", "", "| " + " | ".join(SHOWN.values()) + " |"]
        lines += ["|" + " --- |" * len(SHOWN)]
        for result in results:
            if result["module"] == module and result["common"]:
                lines.append("| " + " | ".join(cells(result)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    main(tyro.cli(Options, description=__doc__))
