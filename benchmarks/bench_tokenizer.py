"""The tokenizer against tiktoken: encoding, decoding and loading, one thread each.

Both get the same text, the ids are compared before anything is timed, and ``extra_info`` says how
many megabytes (10⁶ bytes of UTF-8) a second the median round makes.
"""

import sysconfig
from pathlib import Path

import pytest

from benchmarks.common import measure
from fastgpt import tokenizer as ours
from fastgpt.tokenizer import GPT2_MERGES, Tokenizer
from fastgpt.vocabulary import read_merges

tiktoken = pytest.importorskip("tiktoken")

TEXT_BYTES = 5_000_000
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def load_tiktoken():
    tokens = read_merges(GPT2_MERGES).tokens[:-1]
    return tiktoken.Encoding(
        "gpt2-packaged",
        pat_str=PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)},
    )


def shakespeare():
    text = GPT2_MERGES.with_name("tinyshakespeare.txt").read_text("utf-8")
    return (text * (TEXT_BYTES // len(text) + 1))[:TEXT_BYTES]


def source_code():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text("utf-8", "replace") for file in files)[:TEXT_BYTES]


@pytest.fixture(scope="module", params=[shakespeare, source_code], ids=lambda text: text.__name__)
def text(request):
    return request.param()


@pytest.fixture(scope="module")
def reference():
    return load_tiktoken()


def time_it(benchmark, group, text, whose, work):
    """Time one member of a group; tiktoken is what ours is compared with."""
    n_bytes = len(text.encode())
    measure(
        benchmark,
        work,
        group=group,
        variant=whose,
        baseline="tiktoken",
        device="cpu",
        megabytes=n_bytes / 1e6,
    )
    if benchmark.stats:  # there are none with --benchmark-disable
        benchmark.extra_info["MB/s"] = round(n_bytes / benchmark.stats.stats.median / 1e6, 1)


@pytest.mark.parametrize("whose", ["ours", "tiktoken"])
@pytest.mark.parametrize("into", ["list", "numpy"])
def test_encode(benchmark, request, text, reference, into, whose):
    gpt2 = Tokenizer.gpt2()
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    encode = {
        ("list", "ours"): gpt2.encode,
        ("numpy", "ours"): gpt2.encode_to_numpy,
        ("list", "tiktoken"): reference.encode_ordinary,
        ("numpy", "tiktoken"): reference.encode_to_numpy,
    }[into, whose]
    group = f"encode {name_of(request)} into a {into}"
    time_it(benchmark, group, text, whose, lambda: encode(text))


@pytest.mark.parametrize("whose", ["ours", "tiktoken"])
def test_decode(benchmark, request, text, reference, whose):
    ids = Tokenizer.gpt2().encode(text)
    decode = {"ours": Tokenizer.gpt2().decode, "tiktoken": reference.decode}[whose]
    assert decode(ids) == text
    group = f"decode {name_of(request)} from a list"
    time_it(benchmark, group, text, whose, lambda: decode(ids))


@pytest.mark.parametrize("whose", ["ours", "tiktoken"])
def test_load(benchmark, whose):
    """From vocab.bpe; tiktoken's time includes our parser, for it has none of its own offline."""
    load = {"ours": ours._gpt2.__wrapped__, "tiktoken": load_tiktoken}[whose]
    measure(
        benchmark,
        load,
        group="load GPT-2's vocabulary",
        variant=whose,
        baseline="tiktoken",
        device="cpu",
    )


def name_of(request):
    return request.node.callspec.params["text"].__name__
