"""Tests of the common interface of both tokenizers: special tokens, decoding, identity."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer

EOT = "<|endoftext|>"


@pytest.fixture(params=["bpe", "char"])
def tokenizer(request, gpt2, shakespeare):
    return gpt2 if request.param == "bpe" else CharTokenizer.from_text(shakespeare)


@pytest.mark.parametrize("convert", [list, tuple, iter, np.array, np.uint16, torch.tensor])
def test_decode_takes_any_row(tokenizer, convert):
    ids = tokenizer.encode("So shaken as we are")
    assert tokenizer.decode(convert(ids)) == "So shaken as we are"
    assert tokenizer.decode_bytes(convert(ids)) == b"So shaken as we are"


def test_decode_nothing(tokenizer):
    for empty in ([], np.array([]), torch.tensor([])):
        assert tokenizer.decode(empty) == ""


def test_decode_batch(tokenizer):
    texts = ["So shaken", "", "as we are"]
    assert tokenizer.decode_batch(tokenizer.encode_batch(texts)) == texts


def test_token_bytes(gpt2, tokenizer):
    ids = tokenizer.encode("wan with care")
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"wan with care"
    assert gpt2.token_bytes(50256) == EOT.encode()


def test_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    copies = [
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
        type(tokenizer).load(tmp_path),
        type(tokenizer).load(tmp_path / "tokenizer.json"),
    ]
    for copied in copies:
        assert copied == tokenizer
        assert hash(copied) == hash(tokenizer)
        assert copied.fingerprint == tokenizer.fingerprint
        assert repr(copied) == repr(tokenizer)
        assert copied.encode("Now is the winter") == tokenizer.encode("Now is the winter")
    assert tokenizer != CharTokenizer("other")
    assert tokenizer != "other"
    assert len(tokenizer.fingerprint) == 64


def test_fingerprint_sees_every_part(gpt2):
    tokens, merges, special_tokens = gpt2.vocabulary
    swapped = merges[[1, 0, *range(2, len(merges))]]
    others = [
        Tokenizer(tokens, swapped, special_tokens),
        Tokenizer(tokens, merges, {}),
        Tokenizer([*tokens, b"<|x|>"], merges, special_tokens),
    ]
    assert len({gpt2.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_fingerprint_never_changes(gpt2):
    """Pin the fingerprint: it is stored in shards, and a change would invalidate existing ones."""
    assert gpt2.fingerprint == "75fe897111163e51c60859fe856d72fc7e36bef950d616dd346874cfb2218885"
    assert (
        CharTokenizer("abc").fingerprint
        == "abf3a0ca65fa11d0a23814ad798a86be803850e426ff9f7e13cac412270d7529"
    )


def test_properties(gpt2):
    assert isinstance(gpt2, BaseTokenizer)
    assert gpt2.vocab_size == 50257
    assert gpt2.eot_token == gpt2.start_token == 50256
    assert gpt2.special_tokens == {EOT: 50256}
    tokens, merges, _ = gpt2.vocabulary
    assert Tokenizer(tokens[:-1], merges, {}).start_token == 198
    assert Tokenizer.gpt2() is gpt2


def test_special_tokens_on_request(gpt2):
    text = f"{EOT}one{EOT}{EOT} two"
    ids = [50256, 505, 50256, 50256, 734]
    assert gpt2.encode(text, allowed_special="all") == ids
    assert gpt2.encode(text.encode(), allowed_special={EOT}) == ids
    assert gpt2.encode_to_numpy(text, allowed_special="all").tolist() == ids
    assert gpt2.encode_batch([text], allowed_special="all") == [ids]


def test_special_token_parts_words_as_tiktoken(gpt2, reference):
    text = f"a  {EOT}  b \n{EOT}\n'{EOT}s"
    expected = reference.encode(text, allowed_special="all")
    assert gpt2.encode(text, allowed_special="all") == expected


def test_disallowed_special(gpt2):
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' at byte 3: remove it, or"):
        gpt2.encode(f"two{EOT}", disallowed_special="all")
    assert gpt2.encode("two", disallowed_special="all") == [11545]
    assert gpt2.encode(EOT, allowed_special="all", disallowed_special="all") == [50256]


def test_longest_special_token_first(gpt2):
    tokens, merges, _ = gpt2.vocabulary
    specials = {"<|end": 50257, "<|end|>": 50258}
    longer = Tokenizer([*tokens, *map(str.encode, specials)], merges, specials)
    assert longer.encode("<|end|><|end", allowed_special="all") == [50258, 50257]


def test_unknown_special_token(tokenizer):
    with pytest.raises(ValueError, match=r"'<\|x\|>' is not a special token of this tokenizer"):
        tokenizer.encode("x", allowed_special={"<|x|>"})
    with pytest.raises(TypeError, match="must be a set"):
        tokenizer.encode("x", allowed_special=EOT)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 50256) | st.integers(0, 300), max_size=30))
def test_stream_is_decode(gpt2, ids):
    assert "".join(gpt2.decode_stream(iter(ids))) == gpt2.decode(ids)


def test_decode_errors(gpt2):
    half = gpt2.encode("é".encode()[:1])
    assert gpt2.decode(half) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        gpt2.decode(half, errors="strict")


@pytest.mark.parametrize("merges", [[[2**32, 1, 256]], [[0.5, 1, 256]], [[-1, 1, 256]]])
def test_merges_are_ids(merges):
    tokens = [bytes([i]) for i in range(256)] + [b"\0\1"]
    with pytest.raises(ValueError, match="merges must be rows of three ids"):
        Tokenizer(tokens, np.array(merges), {})


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_counted_from_one(gpt2, threads):
    with pytest.raises(ValueError, match="threads must be at least 1"):
        gpt2.encode("a", threads=threads)
    assert gpt2.encode("a" * 300_000, threads=2**63) == gpt2.encode("a" * 300_000)


def test_special_tokens_that_tiktoken_would_confuse():
    pytest.importorskip("tiktoken")
    tokenizer = Tokenizer.train(["hello hello"], 300, special_tokens=["<|a|>", "<|a|>b"])
    with pytest.raises(ValueError, match=r"tiktoken would match '<\|a\|>' where a text contains"):
        tokenizer.to_tiktoken()
