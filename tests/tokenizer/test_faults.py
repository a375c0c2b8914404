"""Tests with texts and ids that are known to cause failures in tokenizers."""

import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt._C import BytePairEncoder, piece_ends
from fastgpt.tokenizer import reference as bpe
from fastgpt.tokenizer.vocabulary_files import LETTER_OF_BYTE

MILLION = 10**6


HIGH, LOW = chr(0xD83D), chr(0xDE00)


@pytest.mark.parametrize("text", [HIGH, f"a{LOW}b", HIGH + LOW, LOW + HIGH, HIGH * 2, f"'{LOW}s"])
def test_lone_surrogates_become_replacement_characters(gpt2, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference.encode_ordinary(text)
    expected = "😀" if text == HIGH + LOW else text.replace(HIGH, "\ufffd").replace(LOW, "\ufffd")
    assert gpt2.decode(ids) == expected


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_round_trip(gpt2, data):
    assert gpt2.decode_bytes(gpt2.encode(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"\x80", b"\xff", b"\xc3", b"\xe6\xbc", b"\xf0\x9f\x98", b"a\xc3b", b"\xc0\x80",
        b"\xc1\xbf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80", bytes(range(256)) * 3,
    ],
)  # fmt: skip
def test_malformed_utf8_sequences_round_trip(gpt2, data):
    """Check that a byte outside valid UTF-8 is classified as punctuation, which ends a word."""
    assert gpt2.decode_bytes(gpt2.encode(data)) == data
    if data[0] >= 0x80:
        assert gpt2.encode(b"word" + data) == gpt2.encode(b"word") + gpt2.encode(data)


def test_nul_characters(gpt2, reference):
    text = "\x00a\x00\x00 \x00b"
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_runs_of_nuls_of_different_lengths(packaged_encoder, before):
    """Check that the core's cache distinguishes lengths: a NUL looks the same as padding."""
    encoder = packaged_encoder()
    for length in [*range(before), *range(40, 0, -1), *range(40)]:
        for data in (b"\0" * length, b" !" + b"\0" * length):
            assert encoder.decode(encoder.encode(data)) == data


RUNS = ["a", " ", "7", "\n", "😀", "漢字", "abc", "\t \n", "'s", "!?"]


@pytest.mark.parametrize("unit", RUNS)
def test_long_runs_are_encoded_in_linear_time(gpt2, unit):
    text = unit * (MILLION // len(unit))
    start = time.perf_counter()
    ids = gpt2.encode_to_numpy(text)
    seconds = time.perf_counter() - start
    assert seconds < 5, "on any machine; quadratic time would take minutes"
    assert gpt2.decode(ids) == text


@pytest.mark.parametrize("unit", ["a", "😀"])
def test_ten_million_bytes_in_one_piece(gpt2, unit):
    data = unit.encode() * (10 * MILLION // len(unit.encode()))
    start = time.perf_counter()
    ids = gpt2.encode_to_numpy(data, threads=2)
    assert time.perf_counter() - start < 30
    assert gpt2.decode_bytes(ids) == data


@pytest.mark.parametrize("unit", RUNS)
@pytest.mark.parametrize("length", [2_000, 30_001])
def test_long_runs_match_tiktoken(gpt2, reference, unit, length):
    text = unit * (length // len(unit)) + "x"
    assert gpt2.encode(text) == reference.encode_ordinary(text)


def test_a_special_token_in_ordinary_text_is_encoded_as_text(gpt2, reference):
    text = "a<|endoftext|>b"
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert 50256 not in gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("bad", [-1, 50257, 2**31, 2**32, 2**63, 2**64, -(2**64)])
def test_ids_out_of_range_are_rejected(gpt2, bad):
    message = (
        f"token id {bad} at position 1 is out of range: this vocabulary has the ids 0 to 50256"
    )
    with pytest.raises(IndexError, match=message):
        gpt2.decode([0, bad])
    with pytest.raises(IndexError, match="out of range"):
        gpt2.token_bytes(bad)
    with pytest.raises(IndexError, match="out of range"):
        list(gpt2.decode_stream([bad]))
    if -(2**63) <= bad < 2**63:
        for row in (np.array([0, bad]), torch.tensor([0, bad])):
            with pytest.raises(IndexError, match=message):
                gpt2.decode(row)
    if 0 <= bad < 2**64:
        with pytest.raises(IndexError, match=message):
            gpt2.decode(np.array([0, bad], np.uint64))


INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i2", ">u4", ">i8"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_arrays_of_every_integer_type(gpt2, dtype):
    """Decode strided and reversed arrays, and reject an id that is too small or too large."""
    good = np.array([72, 9, 105, 9], dtype)
    for row in (good, good[::2], good[::-1], np.asfortranarray(good.reshape(2, 2).T)[0]):
        assert gpt2.decode_bytes(row) == gpt2.decode_bytes(row.tolist())
    limits = np.iinfo(dtype)
    for bad in {limits.min, limits.max, 50257} - {0}:
        if limits.min <= bad <= limits.max and not 0 <= bad < 50257:
            with pytest.raises(IndexError, match=f"token id {bad} at position 2 is out of range"):
                gpt2.decode(np.array([1, 2, bad], dtype))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "?", "O", "U1", "S1", "M8[s]", "m8[s]"])
def test_arrays_of_other_types_are_rejected(gpt2, dtype):
    row = np.array([0, 1], "i8").astype(dtype)
    with pytest.raises(TypeError, match="token ids must be integers, not"):
        gpt2.decode(row)


@pytest.mark.parametrize("bad", [1.5, None, "1", [1], 1 + 0j])
def test_items_that_are_not_integers_are_rejected(gpt2, bad):
    with pytest.raises(TypeError, match=r"token ids must be integers, not .* \(at position 1\)"):
        gpt2.decode([0, bad])
    with pytest.raises(TypeError, match="token ids must be integers"):
        gpt2.token_bytes(bad)


@pytest.mark.parametrize("row", [np.array([1.0]), torch.tensor([1.0]), np.array([True])])
def test_float_and_bool_arrays_are_rejected(gpt2, row):
    with pytest.raises(TypeError, match=r"token ids must be integers, not (float|bool)"):
        gpt2.decode(row)


@pytest.mark.parametrize("rows", [np.zeros((2, 3), int), torch.zeros(1, 3, dtype=int), np.array(1)])
def test_arrays_that_are_not_one_dimensional_are_rejected(gpt2, rows):
    with pytest.raises(ValueError, match=r"not an array of shape .*: pass one row, for example"):
        gpt2.decode(rows)


@pytest.mark.parametrize("ids", [5, None, "12", b"12"])
def test_objects_that_are_not_sequences_are_rejected(gpt2, ids):
    with pytest.raises(TypeError, match="takes a sequence of token ids, not"):
        gpt2.decode(ids)


def test_decode_stream_holds_back_incomplete_characters(gpt2):
    ids = gpt2.encode("日é😀".encode())
    assert any("\ufffd" in gpt2.decode([i]) for i in ids)
    assert [*gpt2.decode_stream(ids)] == ["日", "é", "😀"]
    assert "".join(gpt2.decode_stream(ids[:-1])) == gpt2.decode(ids[:-1]) == "日é\ufffd"


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
warned = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.fixture
def threads_were_used(gpt2, shakespeare):
    """Return ids, after checking them against two threads in one call and four parallel calls."""
    ids = gpt2.encode_to_numpy(shakespeare, threads=2)
    with ThreadPoolExecutor(4) as pool:
        for others in pool.map(gpt2.encode_to_numpy, [shakespeare] * 4):
            np.testing.assert_array_equal(ids, others)
    return ids


@needs_fork
@warned
def test_fork_after_threads_were_used(gpt2, shakespeare, threads_were_used):
    child = os.fork()
    if child == 0:
        same = np.array_equal(gpt2.encode_to_numpy(shakespeare, threads=2), threads_were_used)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status[1]) == 0


@needs_fork
@warned
def test_fork_while_a_thread_encodes(gpt2, shakespeare, threads_were_used):
    """Fork while the parent encodes, as a DataLoader does when it starts its workers."""
    context = multiprocessing.get_context("fork")
    stop = threading.Event()

    def go_on():
        while not stop.is_set():
            gpt2.encode_to_numpy(shakespeare, threads=2)

    def encode():
        ids = gpt2.encode_to_numpy(shakespeare, threads=2)
        sys.exit(0 if np.array_equal(ids, threads_were_used) else 1)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        children = [context.Process(target=encode) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            child.kill()  # if it is still running
            child.join()
    finally:
        stop.set()
        thread.join()
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_threads_share_a_tokenizer(gpt2, multilingual):
    texts = [multilingual[i : i + 10_000] for i in range(0, 80_000, 1_000)]
    expected = [gpt2.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(gpt2.encode, texts)) == expected
            assert list(pool.map(gpt2.decode, expected)) == texts


def test_threads_share_a_multithreaded_tokenizer(gpt2, shakespeare, multilingual):
    texts = [shakespeare[i:] + multilingual for i in range(8)]
    expected = [gpt2.encode_to_numpy(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        threads = [1 + i % 3 for i in range(8)]
        encode = partial(pool.map, lambda text, n: gpt2.encode_to_numpy(text, threads=n))
        for ids, again in zip(expected, encode(texts, threads), strict=True):
            np.testing.assert_array_equal(ids, again)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_learnable_vocabulary_matches_the_reference(data):
    """Compare with the reference, for merges that each join tokens of earlier ones."""
    letters = data.draw(st.sampled_from([b"ab", b"ab '", b"\0!", b"\xc3\xa9a", b" \n", b"12"]))
    tokens = [bytes([byte]) for byte in letters]
    merges = []
    for _ in range(data.draw(st.integers(0, 25))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        if pair[0] + pair[1] not in tokens and len(pair[0] + pair[1]) <= 40:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    file = "".join(f"{_letters(left)} {_letters(right)}\n" for left, right in merges)
    encoder = BytePairEncoder.from_merges_file(file.encode(), [])
    ids = {token: i for i, token in enumerate(encoder.tokens())}
    ranks = bpe.ranks_of(merges)
    for _ in range(4):
        text = b"".join(data.draw(st.lists(st.sampled_from(tokens), max_size=60)))
        ends = [0, *piece_ends(text)]
        pieces = [text[begin:end] for begin, end in pairwise(ends)]
        expected = [ids[part] for piece in pieces for part in bpe.merge(piece, ranks)]
        assert encoder.encode(text).tolist() == expected
        assert encoder.decode(expected) == text


def _letters(token):
    return "".join(LETTER_OF_BYTE[byte] for byte in token)
