"""The tokenizer against tiktoken, Hugging Face's tokenizers and gigatoken, where installed.

All get the same text, the ids are compared before anything is timed, and ``extra_info`` says how
many megabytes (10⁶ bytes of UTF-8) a second the median round makes. "Cold" is a new tokenizer's
first text, "warm" the same text again. Each case runs by itself; for figures to quote, where two
tokenizers take turns, see compare_tokenizers.py.
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
    """Return a new tokenizer of this kind, or skip the case."""
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
    """Ours from the packaged merges, tiktoken from ranks in memory, the others from JSON."""
    make(peer)  # what peers need beforehand, they make here
    measure(
        benchmark,
        peer,
        group="load GPT-2's vocabulary",
        variant=peer.__name__,
        baseline="tiktoken",
        device="cpu",
    )
