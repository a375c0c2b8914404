"""Compare fastgpt's tokenizer with others: ``python benchmarks/compare_tokenizers.py``.

On a machine whose speed drifts, only interleaved runs are comparable. Each round creates every
tokenizer anew, one after the other, and measures the encoding of a text, cold and then warm, and
its decoding. Results are medians over the rounds, and a speedup is the median of the ratios within
the rounds. The ids are compared before timing. The texts are those of tokenizer_peers.texts() or
the given files.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tokenizer_peers as peers
from benchmarks.machine import processor, version_of

LONG_RUNS = {
    "letters (a)": "a", "spaces": " ", "digits (7)": "7", "newlines": "\n", "=": "=", "!?": "!?",
    "emoji": "😀", "CJK characters": "漢字",
}  # fmt: skip
LONG_RUN_CHARACTERS = 1_000_000
TWO_THREAD_BYTES = 50_000_000


def main() -> None:
    """Run the comparison, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("files", nargs="*", type=Path, help="UTF-8 texts")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="file to write the results to, as JSON")
    options = parser.parse_args()
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
    n_bytes = len(text.encode())
    seconds = defaultdict(list)  # by (what, whose)
    for _ in range(rounds):
        for peer in (peers.ours, *rivals):
            for what, duration in one_round(peer(), text, ids):
                seconds[what, peer.__name__].append(duration)
    rates: dict = {"megabytes": round(n_bytes / 1e6, 2), "ids": len(ids)}
    for (what, whose), durations in seconds.items():
        figures = rates.setdefault(what, {})
        figures[f"{whose}, MB/s"] = round(n_bytes / statistics.median(durations) / 1e6, 1)
        if whose != "ours":
            pairs = zip(durations, seconds[what, "ours"], strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            figures[f"times {whose}"] = round(ratio, 2)
    return rates


def one_round(peer: peers.Peer, text: str, ids) -> list[tuple[str, float]]:
    """Return the times of a new tokenizer in seconds."""
    list_of_ids = ids.tolist()
    durations = [
        ("cold", seconds_of(lambda: peer.encode(text))),
        ("warm", seconds_of(lambda: peer.encode(text))),
        ("decode a list", seconds_of(lambda: peer.decode(list_of_ids))),
    ]
    if peer.decode_array is not None:
        array = ids.astype(np.uint32)
        durations.append(("decode an array", seconds_of(lambda: peer.decode_array(array))))
    return durations


def two_threads(text: str, rounds: int) -> dict:
    """Return the speedup of two threads over one on a long text."""
    text *= TWO_THREAD_BYTES // len(text.encode()) + 1
    n_bytes = len(text.encode())
    one, two = peers.ours(), peers.ours_in_two_threads()
    one.encode(text), two.encode(text)
    pairs = [
        (seconds_of(lambda: one.encode(text)), seconds_of(lambda: two.encode(text)))
        for _ in range(rounds)
    ]
    return {
        "megabytes": round(n_bytes / 1e6, 1),
        "one, MB/s": round(n_bytes / statistics.median(a for a, _ in pairs) / 1e6, 1),
        "two, MB/s": round(n_bytes / statistics.median(b for _, b in pairs) / 1e6, 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
    }


def long_run(unit: str, rivals: list) -> dict:
    """Return the time in milliseconds to encode one piece of a million characters, cold."""
    text = unit * (LONG_RUN_CHARACTERS // len(unit))
    times = {}
    for peer in (peers.ours, *rivals):
        made = [peer() for _ in range(3)]
        try:
            durations = [seconds_of(lambda new=new: new.encode(text)) for new in made]
            times[peer.__name__] = round(statistics.median(durations) * 1e3, 2)
        except Exception as error:  # tiktoken's regex engine fails on some
            times[peer.__name__] = f"{type(error).__name__}: {error}"[:60]
    return times


def load(peer) -> float:
    """Return the time in milliseconds to create a tokenizer."""
    return round(statistics.median(seconds_of(peer) for _ in range(7)) * 1e3, 2)


def seconds_of(work) -> float:
    """Return the time of a call in seconds, without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    finally:
        gc.enable()


def machine() -> dict:
    """Return the processor and the package versions."""
    names = {"numpy", "tiktoken", "gigatoken"}
    return {
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in sorted(names)},
    }


def table(result: dict) -> str:
    """Return the results as Markdown."""
    lines = [
        "| text | task | fastgpt, MB/s | speedup over tiktoken | speedup over gigatoken |",
        "|---|---|--:|--:|--:|",
    ]
    for name, rates in result["texts"].items():
        for what in ("cold", "warm", "decode a list", "decode an array"):
            figures = rates.get(what, {})
            times = [str(figures.get(f"times {who}", "")) for who in ("tiktoken", "gigatoken")]
            lines.append(f"| {name} | {what} | {figures['ours, MB/s']} | {' | '.join(times)} |")
    two = result["two threads"]
    lines += ["", f"speedup of two threads over one on {two['megabytes']} MB: {two['ratio']}"]
    lines += ["", "| one million | " + " | ".join(result["load, ms"]) + " |"]
    lines += ["|---|" + "--:|" * len(result["load, ms"])]
    for name, times in result["a million characters, ms"].items():
        lines.append(f"| {name} | {' | '.join(f'{time} ms' for time in times.values())} |")
    lines.append("| load | " + " | ".join(f"{ms} ms" for ms in result["load, ms"].values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
