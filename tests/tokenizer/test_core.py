"""Tests of internals of the C++ core that the interface hides: blocks, caches, tables."""

import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt._C import BytePairEncoder, piece_ends
from fastgpt.tokenizer import reference as bpe

# As in test_encode.py, with characters of every UTF-8 length and of every class.
TRICKY = st.text(
    st.sampled_from(
        "'sdmtlvre SLRa1²٣漢é́ \n\t\r\u00a0\u3000\u0085\u2028.!😀\U0001d4b3\U0001d7d8\u200d\x00"
    )
)
EOT = b"<|endoftext|>"


# --- splitting ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=TRICKY)
def test_pieces_are_the_patterns_wherever_a_block_ends(reference, text):
    """Put the text at each position of a block, since the core processes blocks of 64 bytes."""
    regex = pytest.importorskip("regex")
    for before in range(71):
        moved = "x" * before + text
        pieces = [piece.encode() for piece in regex.findall(reference._pat_str, moved)]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        assert piece_ends(moved, vectorized=False) == ends
        assert piece_ends(moved) == ends


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300) | st.lists(st.binary(max_size=4)).map(b"\xe3\x80\x80".join))
def test_pieces_of_any_bytes_vectorized_or_not(data):
    ends = piece_ends(data)
    assert ends == piece_ends(data, vectorized=False)
    assert all(a < b for a, b in pairwise([0, *ends]))
    assert ends[-1:] == ([len(data)] if data else [])


@pytest.mark.parametrize("text", ["'ll", " 's", "\u3000\u3000a", "\u00a0\u00a0.", "é漢😀", " \n a"])
def test_pieces_in_long_texts_vectorized_or_not(text):
    """Use texts with more pieces than the core splits at a time, which is about a thousand."""
    for size in (959, 960, 961, 1023, 1024, 1025, 70_000):
        long = text * size
        assert piece_ends(long) == piece_ends(long, vectorized=False)


# --- the table of tokens --------------------------------------------------------------------------


def test_every_token_of_gpt2_is_what_its_bytes_are_merged_to(packaged_merges):
    """Check what `trusted` asserts about the file, so that loading can skip the check."""
    ranks = bpe.ranks_of(packaged_merges)
    for left, right in packaged_merges:
        assert bpe.merge(left + right, ranks) == [left + right]


@pytest.mark.parametrize("trusted", [False, True])
def test_every_token_of_gpt2_is_encoded_to_itself(packaged_encoder, trusted):
    encoder = packaged_encoder(trusted=trusted)
    split = 0
    for token_id, token in enumerate(encoder.tokens()[:-1]):
        if len(piece_ends(token)) > 1:  # never in one piece
            split += 1
        else:
            assert encoder.encode(token).tolist() == [token_id]
    assert split < 100


def test_trusted_or_not_is_the_same(packaged_encoder, multilingual, shakespeare):
    for text in (multilingual, shakespeare, "a" * 1000, "\0 \0\0", "<|endoftext|>"):
        ids = [packaged_encoder(trusted=trusted).encode(text) for trusted in (False, True)]
        np.testing.assert_array_equal(*ids)


def test_a_vocabulary_of_300_000_tokens():
    """Grow the core's tables; merges cannot reach most tokens of this random vocabulary."""
    letters = [bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    pairs = [a + b for a in letters for b in letters]
    longer = [pair + c for pair in pairs for c in letters]
    longest = [token + b"'" + bytes([i % 256]) * 13 for i, token in enumerate(longer)]  # no merges
    tokens = [*bpe.BYTES, *pairs, *longer, *longest]
    ids = {token: i for i, token in enumerate(tokens)}
    made = pairs + longer
    random.Random(1).shuffle(made)
    merges = [(ids[token[:-1]], ids[token[-1:]], ids[token]) for token in made]
    encoder = BytePairEncoder(tokens, np.array(merges, np.uint32))
    assert len(encoder) > 280_000

    ranks = bpe.ranks_of([(token[:-1], token[-1:]) for token in made])
    for word in [*longer[::200], *(a + b + a for a, b in pairwise(longer[::400]))]:
        assert encoder.encode(word).tolist() == [ids[part] for part in merge_one(word, ranks)]


def merge_one(word, ranks):
    """Merge like bpe.merge, but one pair at a time; a merge can enable one of lower rank."""
    parts = [bytes([byte]) for byte in word]
    while best := min(filter(ranks.__contains__, pairwise(parts)), key=ranks.get, default=None):
        at = [*pairwise(parts)].index(best)
        parts[at : at + 2] = [best[0] + best[1]]
    return parts


# --- the caches of pieces -------------------------------------------------------------------------


@pytest.mark.parametrize("specials", [[EOT], [b"<|%d|>" % i for i in range(20_000)]])
def test_more_pieces_than_the_cache_takes(packaged_encoder, specials, reference):
    """Overflow the cache, which holds up to 2^18 pieces of this size and is then cleared."""
    letters = np.random.default_rng(1).integers(97, 123, (300_000, 11), np.uint8)
    letters[:, 0] = ord(" ")
    text = letters.tobytes()
    encoder = packaged_encoder(special_tokens=specials)
    ids = encoder.encode(text)
    assert ids.dtype == (np.uint16 if len(specials) == 1 else np.uint32)

    few = 11 * 10_000
    parts = [text[at : at + few] for at in range(0, len(text), few)]
    make = partial(packaged_encoder, special_tokens=specials, trusted=True)
    fresh = [make().encode(part) for part in parts]
    np.testing.assert_array_equal(ids, np.concatenate(fresh))
    np.testing.assert_array_equal(ids, encoder.encode(text))
    assert fresh[0].tolist() == reference.encode_ordinary(parts[0].decode())


@pytest.mark.parametrize("specials", [[EOT], [b"<|%d|>" % i for i in range(20_000)]])
def test_more_long_pieces_than_the_cache_takes(packaged_encoder, specials, reference):
    """Overflow the 1 MB cache of pieces of 17 to 256 bytes; longer ones are not cached."""
    draw = random.Random(1)
    sizes = draw.choices([17, 40, 256, 257], k=9000)
    words = ["".join(draw.choices("etaoin", k=size)) for size in sizes]
    assert sum(sizes) > 1 << 20
    texts = [" ".join(words[at : at + 3000]) for at in range(0, len(words), 3000)]
    encoder = packaged_encoder(special_tokens=specials)
    expected = [reference.encode_ordinary(text) for text in texts]
    for _ in range(2):
        assert [encoder.encode(text).tolist() for text in texts] == expected


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.binary(max_size=40) | st.text("\0!a ", max_size=40).map(str.encode)))
def test_what_came_before_changes_nothing(packaged_encoder, gpt2, texts):
    """Compare an encoder with empty caches with one that has been used by other tests."""
    fresh = packaged_encoder(trusted=True)
    for text in texts:
        assert fresh.encode(text).tolist() == gpt2.encode(text)
        assert fresh.decode(fresh.encode(text)) == text
