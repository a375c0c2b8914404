"""Benchmark BPE training against Hugging Face tokenizers, gigatoken and rustbpe, single-threaded.

All of them train on the same text in memory. ``extra_info`` contains the throughput of the median
round in MB/s (10⁶ bytes of UTF-8). Before timing, the merges are compared:

- those of Hugging Face must be equal to those of fastgpt, in order;
- those of gigatoken as well: it is configured to break ties like Hugging Face (the ids of its
  single bytes are in another order);
- of rustbpe, which breaks ties differently, only the number of merges is compared.

The corpus is the packaged text and Python's standard library, 6 MB, with a vocabulary of 10,000; or
the file in the environment variable FASTGPT_BENCH_TEXT, with a vocabulary of 32,000.
"""

import json
import os
import sysconfig
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # read by the peers when they are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from benchmarks.suite import measure
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.bpe import GPT2_MERGES
from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT, GPT2_PATTERNS, LETTER_OF_BYTE

TEXT_PATH = os.environ.get("FASTGPT_BENCH_TEXT")
VOCAB_SIZE = 32_000 if TEXT_PATH else 10_000


@pytest.fixture(scope="module")
def text():
    if TEXT_PATH:
        return Path(TEXT_PATH).read_text("utf-8")
    files = [GPT2_MERGES.with_name("tinyshakespeare.txt")]
    files += sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text("utf-8", "replace") for file in files)


@pytest.fixture(scope="module")
def our_merges(text):
    return merges_of(Tokenizer.train([text], VOCAB_SIZE))


def merges_of(tokenizer):
    tokens, merges, _ = tokenizer.vocabulary
    return [(tokens[left], tokens[right]) for left, right, _ in merges.tolist()]


def ours(text):
    tokenizer = Tokenizer.train([text], VOCAB_SIZE)
    return lambda: merges_of(tokenizer)


def hugging_face(text):
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([text], trainer)

    def merges():
        byte_of = {letter: byte for byte, letter in enumerate(LETTER_OF_BYTE)}
        pairs = json.loads(theirs.to_str())["model"]["merges"]
        return [tuple(bytes(map(byte_of.__getitem__, part)) for part in pair) for pair in pairs]

    return merges


def gigatoken(text):
    result = pytest.importorskip("gigatoken").train_bpe(text.encode(), VOCAB_SIZE, [END_OF_TEXT])
    return lambda: result[1]


def rustbpe(text):
    theirs = pytest.importorskip("rustbpe").Tokenizer()
    theirs.train_from_iterator(iter([text]), VOCAB_SIZE - 1, pattern=GPT2_PATTERNS[-1])
    return lambda: theirs.get_mergeable_ranks()[256:]


@pytest.mark.parametrize("train", [ours, hugging_face, gigatoken, rustbpe])
def test_train(benchmark, text, our_merges, train):
    merges = train(text)()
    if train is rustbpe:
        assert len(merges) == len(our_merges)
    else:
        assert merges == our_merges
    measure(
        benchmark,
        lambda: train(text),
        group=f"train {VOCAB_SIZE:,} ids",
        variant=train.__name__,
        baseline="hugging_face",
        device="cpu",
        megabytes=len(text.encode()) / 1e6,
    )
