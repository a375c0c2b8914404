"""Run all checks and timings of the kernels on a GPU, in less than nine minutes.

    python benchmarks/gpu_report.py           # writes benchmarks/results/gpu-NAME.json, and .md
    python benchmarks/gpu_report.py --tiny    # a dry run on a CPU, in Triton's interpreter

The report contains the results of the kernels' tests, the error of each implementation against
float64, and the times of each operation, of the optimizer and of the whole training step of GPT-2
124M. The two ceilings, the memory bandwidth of a copy and the throughput of a large matrix product,
are measured in the same run. The measurements of different implementations are interleaved, and
their medians are compared. Every result is written to disk immediately, so that an interrupted run
keeps its results.
"""

import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_measure import COPY, PRODUCT, Bench, Report
from benchmarks.gpu_operations import check_operations, time_operations
from benchmarks.gpu_training import time_optimizers, time_training
from benchmarks.machine import version_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Options of the report."""

    out: Path | None = None
    """JSON file to write; a Markdown file of the same name is written to the same folder."""
    minutes: float = 8.5
    """Time limit. Measurements that would start later are skipped and listed in the report."""
    tests: bool = True
    """Run the kernels' tests first."""
    tiny: bool = False
    """Use small shapes and few rounds: to test this program, not to measure."""


def main(options: Options) -> None:
    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        sys.exit("no CUDA device is visible; use `--tiny` for a dry run on a CPU")
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").replace(" ", "-") if cuda else "none"
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{gpu.lower()}.json"
    report = Report(out, math.inf if options.tiny else time.monotonic() + 60 * options.minutes)
    bench = Bench(torch.device("cuda" if cuda else "cpu"), options.tiny)
    report.note("environment", environment())
    report.note("ceilings", ceilings(bench))
    if options.tests:
        report.note("tests", run_tests(min(150.0, report.seconds_left / 3)))
    for part in (check_operations, time_operations, time_optimizers, time_training):
        with report.skip_on_error(f"the rest of {part.__name__}"):
            part(report, bench)
        bench.free()
    print(report.markdown())


def environment() -> dict[str, Any]:
    """Return the versions of packages and the properties of the machine."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpu cores": os.cpu_count(),
    }
    for package in ("torch", "triton", "numpy", "liger-kernel", "fastgpt"):
        facts[package] = version_of(package) or "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory, GB": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        }
    return facts


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError as error:
        return str(error)
    return done.stdout.strip()


def ceilings(bench: Bench) -> dict[str, float]:
    """Measure the bandwidth of a copy (bytes read and written) and a large bf16 product."""
    count, size = (2**12, 64) if bench.tiny else (2**31, 8192)
    source = torch.empty(count, dtype=torch.int8, device=bench.device).random_()
    target = torch.empty_like(source)
    a, b = (
        torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )  # random values: with zeros, a GPU uses less power and runs faster
    times = bench.milliseconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {
        COPY: 2 * count / times["copy"] * 1e3,
        PRODUCT: 2 * size**3 / times["product"] * 1e3,
    }


def run_tests(seconds: float) -> dict[str, str]:
    """Run the kernels' tests in parallel processes and return the last line of each.

    Most of the time is spent in Triton's compiler. The tests of attention, which has the most
    kernels, are divided among three processes.
    """
    parts = {"attention": ("head_dims", "dropout", "not head_dims and not dropout")}
    files = [*sorted(ROOT.glob("tests/kernels/test_*.py")), ROOT / "tests/ops/test_triton.py"]
    running = {}
    for file in files:
        if file.stem == "test_compiled":
            continue  # does not need a GPU
        for part in parts.get(file.stem.removeprefix("test_"), ("",)):
            name = f"{file.relative_to(ROOT)} {part}".strip()
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", part],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    until, results = time.monotonic() + seconds, {}
    for name, process in running.items():
        results[name] = last_lines(process, until)
        print(name, results[name], flush=True)
    return results


def last_lines(process: "subprocess.Popen[str]", until: float) -> str:
    """Wait for pytest; return its summary line if all tests passed, else its last 25 lines."""
    try:
        output, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()  # the GPU must be free for the measurements
        return "\n".join(["timed out:", *output.strip().splitlines()[-25:]])
    return "\n".join(output.strip().splitlines()[-1 if not process.returncode else -25 :])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
