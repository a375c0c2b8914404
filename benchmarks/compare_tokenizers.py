"""Compare fastgpt's tokenizer with others: ``python benchmarks/compare_tokenizers.py``.

On a machine whose speed drifts, only interleaved runs are comparable. Each round creates every
tokenizer anew, one after the other, and measures the encoding of a text, cold and then warm, and
its decoding. Results are medians over the rounds, and a speedup is the median of the ratios within
the rounds. The ids are compared before timing. The texts are those of tokenizer_peers.texts() or
the given files.
"""

import gc
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import tokenizer_peers as peers
from benchmarks.common import interleaved, markdown_table, ratios, seconds
from benchmarks.machine import processor, version_of

LONG_RUNS = {
    "letters (a)": "a", "spaces": " ", "digits (7)": "7", "newlines": "\n", "=": "=", "!?": "!?",
    "emoji": "😀", "CJK characters": "漢字",
}  # fmt: skip
LONG_RUN_CHARACTERS = 1_000_000
TWO_THREAD_BYTES = 50_000_000


@dataclass(frozen=True)
class Options:
    """Compare tokenizers."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """UTF-8 texts (default: prose, code and many scripts)."""
    rounds: int = 11
    """Rounds of each text."""
    out: Path | None = None
    """JSON file to write the results to."""


def main(options: Options) -> None:
    """Run the comparison, print a table, and write the results."""
    texts = {path.stem: path.read_text("utf-8") for path in options.files}
    texts = texts or {name: read() for name, read in peers.texts().items()}
    rivals = [peer for peer in (peers.tiktoken, peers.gigatoken) if installed(peer)]
    result = {
        "machine": machine(),
        "rounds": options.rounds,
        "texts": {name: compare(text, rivals, options.rounds) for name, text in texts.items()},
        "two threads": two_threads(next(iter(texts.values())), options.rounds),
        "a million characters, ms": {
            name: long_run(unit, rivals) for name, unit in LONG_RUNS.items()
        },
        "load, ms": {peer.__name__: load(peer) for peer in (peers.ours, *rivals)},
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def installed(peer) -> bool:
    """Return whether a tokenizer of this kind is installed; print a message if not."""
    try:
        peer()
    except ImportError as error:
        print(f"without {peer.__name__}: {error}", file=sys.stderr)
        return False
    return True


def compare(text: str, rivals: list, rounds: int) -> dict:
    """Return the throughput of each tokenizer in MB/s and the speedup over each rival."""
    ids = peers.ours().encode(text)
    for rival in rivals:
        assert np.array_equal(rival().encode(text), ids), f"the ids of {rival.__name__} differ"
    megabytes = len(text.encode()) / 1e6
    rounds_of = interleaved(
        {
            peer.__name__: lambda peer=peer: one_round(peer(), text, ids)
            for peer in (peers.ours, *rivals)
        },
        rounds,
    )
    rates: dict = {"megabytes": round(megabytes, 2), "ids": len(ids)}
    for name, results in rounds_of.items():
        for task in results[0]:
            times = [result[task] for result in results]
            figures = rates.setdefault(task, {})
            figures[f"{name}, MB/s"] = round(megabytes / median(times), 1)
            if name != "ours":
                ours = [result[task] for result in rounds_of["ours"]]
                figures[f"times {name}"] = round(median(ratios(ours, times)), 2)
    return rates


def one_round(peer: peers.Peer, text: str, ids: np.ndarray) -> dict[str, float]:
    """Return the time of each task in seconds, with a new tokenizer."""
    tasks = peers.tasks(peer, text, ids)
    return {task: seconds_without_gc(work) for task, work in tasks.items()}


def two_threads(text: str, rounds: int) -> dict:
    """Return the speedup of two threads over one on a long text."""
    text *= TWO_THREAD_BYTES // len(text.encode()) + 1
    megabytes = len(text.encode()) / 1e6
    makers = {"one": peers.ours, "two": peers.ours_in_two_threads}
    encoders = {name: partial(make().encode, text) for name, make in makers.items()}
    times = interleaved(
        {name: partial(seconds_without_gc, encode) for name, encode in encoders.items()},
        rounds,
        warm_up=1,
    )
    return {
        "megabytes": round(megabytes, 1),
        **{f"{name}, MB/s": round(megabytes / median(found), 1) for name, found in times.items()},
        "ratio": round(median(ratios(times["two"], times["one"])), 2),
    }


def long_run(unit: str, rivals: list) -> dict:
    """Return the time in milliseconds to encode one piece of a million characters, cold."""
    text = unit * (LONG_RUN_CHARACTERS // len(unit))
    times = {}
    for peer in (peers.ours, *rivals):
        made = [peer() for _ in range(3)]
        try:
            durations = [seconds_without_gc(partial(new.encode, text)) for new in made]
            times[peer.__name__] = round(median(durations) * 1e3, 2)
        except Exception as error:  # tiktoken's regex engine fails on some
            times[peer.__name__] = f"{type(error).__name__}: {error}"[:60]
    return times


def load(peer: Callable[[], peers.Peer]) -> float:
    """Return the time in milliseconds to create a tokenizer."""
    return round(median(seconds_without_gc(peer) for _ in range(7)) * 1e3, 2)


def seconds_without_gc(work: Callable[[], object]) -> float:
    """Return the time of a call in seconds, without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        return seconds(work)
    finally:
        gc.enable()


def machine() -> dict:
    """Return the processor and the package versions."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count()
    versions = {name: version_of(name) for name in ("gigatoken", "numpy", "tiktoken")}
    return {"processor": processor(), "cpus": cpus, "python": platform.python_version(), **versions}


def table(result: dict) -> str:
    """Return the results as Markdown."""
    rows = []
    for name, rates in result["texts"].items():
        for task in ("cold", "warm", "decode a list", "decode an array"):
            figures = rates.get(task, {})
            speedups = [figures.get(f"times {rival}", "") for rival in ("tiktoken", "gigatoken")]
            rows.append([name, task, figures["ours, MB/s"], *speedups])
    header = ["text", "task", "fastgpt, MB/s", "speedup over tiktoken", "speedup over gigatoken"]
    lines = markdown_table(header, rows, numbers=3)
    two = result["two threads"]
    lines += ["", f"speedup of two threads over one on {two['megabytes']} MB: {two['ratio']}", ""]
    times = result["a million characters, ms"] | {"load": result["load, ms"]}
    rows = [[name, *(f"{ms} ms" for ms in found.values())] for name, found in times.items()]
    header = ["one million", *result["load, ms"]]
    return "\n".join(lines + markdown_table(header, rows, numbers=len(header) - 1))


if __name__ == "__main__":
    main(tyro.cli(Options))
