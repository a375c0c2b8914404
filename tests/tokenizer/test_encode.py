"""Compare ids with tiktoken's and with those of ten lines of Python."""

import hashlib
import sysconfig
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.bpe import GPT2_MERGES

SETTINGS = settings(max_examples=200, deadline=None)
# The characters that matter to the splitting: quotes, the letters of contractions, several types of
# spaces, digits, and classes beyond ASCII, in any order.
TRICKY = st.text(st.sampled_from("'sdmtlvre SLRa1²٣漢é́ \n\t\r\u00a0\u3000\u0085.!😀\u200d\x00"))


def test_packaged_merges_are_openais():
    digest = hashlib.sha256(GPT2_MERGES.read_bytes()).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_as_tiktoken(gpt2, reference, seed):
    """Include pieces that differ only in NULs at their ends."""
    text = Random(seed).randbytes(5_000).decode("utf-8", "replace")
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    text = "".join(Random(seed).choices("\0\0<\1}", k=5_000))
    assert gpt2.encode(text) == reference.encode_ordinary(text)


def test_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("") == []
    assert gpt2.encode("\n") == [198]
    assert gpt2.encode(" don't") == [836, 470]


@pytest.mark.parametrize("name", ["shakespeare", "multilingual"])
def test_text_as_tiktoken(gpt2, reference, request, name):
    text = request.getfixturevalue(name)
    assert gpt2.encode(text) == reference.encode_ordinary(text)


def test_story_as_tiktoken(gpt2, reference):
    text = (Path(__file__).parents[1] / "assets" / "the-verdict.txt").read_text("utf-8")
    assert gpt2.encode(text) == reference.encode_ordinary(text)


def test_source_code_as_tiktoken(gpt2, reference):
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    assert files
    for file in files:
        text = file.read_text("utf-8", "replace")
        assert gpt2.encode(text) == reference.encode_ordinary(text), file


def test_every_token_as_tiktoken(gpt2, reference):
    for token_id in range(gpt2.vocab_size):
        text = gpt2.decode([token_id])
        assert gpt2.encode(text) == reference.encode_ordinary(text), text


