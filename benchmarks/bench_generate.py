"""Benchmark generation on a CPU against other engines: decoding and prefill, in tokens per second.

    python -m benchmarks.bench_generate                      shape of GPT-2 124M, random weights
    python -m benchmarks.peer_models FOLDER                  the same model for other engines
    python -m benchmarks.bench_generate --peers FOLDER       includes these engines

All engines are loaded into one process and measured in turns, so that all of them are affected by
the same noise. The output is the median of the rounds and the speedup over the best other engine. A
round measures decoding (a prompt of 32 tokens, then `--new` tokens, of which the first is not
counted) with 1, 8 and 32 rows, and the prefill of a prompt of 512 tokens. See
`generation_peers.py` for the engines and their settings.
"""

import gc
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.common import interleaved, markdown_table
from benchmarks.generation_peers import (
    LONG_PROMPT,
    PRECISIONS,
    PROMPT,
    GenerationEngine,
    load_engines,
    random_gpt2,
)
from benchmarks.machine import processor, version_of
from fastgpt.inference.engine import Dtype

# whose versions are reported
PACKAGES = ("torch", "transformers", "llama-cpp-python", "ctranslate2", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    peers: Path | None = None
    """Output folder of `benchmarks.peer_models` (default: skip the engines that need files)."""
    precisions: tuple[Dtype, ...] = PRECISIONS
    """Precisions of the weights."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads."""
    rounds: int = 5
    """Rounds of each case, after a warm-up."""
    new: int = 128
    """Tokens to generate with one row, at least 2; an eighth of it with several rows."""
    rows: tuple[int, ...] = (1, 8, 32)
    """Numbers of texts that are generated at once."""
    results: Path | None = None
    """Write NAME.json and NAME.md."""


def main(options: Options) -> None:
    """Run the benchmark and print the results."""
    if options.new < 2:
        sys.exit("--new must be at least 2: the first token is not counted")
    model = random_gpt2()
    results: list[Result] = []
    for precision in options.precisions:
        for threads in options.threads:
            engines = load_engines(model, precision, threads, options.peers)
            results += measure(precision, threads, engines, options)
            engines.clear()
            gc.collect()  # free the engines before the next ones are loaded
    if options.results is not None:
        write_results(results, options)


@dataclass(frozen=True)
class Result:
    """Median tokens per second of each engine in one case, summed over all rows."""

    precision: str
    threads: int
    case: str
    speeds: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """Return the speedup of fastgpt's engine over the best other engine."""
        others = [speed for name, speed in self.speeds.items() if name != "fastgpt"]
        return self.speeds["fastgpt"] / max(others) if others else None


def measure(
    precision: str, threads: int, engines: dict[str, GenerationEngine], options: Options
) -> list[Result]:
    """Measure all cases of a precision and a number of threads, and print them."""
    cases: list[tuple[str, int, Callable[[GenerationEngine], float]]] = []
    for rows in options.rows:
        new = options.new if rows == 1 else max(options.new // 8, 2)
        prompts = torch.randint(50257, (rows, PROMPT))
        name = f"decode {rows}"
        cases.append((name, rows * (new - 1), methodcaller("decode", prompts, new)))
    text = torch.randint(50257, (1, LONG_PROMPT))
    cases.append((f"read {LONG_PROMPT}", LONG_PROMPT, methodcaller("read", text)))
    results = []
    for name, tokens, work in cases:
        timed = {engine_name: partial(work, engine) for engine_name, engine in engines.items()}
        times = interleaved(timed, options.rounds, warm_up=1)
        speeds = {engine: median(tokens / t for t in taken) for engine, taken in times.items()}
        result = Result(precision, threads, name, speeds)
        ratio = f"  speedup over the best other: {result.ratio:.2f}" if result.ratio else ""
        line = ", ".join(f"{engine} {speed:.0f}" for engine, speed in speeds.items())
        print(f"{precision:8} {threads} threads  {name:10} {line}{ratio}", flush=True)
        results.append(result)
    return results


def write_results(results: list[Result], options: Options) -> None:
    """Write the results, the machine and the package versions as JSON and as a table."""
    about = {
        "cpu": processor(),
        "versions": {name: found for name in PACKAGES if (found := version_of(name))},
        "rounds": options.rounds,
        "new tokens": options.new,
    }
    content = {**about, "results": [asdict(r) | {"ratio": r.ratio} for r in results]}
    options.results.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rows = []
    for r in results:
        speeds = {name: f"{speed:.0f}" for name, speed in r.speeds.items()}
        ours = speeds.pop("fastgpt")
        others = ", ".join(f"{name} {speed}" for name, speed in speeds.items())
        ratio = f"{r.ratio:.2f}" if r.ratio else ""
        rows.append([r.precision, r.threads, r.case, ours, others, ratio])
    header = ["precision", "threads", "task", "fastgpt", "others", "speedup over the best other"]
    lines = [
        "# Generation on a CPU",
        "",
        f"`python {shlex.join(sys.orig_argv[1:])}`",
        "",
        "Tokens per second, summed over all rows: medians of "
        f"{options.rounds} interleaved rounds. {about['cpu']}; {versions}.",
        "",
        *markdown_table(header, rows),
    ]
    options.results.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
