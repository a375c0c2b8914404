import re
from functools import partial
from pathlib import Path

import pytest

from fastgpt._C import BytePairEncoder
from fastgpt.tokenizer.vocabulary_files import LETTER_OF_BYTE

ASSETS = Path(__file__).parents[2] / "fastgpt" / "assets"
DATA = Path(__file__).parents[1] / "assets"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="session")
def packaged_encoder():
    """Return a function that makes encoders of GPT-2's vocabulary with empty caches."""
    file = (ASSETS / "vocab.bpe").read_bytes()
    return partial(BytePairEncoder.from_merges_file, file=file, special_tokens=[b"<|endoftext|>"])


@pytest.fixture(scope="session")
def packaged_merges():
    """Return (left, right) of each merge, as bytes, read without fastgpt's own parser."""
    text = (ASSETS / "vocab.bpe").read_text("utf-8")
    byte_of = {letter: byte for byte, letter in enumerate(LETTER_OF_BYTE)}
    pairs = re.findall(r"^(\S+) (\S+)$", text.split("\n", 1)[1], re.MULTILINE)
    assert len(pairs) == 50_000
    return [tuple(bytes(map(byte_of.__getitem__, part)) for part in pair) for pair in pairs]


@pytest.fixture(scope="session")
def reference(packaged_merges):
    """Return a tiktoken encoding of the packaged merges, to compare with."""
    tiktoken = pytest.importorskip("tiktoken")
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    byte_order = printable + [b for b in range(256) if b not in printable]
    tokens = [bytes([byte]) for byte in byte_order] + [a + b for a, b in packaged_merges]
    return tiktoken.Encoding(
        "gpt2-packaged",
        pat_str=PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": 50256},
    )
