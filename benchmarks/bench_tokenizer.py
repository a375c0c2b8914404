"""Benchmark the tokenizer against tiktoken, Hugging Face tokenizers and gigatoken, if installed.

All tokenizers encode the same text, and their results are compared before timing. ``extra_info``
contains the throughput of the median round in MB/s (10⁶ bytes of UTF-8). Each case runs separately;
use compare_tokenizers.py, which interleaves the tokenizers, for results that are to be published.
"""

from functools import cache

import numpy as np
import pytest

from benchmarks import tokenizer_peers as peers
from benchmarks.suite import MIN_ROUNDS, measure, note_megabytes

TEXTS = peers.texts()
PEERS = [peers.ours, peers.tiktoken, peers.hugging_face, peers.gigatoken]
CASES = [
    *(("cold", peer) for peer in (peers.ours, peers.tiktoken, peers.gigatoken)),
    *(("warm", peer) for peer in (*PEERS, peers.ours_in_two_threads)),
    *(("decode a list", peer) for peer in PEERS),
    *(("decode an array", peer) for peer in (peers.ours, peers.gigatoken)),
]


@cache
def text_and_ids(name):
    text = TEXTS[name]()
    return text, peers.ours().encode(text)


def make(peer):
    """Return a new tokenizer of this kind; skip the case if it is not installed."""
    try:
        return peer()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("task", "peer"), CASES)
@pytest.mark.parametrize("name", TEXTS)
def test_task(benchmark, name, task, peer):
    text, ids = text_and_ids(name)
    megabytes = len(text.encode()) / 1e6
    names = {"group": f"{name}, {task}", "variant": peer.__name__, "baseline": "tiktoken"}
    work = peers.tasks(make(peer), text, ids)[task]
    if task.startswith("decode"):
        assert work() in (text, text.encode())
    else:
        assert np.array_equal(work(), ids)
    if task != "cold":
        measure(benchmark, work, **names, device="cpu", megabytes=megabytes)
        return
    benchmark.group = names.pop("group")
    benchmark.extra_info.update(names, device="cpu")
    benchmark.pedantic(
        lambda encode: encode(),
        setup=lambda: ((peers.tasks(make(peer), text, ids)[task],), {}),
        rounds=MIN_ROUNDS,
    )
    note_megabytes(benchmark, megabytes)


@pytest.mark.parametrize("peer", PEERS)
def test_load(benchmark, peer):
    """Load fastgpt from the packaged merges, tiktoken from ranks in memory, others from JSON."""
    make(peer)  # create the files that the peers read
    measure(
        benchmark,
        peer,
        group="load GPT-2's vocabulary",
        variant=peer.__name__,
        baseline="tiktoken",
        device="cpu",
    )
