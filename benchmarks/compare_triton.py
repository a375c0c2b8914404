r"""Compile the kernels with every supported Triton and show the results side by side.

    python benchmarks/compare_triton.py                      # the common forms for sm_90
    python benchmarks/compare_triton.py --all --capabilities 80 90 100 \
        --markdown benchmarks/results/kernels-by-triton.md   # all of them: half an hour

Each Triton is installed by pip into a folder of its own, so the environment stays as it is. The
versions are those of `[tool.fastgpt.tested]` in pyproject.toml unless given.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).resolve().parents[1]
Results = dict[str, list[dict[str, Any]]]  # by Triton version: what compile_kernels.py reports


@dataclass(frozen=True)
class Options:
    """What to compile, and where to write the comparison."""

    versions: tuple[str, ...] = ()
    """Releases of Triton; all tested ones unless given."""
    modules: tuple[str, ...] = ()
    """Files of kernels/; all unless given."""
    capabilities: tuple[int, ...] = (90,)
    """Compute capabilities: 90 is an H100 or H200."""
    all: bool = False
    """Every variant, not only the common ones."""
    markdown: Path | None = None
    """Write the comparison here."""
    folder: Path | None = None
    """Keep the installed Tritons here and use those that are there (default: a temporary one)."""


def main(options: Options) -> None:
    versions = options.versions or tested_versions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = {v: compile_with(install(v, folder), options) for v in versions}
    page = markdown(results)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    Console(width=150).print(Markdown(page))
    if any(faults(rows) for rows in results.values()):
        sys.exit("some kernels do not compile or spill registers")


def tested_versions() -> tuple[str, ...]:
    """Return the Tritons of the supported releases of torch, oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return tuple(dict.fromkeys(project["tool"]["fastgpt"]["tested"]["torch"].values()))


def install(version: str, folder: Path) -> Path:
    """Return the folder that holds a Triton, installed if it is not there."""
    target = folder / f"triton-{version}"
    if not (target / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", target, f"triton=={version}"], check=True)
    return target


def compile_with(target: Path, options: Options) -> list[dict[str, Any]]:
    """Return what `compile_kernels.py` reports with the Triton of a folder."""
    command = [sys.executable, ROOT / "benchmarks" / "compile_kernels.py", "--out", "-"]
    command += ["--capabilities", *map(str, options.capabilities)]
    command += ["--modules", *options.modules] if options.modules else []
    command += ["--all"] if options.all else []
    path = os.pathsep.join([str(target), str(ROOT)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)["kernels"]


def markdown(results: Results) -> str:
    """Return a summary of each Triton, and the registers of each sm_90 form side by side."""
    lines = [
        "# The kernels with each supported Triton",
        "",
        "Written by `benchmarks/compare_triton.py`. A form is a kernel with dtypes, block sizes",
        "and options, as it is launched on one GPU. Local accesses are those of spilled registers.",
        "",
        "| Triton | forms | not compiled | spilled bytes | local accesses |",
        "| --- | --- | --- | --- | --- |",
    ]
    for version, rows in results.items():
        errors = sum("error" in row for row in rows)
        sums = [
            sum(row.get(name, 0) for row in rows) for name in ("spilled_bytes", "local_accesses")
        ]
        lines.append(f"| {version} | {len(rows)} | {errors} | {sums[0]} | {sums[1]} |")
    lines += [
        "",
        "## Registers of the common forms on sm_90",
        "",
        "Registers of a thread; in brackets how many of the accesses to global memory in the code",
        "are narrower than 128 bits: values of which a row has one, such as its mean, and all",
        "accesses in the forms for widths that are not multiples of 16.",
    ]
    for module in dict.fromkeys(row["module"] for rows in results.values() for row in rows):
        lines += ["", f"### {module}", "", "| form | " + " | ".join(results) + " |"]
        lines += ["| --- |" + " --- |" * len(results)]
        forms = {
            v: {form(row): row for row in rows if is_shown(row, module)}
            for v, rows in results.items()
        }
        for name in dict.fromkeys(name for rows in forms.values() for name in rows):
            cells = [cell(rows.get(name)) for rows in forms.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def is_shown(row: dict[str, Any], module: str) -> bool:
    return row["module"] == module and row["capability"] == 90 and row["common"]


def form(row: dict[str, Any]) -> str:
    """Name a form, the same for each Triton."""
    options = {k: v for k, v in row["options"].items() if k != "enable_fp_fusion"}
    values = {k: v for k, v in row["constants"].items() if v is not None and v is not False}
    settings = ", ".join(f"{name}={value}" for name, value in (values | options).items())
    left_out = [k.removesuffix("_ptr") for k, v in row["constants"].items() if v is None]
    without = f", without {', '.join(left_out)}" if left_out else ""
    return f"`{row['kernel']}` {'/'.join(row['dtypes'])}, {settings}{without}"


def cell(row: dict[str, Any] | None) -> str:
    """Return registers, and how many of all accesses are narrow."""
    if row is None or "error" in row:
        return "-" if row is None else "error"
    widths = Counter(row["load_bits"]) + Counter(row["store_bits"])
    return f"{row['registers']} ({widths.total() - widths['128']} of {widths.total()})"


def faults(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the forms that do not compile or spill registers."""
    return [r for r in rows if "error" in r or r["spilled_bytes"] or r["local_accesses"]]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
