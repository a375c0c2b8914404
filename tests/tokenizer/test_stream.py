"""Tests of incremental decoding."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import CharTokenizer, StreamDecoder, Tokenizer, base, bpe


def test_a_character_split_across_tokens(gpt2):
    ids = gpt2.encode("日é😀".encode())
    decoder = StreamDecoder(gpt2)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) == "日é😀"
    assert "" in pieces
    assert decoder.finish() == ""
    assert decoder.push(ids[:-1]) == "日é"
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ids) == "日é😀"  # finish discarded the cut character


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, iter])
def test_several_at_once(gpt2, convert):
    ids = gpt2.encode("several at once")
    decoder = StreamDecoder(gpt2)
    assert decoder.push(convert(ids)) == "several at once"
    assert decoder.push(np.int64(ids[-1])) == " once"
    assert decoder.push([]) == ""


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 300) | st.integers(0, 50256), max_size=5)))
def test_cut_anywhere_it_is_what_decode_gives(gpt2, rows):
    decoder = StreamDecoder(gpt2)
    text = "".join(map(decoder.push, rows)) + decoder.finish()
    assert text == gpt2.decode([i for row in rows for i in row])


def test_an_invalid_id_does_not_change_the_state(gpt2):
    decoder = StreamDecoder(gpt2)
    first, *rest = gpt2.encode("é漢".encode()[:3])
    assert decoder.push(first) + decoder.push(rest) == "é"
    for bad, error in ((-1, IndexError), ([2, 50257], IndexError), (1.5, TypeError)):
        with pytest.raises(error):
            decoder.push(bad)
    assert decoder.push(gpt2.encode("漢".encode()[1:])) == "漢"


def test_single_characters():
    decoder = StreamDecoder(CharTokenizer("aé"))
    assert [decoder.push(1), decoder.push([0, 1]), decoder.finish()] == ["é", "aé", ""]


@pytest.mark.parametrize("module", [base, bpe])
def test_the_examples_in_the_docstrings(module):
    tested = doctest.testmod(module, extraglobs={"Tokenizer": Tokenizer})
    assert tested.attempted > 0
    assert tested.failed == 0
