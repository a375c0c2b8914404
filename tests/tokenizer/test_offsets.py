"""Tests of the offsets of ids in the text, and of their number."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT

SETTINGS = settings(max_examples=150, deadline=None)
TEXT = st.text() | st.text(st.sampled_from("'s aé漢😀\n\u0301\x00\ud83d\ude00"))
EOT = "<|endoftext|>"


def test_bytes_and_characters(gpt2):
    ids, offsets = gpt2.encode_with_offsets("Hé 日本!")
    assert [gpt2.token_bytes(i) for i in ids] == [
        *(b"H", b"\xc3\xa9", b" \xe6", b"\x97", b"\xa5", b"\xe6\x9c", b"\xac", b"!")
    ]
    assert offsets.dtype == np.int64
    expected = [[0, 1], [1, 2], [2, 4], [3, 4], [3, 4], [4, 5], [4, 5], [5, 6]]
    assert offsets.tolist() == expected
    _, offsets = gpt2.encode_with_offsets("Hé 日本!".encode())
    assert offsets[:, 1].tolist() == [1, 3, 5, 6, 7, 9, 10, 11]
    assert offsets[:, 0].tolist() == [0, 1, 3, 5, 6, 7, 9, 10]


@pytest.mark.parametrize("empty", ["", b""])
def test_nothing(gpt2, empty):
    for tokenizer in (gpt2, CharTokenizer("a")):
        ids, offsets = tokenizer.encode_with_offsets(empty)
        assert ids.shape == (0,)
        assert offsets.shape == (0, 2)
        assert tokenizer.count(empty) == 0


@SETTINGS
@given(data=st.binary(max_size=50))
def test_in_bytes_they_are_the_tokens(gpt2, data):
    ids, offsets = gpt2.encode_with_offsets(data)
    assert [data[a:b] for a, b in offsets] == [gpt2.token_bytes(i) for i in ids]


@SETTINGS
@given(text=TEXT)
def test_in_characters_they_cover_the_text(gpt2, text):
    """Check that the characters of each id are the fewest that contain its bytes."""
    ids, offsets = gpt2.encode_with_offsets(text)
    assert ids.tolist() == gpt2.encode(text)
    starts = [0]  # of each character, in bytes; a surrogate pair has one start
    for char in "".join(map(chr, np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"))):
        starts.append(starts[-1] + (3 if "\ud800" <= char <= "\udfff" else len(char.encode())))
    if "\ud83d\ude00" in text:
        assert offsets[-1, 1] == len(text)
        return
    at = 0
    for token_id, (first, last) in zip(ids, offsets.tolist(), strict=True):
        end = at + len(gpt2.token_bytes(token_id))
        assert starts[first] <= at < starts[first + 1]
        assert starts[last - 1] < end <= starts[last]
        at = end
    assert at == starts[-1]


def test_offsets_of_surrogates(gpt2):
    high, low = chr(0xD83D), chr(0xDE00)
    for text, last in ((high + low + "a", [2, 3]), (f"{high}a", [1, 2]), (f"é{low}a", [2, 3])):
        _, offsets = gpt2.encode_with_offsets(text)
        assert offsets[-1].tolist() == last
        assert offsets[0, 0] == 0
    ids, offsets = gpt2.encode_with_offsets("é" + high + low)
    assert len(ids) > 2
    assert (offsets[1:] == [1, 3]).all()


@SETTINGS
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_as_hugging_face(gpt2, hugging_face, text):
    assume(
        END_OF_TEXT not in text
    )  # a special token there; Hypothesis tries strings of the sources
    theirs = hugging_face.encode(text)
    ids, offsets = gpt2.encode_with_offsets(text)
    assert ids.tolist() == theirs.ids
    assert [*map(tuple, offsets.tolist())] == theirs.offsets


@pytest.fixture(scope="module")
def hugging_face(gpt2, tmp_path_factory):
    """Return Hugging Face's tokenizer of GPT-2, whose offsets include the spaces of tokens."""
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    gpt2.save(path)
    content = json.loads(path.read_text("utf-8"))
    content["pre_tokenizer"]["trim_offsets"] = False
    path.write_text(json.dumps(content))
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))


def test_special_tokens_have_offsets(gpt2):
    ids, offsets = gpt2.encode_with_offsets(f"é{EOT}a", allowed_special="all")
    assert ids.tolist() == [2634, 50256, 64]
    assert offsets.tolist() == [[0, 1], [1, 14], [14, 15]]
    assert gpt2.count(f"é{EOT}a", allowed_special={EOT}) == 3
    assert gpt2.count(f"é{EOT}a") == len(gpt2.encode(f"é{EOT}a"))
    for method in (gpt2.count, gpt2.encode_with_offsets):
        with pytest.raises(ValueError, match="contains the special token"):
            method(EOT, disallowed_special="all")


@given(text=st.text("aé漢😀", max_size=20))
def test_single_characters(text):
    tokenizer = CharTokenizer("😀aé漢")
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert offsets.tolist() == [[i, i + 1] for i in range(len(text))]
    assert tokenizer.count(text) == len(text)
    _, offsets = tokenizer.encode_with_offsets(text.encode())
    assert [text.encode()[a:b].decode() for a, b in offsets] == [*text]
    assert ids.tolist() == tokenizer.encode(text)


# --- special tokens, compared with tiktoken ------------------------------------------------------


@pytest.fixture(scope="module")
def with_specials():
    """Return a tokenizer with three special tokens, and its tiktoken equivalent."""
    pytest.importorskip("tiktoken")
    tokens, merges, specials = Tokenizer.gpt2().vocabulary
    more = {"<|user|>": 50257, "<|bot|>": 50258}
    ours = Tokenizer([*tokens, *map(str.encode, more)], merges, {**specials, **more})
    return ours, ours.to_tiktoken()


@SETTINGS
@given(
    text=st.lists(st.sampled_from([EOT, "<|user|>", "<|bot|>", "<|", " a", "é", "\n"])).map(
        "".join
    ),
    allowed=st.sets(st.sampled_from([EOT, "<|user|>", "<|bot|>"])) | st.just("all"),
)
def test_allowed_special_as_tiktoken(with_specials, text, allowed):
    ours, theirs = with_specials
    expected = theirs.encode(text, allowed_special=allowed, disallowed_special=())
    assert ours.encode(text, allowed_special=allowed) == expected
    refused = raises(theirs.encode, text, allowed_special=allowed, disallowed_special="all")
    assert refused == raises(ours.encode, text, allowed_special=allowed, disallowed_special="all")


def raises(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError:
        return True
    return False
