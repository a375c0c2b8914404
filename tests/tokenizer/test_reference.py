"""Compare the pure-Python reference tokenizer with tiktoken, and the C++ core with it."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer import reference as bpe

SETTINGS = settings(max_examples=150, deadline=None)
# Characters that Python's Unicode version defines. (The core uses 16.0; later ones can add some.)
ASSIGNED = st.characters(exclude_categories=["Cn", "Cs"])
TEXT = st.text(ASSIGNED) | st.text(
    st.sampled_from("'sdmtlvre SLRa1²٣漢é́ \n\t\r\u00a0\u3000\u0085.!😀\u200d\x00\x1c\x1f\u180e")
)


@pytest.fixture(scope="module")
def ranks(packaged_merges):
    return bpe.ranks_of(packaged_merges)


@SETTINGS
@given(text=TEXT)
def test_core_equals_the_reference(gpt2, ranks, text):
    parts = [part for piece in bpe.split(text) for part in bpe.merge(piece.encode(), ranks)]
    assert [gpt2.token_bytes(i) for i in gpt2.encode(text)] == parts


@settings(max_examples=30, deadline=None)
@given(text=TEXT, learned_from=st.lists(st.text("abc '1"), max_size=4))
def test_core_equals_the_reference_with_any_merges(text, learned_from):
    learned = bpe.train(learned_from, 20)
    tokens = bpe.vocabulary(learned)
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(tokens, [(ids[a], ids[b], ids[a + b]) for a, b in learned], {})
    for sample in (text, *learned_from):
        assert core.encode(sample) == bpe.encode(sample, learned)
        assert bpe.decode(core.encode(sample), learned) == core.decode(core.encode(sample))


def test_core_equals_the_reference_on_texts(gpt2, packaged_merges, multilingual):
    text = multilingual[:20_000]
    ids = bpe.encode(text, packaged_merges)
    assert gpt2.encode(text) == ids
    assert bpe.decode(ids, packaged_merges) == text


@SETTINGS
@given(text=TEXT)
def test_reference_splits_as_the_pattern(reference, text):
    regex = pytest.importorskip("regex")
    assert bpe.split(text) == regex.findall(reference._pat_str, text)


@SETTINGS
@given(text=TEXT)
def test_reference_is_tiktoken(reference, ranks, text):
    expected = [reference.decode_single_token_bytes(i) for i in reference.encode_ordinary(text)]
    assert [t for piece in bpe.split(text) for t in bpe.merge(piece.encode(), ranks)] == expected


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text("ab c'1\n"), max_size=5))
def test_reference_learns_what_hugging_face_learns(texts):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + 12, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    learned = bpe.train(texts, 12)
    assert theirs.get_vocab_size() == len(bpe.vocabulary(learned))
    for text in texts:
        assert theirs.encode(text).ids == bpe.encode(text, learned)


def test_training_stops_when_nothing_is_left():
    assert bpe.train([], 5) == bpe.train(["a b"], 0) == []
    assert bpe.train(["abab"], 9) == [(b"a", b"b"), (b"ab", b"ab")]


def test_the_examples_in_its_docstring():
    assert doctest.testmod(bpe).failed == 0