def test_class_of_all_code_points_as_tiktoken(reference):
    """Use a vocabulary that exposes character classes: any byte merges with a b, 1 or ! after it.

    A character is only merged with the one of its own class, since the others are in another
    piece. GPT-2's own ids hide most classes.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([byte]) + mark for mark in (b"b", b"1", b"!") for byte in range(256)]
    merges = [(token[0], token[1], i) for i, token in enumerate(tokens) if len(token) == 2]
    ours = Tokenizer(tokens, merges, {})
    theirs = type(reference)(
        "classes",
        pat_str=reference._pat_str,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={},
    )
    for text, place in all_code_points("{0}b\n{0}1\n{0}!"):
        assert ours.encode(text) == theirs.encode_ordinary(text), place


def test_all_code_points_as_tiktoken(gpt2, reference):
    for text, place in all_code_points("a{}b"):
        assert gpt2.encode(text) == reference.encode_ordinary(text), place


def all_code_points(frame):
    """Yield batches of 4,096 characters, each put into `frame`, with a message for failures."""
    for first in range(0, 0x110000, 0x1000):
        points = [p for p in range(first, first + 0x1000) if not 0xD800 <= p < 0xE000]
        text = "\n?\n".join(frame.format(chr(point)) for point in points)
        yield (
            text,
            f"between U+{first:04X} and U+{first + 0xFFF:04X}: if tiktoken has moved to a newer "
            "Unicode, see csrc/tokenizer/generate_unicode_tables.py",
        )


@SETTINGS
@given(text=st.text() | TRICKY)
def test_any_text_as_tiktoken(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)


@SETTINGS
@given(data=st.binary(max_size=200))
def test_random_bytes_with_replacement_as_tiktoken(gpt2, reference, data):
    text = data.decode("utf-8", "replace")
    assert gpt2.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        "'s", "'S", "''s", "'t''", "don't", "DON'T", "they'll", "we've", "you're", "I'd", "I'm",
        "o'clock", "'lll", "'vee", "' s", "'", "''", " '", " 's", "a 's", "'\n", "'l", "'v",
        "l'l'll", "can't've", " ", "  ", "   ", "\n", " \n", "\n ", "a  b", "a   b", "a \n b",
        "a\n\n\nb", "a\t\tb", "a \u00a0b", "a\u00a0 b", "\u3000\u3000a", "a\u0085b", " \u2028x",
        "  1", "  .", " 1a.b", "x" * 63, "x" * 64, "x" * 65, "é" * 32, "é" * 33, "\x1c\x1d",
        "\u180e \ufeff",
    ],
)  # fmt: skip
def test_edge_cases_as_tiktoken(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)


@SETTINGS
@given(piece=st.text("abcdefghinorst", min_size=1, max_size=150))
def test_word_as_ten_lines_of_python(gpt2, packaged_ranks, piece):
    """Test words shorter and longer than the length from which the core uses a heap."""
    parts = [bytes([byte]) for byte in piece.encode()]
    while True:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: packaged_ranks.get(pair, 50_000), default=None)
        if best not in packaged_ranks:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [b"".join(best)]
    assert [gpt2.token_bytes(i) for i in gpt2.encode(piece)] == parts


@pytest.fixture(scope="session")
def packaged_ranks(packaged_merges):
    return {pair: rank for rank, pair in enumerate(packaged_merges)}


@SETTINGS
@given(data=st.data())
def test_any_vocabulary_as_ten_lines_of_python(data):
    """Include merges in another order than their ids, and tokens that no merge produces."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += data.draw(st.lists(st.text("ab", min_size=2, max_size=4), unique=True).map(_encoded))
    ids = {token: i for i, token in enumerate(tokens)}
    splits = [(t[:k], t[k:]) for t in tokens for k in range(1, len(t))]
    pairs = data.draw(st.permutations([p for p in splits if p[0] in ids and p[1] in ids]))
    tokenizer = Tokenizer(tokens, [(ids[a], ids[b], ids[a + b]) for a, b in pairs], {})
    word = data.draw(st.text("ab", max_size=100)).encode()
    parts = [bytes([byte]) for byte in word]
    for _ in word:
        found = [pair for pair in pairs if pair in pairwise(parts)]
        if not found:
            break
        at = list(pairwise(parts)).index(found[0])
        parts[at : at + 2] = [b"".join(found[0])]
    assert tokenizer.encode(word) == [ids[part] for part in parts]


def _encoded(words):
    return [word.encode() for word in words]


def test_numpy_ids(gpt2, multilingual):
    ids = gpt2.encode_to_numpy(multilingual)
    assert ids.dtype == np.uint16
    assert ids.tolist() == gpt2.encode(multilingual)
    assert gpt2.encode_to_numpy("").shape == (0,)


def test_more_than_65536_ids_are_uint32(gpt2):
    tokens, merges, special_tokens = gpt2.vocabulary
    extra = {f"<|{i}|>": len(tokens) + i for i in range(70_000 - len(tokens))}
    large = Tokenizer([*tokens, *map(str.encode, extra)], merges, {**special_tokens, **extra})
    ids = large.encode_to_numpy("a<|19742|>", allowed_special="all")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [64, 69_999]


def test_a_text_is_not_a_batch(gpt2):
    for text in ("hello", b"hello"):
        with pytest.raises(TypeError, match=r"takes a list of texts: pass \[text\], or use encode"):
            gpt2.encode_batch(text)


def test_encode_batch(gpt2):
    texts = ["Hello", b" world", ""]
    assert gpt2.encode_batch(texts) == [gpt2.encode(text) for text in texts]


def test_wrong_type(gpt2):
    with pytest.raises(TypeError, match="str or bytes, not list"):
        gpt2.encode(["Hello"])
