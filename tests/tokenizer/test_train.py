"""Compare training with Hugging Face's BpeTrainer and with a naive implementation."""

import _thread
import gzip
import json
import pickle
import re
import signal
import sysconfig
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import _C
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.tokenizer.training import learn_vocabulary
from fastgpt.tokenizer.vocabulary_files import LETTER_OF_BYTE
from fastgpt.utils.errors import UsageError

END = "<|endoftext|>"
PARAGRAPH = "The cat sat on the mat, the other cat sat on that mat: they'll see 1234 mats.\n\n"


@pytest.fixture(scope="module")
def hugging_face():
    """Return a function that trains Hugging Face's tokenizer on the same texts."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models, pre_tokenizers, trainers

    def train(texts, vocab_size, min_frequency=0, special_tokens=(END,)):
        theirs = Theirs(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        theirs.train_from_iterator(texts, trainer)
        return theirs

    return train


def merges_of(tokenizer):
    """Return (left, right) of each merge, as bytes."""
    tokens, merges, _ = tokenizer.vocabulary
    return [(tokens[left], tokens[right]) for left, right, _ in merges.tolist()]


def their_merges(theirs):
    """Return the same for Hugging Face's tokenizer, which represents bytes by characters."""
    byte_of = {letter: byte for byte, letter in enumerate(LETTER_OF_BYTE)}
    merges = json.loads(theirs.to_str())["model"]["merges"]
    return [tuple(bytes(map(byte_of.__getitem__, part)) for part in pair) for pair in merges]


def naive_merges(words, n_merges):
    """Return (left, right) of each merge, by definition. words: the count of each word (bytes)."""
    order = sorted(range(256), key=LETTER_OF_BYTE.__getitem__)
    ids = {bytes([byte]): i for i, byte in enumerate(order)}
    counts = {tuple(word[i : i + 1] for i in range(len(word))): n for word, n in words.items()}
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for word, n in counts.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids[b"".join(best)] = len(ids)
        counts = {merge(word, best): n for word, n in counts.items()}
    return merges


def merge(word, pair):
    tokens = []
    for token in word:
        if tokens and (tokens[-1], token) == pair:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tuple(tokens)


def stdlib_sources():
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / name).read_text("utf-8") for name in ("typing.py", "tarfile.py", "ast.py")]


class TestMerges:
    @pytest.mark.parametrize("corpus", ["shakespeare", "multilingual", "sources"])
    def test_are_those_of_hugging_face(self, request, hugging_face, corpus):
        texts = stdlib_sources() if corpus == "sources" else [request.getfixturevalue(corpus)]
        ours = Tokenizer.train(texts, 2000)
        assert merges_of(ours) == their_merges(hugging_face(texts, 2000))
        assert ours.vocab_size == 2000

    def test_pairs_too_rare_at_first_are_merged_later(self, hugging_face, shakespeare):
        text = shakespeare[:50_000] + " rarely" * 50_000 + " often" * 500
        ours = Tokenizer.train([text], 3000)
        assert merges_of(ours) == their_merges(hugging_face([text], 3000))

    @pytest.mark.parametrize("min_frequency", [1, 2, 7])
    def test_min_frequency_is_that_of_hugging_face(self, hugging_face, min_frequency):
        text = stdlib_sources()[0][:20_000]
        with pytest.warns(UserWarning, match="tokens instead of 20,000"):
            ours = Tokenizer.train([text], 20_000, min_frequency=min_frequency)
        assert merges_of(ours) == their_merges(hugging_face([text], 20_000, min_frequency))
        assert ours.vocab_size < 20_000

    @settings(max_examples=100, deadline=None)
    @given(
        texts=st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=8),
        n_merges=st.integers(0, 30),
    )
    def test_ties_and_repeats(self, texts, n_merges):
        words = Counter(text.encode() for text in texts)
        ours = Tokenizer.train(texts, 256 + n_merges, special_tokens=())
        assert merges_of(ours) == naive_merges(words, n_merges)

    @settings(max_examples=100, deadline=None)
    @given(
        text=st.text("aab  'sé1\n\u3000", max_size=80).filter(bool),
        n_merges=st.integers(0, 40),
        min_frequency=st.integers(0, 3),
    )
    def test_ties_and_repeats_as_in_hugging_face(self, hugging_face, text, n_merges, min_frequency):
        theirs = hugging_face([text], 257 + n_merges, min_frequency)
        ours = Tokenizer.train([text], 257 + n_merges, min_frequency=min_frequency)
        assert merges_of(ours) == their_merges(theirs)

    @pytest.mark.parametrize("word", ["a" * 1000, "ab" * 500, "aab" * 333, "abacabad" * 120])
    def test_one_long_word(self, word):
        ours = Tokenizer.train([word], 256 + 40, special_tokens=())
        assert merges_of(ours) == naive_merges({word.encode(): 1}, 40)

    def test_a_word_of_megabytes_takes_no_square_of_its_time(self):
        ours = Tokenizer.train(["ab" * 500_000], 300, special_tokens=())
        assert merges_of(ours)[:3] == [(b"a", b"b"), (b"ab", b"ab"), (b"abab", b"abab")]

    def test_are_the_same_every_time_on_any_number_of_threads(self, shakespeare):
        one, again, three = (
            Tokenizer.train([shakespeare], 1000, threads=threads) for threads in (1, 1, 3)
        )
        assert one == again == three


