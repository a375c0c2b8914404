"""Benchmark the tokenizer against tiktoken, Hugging Face tokenizers and gigatoken, if installed.

All tokenizers encode the same text, and their ids are compared before timing. ``extra_info``
contains the throughput of the median round in MB/s (10⁶ bytes of UTF-8). "Cold" is the first text
of a new tokenizer, "warm" the same text again. Each case runs separately; use
compare_tokenizers.py, which interleaves the tokenizers, for results that are to be published.
"""

from functools import cache

import numpy as np
import pytest

from benchmarks import tokenizer_peers as peers
from benchmarks.common import MIN_ROUNDS, measure, note_megabytes

TEXTS = peers.texts()
PEERS = [peers.ours, peers.tiktoken, peers.hugging_face, peers.gigatoken]


@cache
def text_and_ids(name):
    text = TEXTS[name]()
    return text, peers.ours().encode(text)


@pytest.fixture(params=TEXTS)
def name(request):
    return request.param


def make(peer):
    """Return a new tokenizer of this kind; skip the case if it is not installed."""
    try:
        return peer()
    except ImportError as error:
        pytest.skip(str(error))


def time_it(benchmark, group, peer, text, work):
    measure(
        benchmark,
        work,
        group=group,
        variant=peer.__name__,
        baseline="tiktoken",
        device="cpu",
        megabytes=megabytes_of(text),
    )


def megabytes_of(text):
    return len(text.encode()) / 1e6


@pytest.mark.parametrize("peer", [*PEERS, peers.ours_in_two_threads])
def test_encode_warm(benchmark, name, peer):
    text, ids = text_and_ids(name)
    tokenizer = make(peer)
    assert np.array_equal(tokenizer.encode(text), ids)
    time_it(benchmark, f"encode {name}, warm", peer, text, lambda: tokenizer.encode(text))


@pytest.mark.parametrize("peer", [peers.ours, peers.tiktoken, peers.gigatoken])
def test_encode_cold(benchmark, name, peer):
    text, ids = text_and_ids(name)
    assert np.array_equal(make(peer).encode(text), ids)
    benchmark.group = f"encode {name}, cold"
    benchmark.extra_info.update(variant=peer.__name__, baseline="tiktoken", device="cpu")
    benchmark.pedantic(
        lambda tokenizer: tokenizer.encode(text),
        setup=lambda: ((make(peer),), {}),
        rounds=MIN_ROUNDS,
    )
    note_megabytes(benchmark, megabytes_of(text))


@pytest.mark.parametrize("peer", PEERS)
def test_decode_list(benchmark, name, peer):
    text, ids = text_and_ids(name)
    decode, ids = make(peer).decode, ids.tolist()
    assert decode(ids) in (text, text.encode())
    time_it(benchmark, f"decode {name} from a list", peer, text, lambda: decode(ids))


@pytest.mark.parametrize("peer", [peers.ours, peers.gigatoken])
def test_decode_array(benchmark, name, peer):
    text, ids = text_and_ids(name)
    decode, ids = make(peer).decode_array, ids.astype(np.uint32)
    assert decode(ids) == text.encode()
    time_it(benchmark, f"decode {name} from an array into bytes", peer, text, lambda: decode(ids))


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
