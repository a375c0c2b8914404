import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.tokenizer import CharTokenizer, Tokenizer, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(text=TEXT)
def test_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    characters = sorted(set(text))
    ids = tokenizer.encode(text)
    assert ids == [characters.index(char) for char in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids
    assert "".join(tokenizer.decode_stream(ids)) == text
    assert tokenizer.vocab_size == len(characters)


def test_shakespeare(shakespeare):
    tokenizer = CharTokenizer.from_text(shakespeare)
    assert tokenizer.vocab_size == 65
    ids = tokenizer.encode_to_numpy(shakespeare)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == shakespeare
    assert tokenizer.encode("\n") == [tokenizer.start_token] == [0]
    assert tokenizer.eot_token is None
    assert tokenizer.special_tokens == {}


def test_order_is_kept():
    tokenizer = CharTokenizer(["b", "\n", "a"])
    assert tokenizer.encode("ab\n") == [2, 0, 1]
    assert tokenizer.start_token == 1
    assert CharTokenizer("ba").start_token == 0


def test_many_characters_are_uint32():
    characters = "".join(map(chr, range(0x10000, 0x10000 + 65_537)))
    tokenizer = CharTokenizer(characters)
    assert tokenizer.encode_to_numpy(characters[-1]).tolist() == [65_536]
    assert tokenizer.encode_to_numpy("").dtype == np.uint32


@pytest.mark.parametrize("unknown", ["é", "😀", "\x00", "\U0010ffff", "\ud800"])
def test_an_unknown_character_is_rejected_or_ignored(unknown):
    tokenizer = CharTokenizer("abc")
    shown = "\ufffd" if unknown == "\ud800" else unknown
    expected = rf"character {shown!r} (U+{ord(shown):04X}) at position 3 is not in this model's"
    with pytest.raises(ValueError, match="vocabulary of 3 characters; remove it, or") as error:
        tokenizer.encode(f"abc{unknown}a")
    assert str(error.value).startswith(expected)
    assert tokenizer.encode(f"abc{unknown}a", errors="ignore") == [0, 1, 2, 0]
    assert tokenizer.encode(unknown, errors="ignore") == []


def test_bytes_that_are_not_utf8():
    with pytest.raises(UnicodeDecodeError, match="position 1"):
        CharTokenizer("a").encode(b"a\xff")


@pytest.mark.parametrize(
    ("characters", "message"),
    [("", "at least one"), ("aba", "'a' occurs twice"), ("\ud800", "half a surrogate pair")],
)
def test_bad_characters(characters, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(characters)


def test_load_picks_the_class(tmp_path, gpt2):
    CharTokenizer("añ\n😀").save(tmp_path / "char.json")
    gpt2.save(tmp_path / "bpe.json")
    assert load_tokenizer(tmp_path / "char.json") == CharTokenizer("añ\n😀")
    assert load_tokenizer(str(tmp_path / "bpe.json")) == gpt2
    with pytest.raises(ValueError, match="contains a CharTokenizer, not a Tokenizer"):
        Tokenizer.load(tmp_path / "char.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"type": "fastgpt-char", "version": 2, "characters": "a"}', "version 2 is not supported"),
        ('{"type": "word", "version": 1, "characters": "a"}', "type 'word'"),
        ('{"type": "fastgpt-char", "version": 1, "characters": ["a"]}', "must be a string"),
        ('{"type": "fastgpt-char", "version": 1, "characters": "aa"}', "'a' occurs twice"),
        ('{"type": "fastgpt-char",\n "version": 1', "line 2"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(path) in str(error.value)