class TestVocabulary:
    def test_is_laid_out_as_gpt2s(self, gpt2):
        ours = Tokenizer.train([PARAGRAPH], 270, special_tokens=[END, "<|user|>"])
        assert [ours.token_bytes(i) for i in range(256)] == [
            gpt2.token_bytes(i) for i in range(256)
        ]
        assert ours.special_tokens == {END: 268, "<|user|>": 269}
        assert [left + right for left, right in merges_of(ours)] == [
            ours.token_bytes(i) for i in range(256, 268)
        ]

    def test_is_smaller_where_nothing_is_left_to_merge(self):
        warning = "has 259 tokens instead of 1,000: the text has no more pairs to merge; train on"
        with pytest.warns(UserWarning, match=warning):
            ours = Tokenizer.train(["abc"], 1000)
        assert merges_of(ours) == [(b"a", b"b"), (b"ab", b"c")]
        assert ours.special_tokens == {END: 258}
        assert ours.vocab_size == 259

    def test_can_have_no_merges(self):
        assert Tokenizer.train([PARAGRAPH], 256, special_tokens=()).encode("ab") == [64, 65]

    def test_works_in_hugging_face(self, tmp_path, multilingual, shakespeare):
        tokenizers = pytest.importorskip("tokenizers")
        ours = Tokenizer.train([shakespeare], 1500)
        ours.save(tmp_path)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in (multilingual, stdlib_sources()[0], shakespeare[:50_000]):
            ids = ours.encode(text)
            assert ids == theirs.encode(text).ids
            assert ours.decode(ids) == text
        assert Tokenizer.load(tmp_path) == ours

    def test_survives_pickling(self):
        ours = Tokenizer.train([PARAGRAPH], 280)
        copy = pickle.loads(pickle.dumps(ours))
        assert copy == ours
        assert copy.encode(PARAGRAPH) == ours.encode(PARAGRAPH)


