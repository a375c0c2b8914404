"""Generation on a CPU: tokens per second of decoding and of reading prompts, beside others'.

    python -m benchmarks.bench_generate                      GPT-2 124M's shape, random weights
    python -m benchmarks.peer_models FOLDER                  the same model for other engines
    python -m benchmarks.bench_generate --peers FOLDER       these, too

One process; every contender is loaded, then measured in turns, so that all see the same machine,
and the medians of the rounds are printed with their ratio to the best other. What a round measures:
decoding (a prompt of 32, then `--new` tokens, the first not counted) with 1, 8 and 32 rows, and
reading a prompt of 512 tokens. The contenders, and how each is set up: `generation_peers.py`.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    options = parser.parse_args()
    model = random_gpt2()
    for precision in options.precisions:
        for threads in options.threads:
            found = contenders(model, precision, threads, options.peers)
            _report(precision, threads, found, options)
            found.clear()
            gc.collect()  # before the next ones are loaded


def _report(
    precision: str, threads: int, found: dict[str, Contender], options: argparse.Namespace
) -> None:
    cases: list[tuple[str, int, Callable[[Contender], float]]] = []
    for rows in options.rows:
        new = options.new if rows == 1 else max(options.new // 8, 2)
        ids = torch.randint(50257, (rows, PROMPT))
        cases.append((f"decode {rows}", rows * (new - 1), _decoding(ids, new)))
    text = torch.randint(50257, (1, LONG_PROMPT))
    cases.append((f"read {LONG_PROMPT}", LONG_PROMPT, lambda c: c.read(text)))
    for name, tokens, measure in cases:
        speeds: dict[str, list[float]] = {contender: [] for contender in found}
        for turn in range(options.rounds + 1):
            for contender, it in found.items():
                taken = measure(it)
                if turn > 0:  # the first warms up
                    speeds[contender].append(tokens / taken)
        medians = {contender: statistics.median(rates) for contender, rates in speeds.items()}
        best = max((m for contender, m in medians.items() if contender != "fastgpt"), default=0.0)
        ratio = f"  {medians['fastgpt'] / best:.2f} times the best other" if best else ""
        line = ", ".join(f"{contender} {median:.0f}" for contender, median in medians.items())
        print(f"{precision:8} {threads} threads  {name:10} {line}{ratio}", flush=True)


def _decoding(ids: Tensor, new: int) -> Callable[[Contender], float]:
    return lambda contender: contender.decode(ids, new)


if __name__ == "__main__":
    main()
