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

import argparse
import gc
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.generation_peers import (
    LONG_PROMPT,
    PRECISIONS,
    PROMPT,
    Contender,
    contenders,
    random_gpt2,
)
from benchmarks.machine import processor, version_of

PACKAGES = (
    *("torch", "transformers", "llama-cpp-python"),
    *("ctranslate2", "onnxruntime", "openvino"),
)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--results", type=Path, metavar="NAME", help="write NAME.json and NAME.md")
    options = parser.parse_args()
    if options.new < 2:
        parser.error("--new must be at least 2: the first token is not counted")
    model = random_gpt2()
    results: list[Result] = []
    for precision in options.precisions:
        for threads in options.threads:
            found = contenders(model, precision, threads, options.peers)
            results += _measure(precision, threads, found, options)
            found.clear()
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


def write_results(results: list[Result], options: argparse.Namespace) -> None:
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
    lines = [
        "# Generation on a CPU",
        "",
        f"`python {shlex.join(sys.orig_argv[1:])}`",
        "",
        "Tokens per second, summed over all rows: medians of "
        f"{options.rounds} interleaved rounds. {about['cpu']}; {versions}.",
        "",
        "| precision | threads | task | fastgpt | others | speedup over the best other |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        others = ", ".join(f"{name} {s:.0f}" for name, s in r.speeds.items() if name != "fastgpt")
        ratio = f"{r.ratio:.2f}" if r.ratio else ""
        ours = f"{r.speeds['fastgpt']:.0f}"
        lines.append(f"| {r.precision} | {r.threads} | {r.case} | {ours} | {others} | {ratio} |")
    options.results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _measure(
    precision: str, threads: int, found: dict[str, Contender], options: argparse.Namespace
) -> list[Result]:
    cases: list[tuple[str, int, Callable[[Contender], float]]] = []
    for rows in options.rows:
        new = options.new if rows == 1 else max(options.new // 8, 2)
        ids = torch.randint(50257, (rows, PROMPT))
        cases.append((f"decode {rows}", rows * (new - 1), _decoding(ids, new)))
    text = torch.randint(50257, (1, LONG_PROMPT))
    cases.append((f"read {LONG_PROMPT}", LONG_PROMPT, lambda c: c.read(text)))
    results = []
    for name, tokens, measure in cases:
        speeds: dict[str, list[float]] = {contender: [] for contender in found}
        for turn in range(options.rounds + 1):
            for contender, it in found.items():
                taken = measure(it)
                if turn > 0:  # the first round is a warm-up
                    speeds[contender].append(tokens / taken)
        medians = {contender: statistics.median(rates) for contender, rates in speeds.items()}
        result = Result(precision, threads, name, medians)
        ratio = f"  speedup over the best other: {result.ratio:.2f}" if result.ratio else ""
        line = ", ".join(f"{contender} {median:.0f}" for contender, median in medians.items())
        print(f"{precision:8} {threads} threads  {name:10} {line}{ratio}", flush=True)
        results.append(result)
    return results


def _decoding(ids: Tensor, new: int) -> Callable[[Contender], float]:
    return lambda contender: contender.decode(ids, new)


if __name__ == "__main__":
    main()