class TestSource:
    def test_a_file_is_one_text(self, tmp_path, multilingual):
        path = tmp_path / "text.txt"
        path.write_text(multilingual, "utf-8", newline="")
        of_text = Tokenizer.train([multilingual], 600)
        for source in (path, str(path), [path], iter([multilingual]), [multilingual.encode()]):
            assert Tokenizer.train(source, 600) == of_text

    @pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 1000])
    def test_blocks_of_a_file_leave_no_trace(self, tmp_path, multilingual, block_bytes):
        text = multilingual[:3000] + "  x \n\n  y\t z's\r\n" * 20 + "x" * 500 + " \n" * 100
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode())
        in_blocks = learn_vocabulary(path, 500, [END], block_bytes=block_bytes)
        assert Tokenizer(*in_blocks) == Tokenizer.train([text.replace("\r\n", "\n")], 500)

    @settings(max_examples=200, deadline=None)
    @given(
        text=st.text("ab'st 1.\n\té\u3000", max_size=60).map(str.encode),
        cuts=st.lists(st.integers(0, 100), max_size=6).map(sorted),
    )
    def test_any_blocks_make_the_same_pieces(self, text, cuts):
        whole, parts = _C.BpeTrainer(), _C.BpeTrainer()
        whole.feed(text)
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            parts.feed(text[begin:end])
            parts.feed(b"")
        for trainer in (whole, parts):
            trainer.end_text()
        assert parts.n_pieces == whole.n_pieces
        for trainer in (whole, parts):
            trainer.train(50, 0)
        np.testing.assert_array_equal(parts.merges(), whole.merges())

    def test_no_piece_spans_two_texts(self):
        assert merges_of(Tokenizer.train(["ab", "cd"] * 3, 300)) == [(b"a", b"b"), (b"c", b"d")]

    def test_texts_and_files_in_one_list(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("ab ab", "utf-8")
        mixed = Tokenizer.train(["cd cd", path, b"ef"], 270)
        assert mixed == Tokenizer.train(["cd cd", "ab ab", "ef"], 270)

    def test_the_name_of_a_file_is_not_a_text(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text("ab ab ab", "utf-8")
        Path("folder").mkdir()
        for name in ("text.txt", str(tmp_path / "text.txt")):
            error = re.escape(f"{name!r} is the name of a file, not a text: pass Path({name!r})")
            for source in ([name], ["a text", name], iter([name])):
                with pytest.raises(ValueError, match=error):
                    Tokenizer.train(source, 258)
            with pytest.raises(ValueError, match=error):
                CharTokenizer.from_text(name)
        of_file, of_name = (Tokenizer.train([x], 258) for x in (Path("text.txt"), b"text.txt"))
        assert merges_of(of_file) == [(b"a", b"b")]
        assert merges_of(of_name) == [(b"x", b"t")]
        for text in ("folder", "none.txt", "text.txt\n", "text.txt\0", "\ud800", "x" * 9999):
            Tokenizer.train([text], 257)

    def test_bytes_of_every_kind(self):
        texts = ["nul\0nul\0 nul", b"\xff\xfe\xff\xfe\xc3(\xe2\x82", "\ud83d\ude00 \ud800 half"]
        as_bytes = [texts[0].encode(), texts[1], "\U0001f600 \ufffd half".encode()]
        ours = Tokenizer.train(texts, 300)
        assert ours == Tokenizer.train(as_bytes, 300)
        for text, data in zip(texts, as_bytes, strict=True):
            assert ours.decode_bytes(ours.encode(text)) == data

    @pytest.mark.parametrize("length", range(1, 40))
    def test_pieces_of_every_length_are_told_apart(self, length):
        # The table pads short pieces with NULs, and these pieces end with NULs themselves.
        words = {b"!" * n + b"\0" * (length - n): 1 + n for n in range(length + 1)}
        texts = [word for word, n in words.items() for _ in range(n)]
        ours = Tokenizer.train(texts, 270, special_tokens=())
        assert merges_of(ours) == naive_merges(words, 14)

    def test_special_tokens_in_the_text_are_ordinary_text(self):
        assert b"endoftext" in [
            left + right for left, right in merges_of(Tokenizer.train([END] * 9, 300))
        ]


class TestFaults:
    @pytest.mark.parametrize("vocab_size", [-1, 0, 256, 257])
    def test_a_vocabulary_too_small(self, vocab_size):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size} is too small.* 258"):
            Tokenizer.train([PARAGRAPH], vocab_size, special_tokens=[END, "<|user|>"])

    @pytest.mark.parametrize("source", [[], [""], ["", b""], iter([])])
    def test_an_empty_source(self, source):
        with pytest.raises(ValueError, match="no text to train on"):
            Tokenizer.train(source, 300)

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match="no text to train on"):
            Tokenizer.train(tmp_path / "empty", 300)

    def test_a_text_where_a_path_belongs(self):
        for text in ("Once upon a time", PARAGRAPH * 100, "nul\0", "\ud800"):
            with pytest.raises(FileNotFoundError, match="pass a list that contains it"):
                Tokenizer.train(text, 300)
        with pytest.raises(TypeError, match=r"not int .*pass a list"):
            Tokenizer.train(b"Once upon a time", 300)

    def test_a_text_of_another_type(self):
        with pytest.raises(TypeError, match="str, UTF-8 bytes or the Path of a file, not float"):
            Tokenizer.train(["a", 1.5], 300)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([""], "must not be empty"),
            ([END, END], "twice"),
            (["a"], "merges could also produce it"),
            ([" word"], r"merges could also produce it.*<\|word\|>"),
        ],
    )
    def test_special_tokens_that_are_none(self, names, message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.train([PARAGRAPH], 300, special_tokens=names)

    def test_special_tokens_as_one_str(self):
        with pytest.raises(TypeError, match="list of names"):
            Tokenizer.train([PARAGRAPH], 300, special_tokens=END)

    def test_a_min_frequency_below_zero(self):
        with pytest.raises(ValueError, match="min_frequency must be at least 0, not -1"):
            Tokenizer.train([PARAGRAPH], 300, min_frequency=-1)

    def test_ctrl_c_ends_it_at_once(self):
        words = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (100_000, 20), np.uint8)
        trainer = _C.BpeTrainer()
        trainer.feed(b" ".join(word.tobytes() for word in words))
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(0.3, _thread.interrupt_main)
        timer.start()
        began = time.perf_counter()
        try:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(10_000_000, 0)
        finally:
            timer.join()
            signal.signal(signal.SIGINT, previous)
        assert time.perf_counter() - began < 2

    def test_no_threads(self):
        with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
            Tokenizer.train([PARAGRAPH], 300, threads=0)

    def test_text_after_the_first_merge(self):
        trainer = _C.BpeTrainer()
        trainer.feed(b"ab ab")
        assert trainer.train(1, 0) == 1
        with pytest.raises(ValueError, match="after merging has started"):
            trainer.feed(b"cd")


def test_files_are_read_as_encode_file_reads_them(tmp_path):
    text = "ab ab\nab ab\n" * 50
    for name, content in {
        "plain.txt": text.encode(),
        "windows.txt": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        "packed.txt.gz": gzip.compress(text.encode()),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert Tokenizer.train(path, 300) == Tokenizer.train([text], 300), name
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8: byte 0xe9 at offset 3"):
        Tokenizer.train(tmp_path / "latin1.txt", 300)
