"""Tests of the other file formats: tiktoken's ranks and OpenAI's merges, valid and malformed."""

import base64
import builtins
import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.tokenizer import reference as bpe
from fastgpt.tokenizer.vocabulary_files import GPT2_PATTERNS

TEXTS = ["Hello world", "don't  stop\n\n now", " 1234 é漢字 😀\t\x00", "thethe in he", ""]
EOT = "<|endoftext|>"


def small(special_tokens=(EOT,), order=(0, 1, 2)):
    """Return a tokenizer of 259 ids and special tokens, with its merges in the given order."""
    tokens = [*bpe.BYTES, b"he", b"the", b"in"]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [(b"h", b"e"), (b"t", b"he"), (b"i", b"n")]
    merges = [(ids[a], ids[b], ids[a + b]) for a, b in (pairs[i] for i in order)]
    specials = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
    return Tokenizer([*tokens, *map(str.encode, specials)], merges, specials)


@pytest.fixture
def lines():
    """Return the lines of a rank file, to be modified by the tests."""
    tokens = [*bpe.BYTES, b"he", b"the", b"in"]
    return [b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]


# --- tiktoken's rank files -----------------------------------------------------------------------


def test_gpt2_as_openais_rank_file(gpt2, tmp_path):
    """Check that the saved file equals r50k_base.tiktoken, by the hash that tiktoken checks."""
    path = tmp_path / "r50k_base.tiktoken"
    gpt2.save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert Tokenizer.load(path) == gpt2


def test_tiktoken_reads_ours(tmp_path, shakespeare):
    load = pytest.importorskip("tiktoken.load")
    merges = bpe.train([shakespeare[:20_000]], 200)
    ids = {token: i for i, token in enumerate(bpe.vocabulary(merges))}
    ours = Tokenizer([*ids], [(ids[a], ids[b], ids[a + b]) for a, b in merges], {})
    ours.save(tmp_path / "ours.tiktoken")
    assert load.load_tiktoken_bpe(str(tmp_path / "ours.tiktoken")) == ids
    assert Tokenizer.load(tmp_path / "ours.tiktoken", special_tokens=[]) == ours
    text = shakespeare[20_000:60_000]
    assert ours.to_tiktoken().encode_ordinary(text) == ours.encode(text)


def test_special_tokens_of_a_rank_file(tmp_path):
    ours = small([EOT, "<|pad|>"])
    ours.save(tmp_path / "a.tiktoken")
    assert Tokenizer.load(tmp_path / "a.tiktoken").special_tokens == {EOT: 259}
    read = load_tokenizer(tmp_path / "a.tiktoken", special_tokens=[EOT, "<|pad|>"])
    assert read == ours
    swapped = Tokenizer.load(tmp_path / "a.tiktoken", special_tokens={EOT: 260, "<|pad|>": 259})
    assert swapped.encode(f"{EOT}<|pad|>", allowed_special="all") == [260, 259]
    with pytest.raises(
        ValueError, match=r"a\.tiktoken: the ids of the special tokens must start at"
    ):
        Tokenizer.load(tmp_path / "a.tiktoken", special_tokens={EOT: 300})
    with pytest.raises(TypeError, match="must be a list"):
        Tokenizer.load(tmp_path / "a.tiktoken", special_tokens=EOT)
    ours.save(tmp_path)
    with pytest.raises(ValueError, match=r"special_tokens can only be given for \*\.tiktoken"):
        Tokenizer.load(tmp_path, special_tokens=[EOT])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ls: [*ls[:7], ls[7] + b"\r", *ls[8:]], r"line 8: has a Windows line ending"),
        (lambda ls: [*ls[:7], b"!!!! 7", *ls[8:]], "line 8: is not base64"),
        (lambda ls: [*ls[:7], b"a 7", *ls[8:]], "line 8: is not base64"),
        (lambda ls: [*ls[:7], b"", *ls[8:]], "line 8: must be a token in base64, a space and"),
        (lambda ls: [*ls[:7], b" 7", *ls[8:]], "line 8: must be a token in base64"),
        (lambda ls: [*ls[:7], b"KA== -7", *ls[8:]], "line 8: must be a token in base64"),
        (lambda ls: [*ls[:7], b"KA== " + b"9" * 5000, *ls[8:]], "line 8: must be a token"),
        (lambda ls: [*ls, ls[3]], "line 260: repeats the token of line 4"),
        (lambda ls: [*ls, b"YWE= 3"], "line 260: repeats rank 3 of line 4"),
        (
            lambda ls: [*ls[:-1], b"aW4= 300"],
            "line 259: has rank 300, but no line has rank 258",
        ),
        (lambda ls: ls[:100], r"no line up to the last one \(100\) contains byte 0"),
        (lambda ls: [*ls[:-1], ls[-1][:-1]], "line 259: repeats rank 25 of line 26"),
        (lambda ls: [*ls[:-1], ls[-1][:-4]], "line 259: must be a token in base64"),
        (lambda ls: [*ls, b"YWJj 259"], r"token b'abc' of rank 259 cannot be merged from two"),
        (lambda ls: [], "line 1: must be a token in base64"),
    ],
)
def test_malformed_rank_files_are_rejected(lines, tmp_path, change, message):
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_rank_file_in_any_order_and_without_its_last_newline(lines, tmp_path):
    path = tmp_path / "whole.tiktoken"
    path.write_bytes(b"\n".join(reversed(lines)))
    assert Tokenizer.load(path) == small()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_rank_file_is_loaded_or_rejected(tmp_path, data):
    """Change, remove or insert bytes anywhere; the file must load or raise ValueError."""
    content = b"\n".join(b"%s %d" % (base64.b64encode(t), i) for i, t in enumerate(bpe.BYTES))
    content += b"\naGU= 256\ndGhl 257\n"
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(begin + 3, len(content))))
    path = tmp_path / "any.tiktoken"
    path.write_bytes(content[:begin] + data.draw(st.binary(max_size=3)) + content[end:])
    assert reads_or_refuses(path)


def reads_or_refuses(path):
    try:
        tokenizer = Tokenizer.load(path)
    except ValueError as error:
        return str(error).startswith(f"{path}: ")
    return tokenizer.decode(tokenizer.encode("the he é")) == "the he é"


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (small(order=(2, 0, 1)), "it merges in the order of ids, and these merges are in"),
        (
            Tokenizer([EOT.encode(), *bpe.BYTES], [], {EOT: 0}),
            "has id 0, before ids of ordinary tokens; save it as tokenizer.json",
        ),
        (
            Tokenizer([*bpe.BYTES, b"ab", b"bc", b"abc"], [(64, 65, 256), (65, 66, 257)], {}),
            "would merge a token from two other parts",  # abc, which no merge produces
        ),
        (
            Tokenizer(
                [*bpe.BYTES, b"ab", b"bc", b"abc"],
                [(64, 65, 256), (65, 66, 257), (64, 257, 258)],
                {},
            ),
            "would merge a token from two other parts",  # a + bc, where tiktoken merges ab first
        ),
        (Tokenizer([*bpe.BYTES, b"abc"], [], {}), "b'abc' of rank 256 cannot be merged from"),
    ],
)
def test_what_no_rank_file_can_hold(tokenizer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenizer.save(tmp_path / "a.tiktoken")
    assert not (tmp_path / "a.tiktoken").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_to_tiktoken_is_equal_or_refused(data):
    """Check for any order of merges that tokenizers not equivalent in tiktoken are rejected."""
    pytest.importorskip("tiktoken")
    words = data.draw(st.lists(st.text("ab", min_size=2, max_size=4), unique=True, max_size=8))
    tokens = [*bpe.BYTES, *map(str.encode, words)]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for word in tokens[256:]:  # every split of it into two tokens; mostly one, in order of ids
        splits = [(word[:k], word[k:]) for k in range(1, len(word)) if word[:k] in ids]
        found = [(ids[a], ids[b], ids[word]) for a, b in splits if b in ids]
        merges += data.draw(st.sampled_from([found[:1], found[-1:], found]))
    ours = Tokenizer(tokens, merges, {})
    try:
        theirs = ours.to_tiktoken()
    except ValueError:
        return
    for text in data.draw(st.lists(st.text("ab", max_size=12))):
        assert theirs.encode_ordinary(text) == ours.encode(text)


def test_gpt2_to_tiktoken(gpt2, multilingual):
    pytest.importorskip("tiktoken")
    theirs = gpt2.to_tiktoken(name="mine")
    assert (theirs.name, theirs.n_vocab, theirs.eot_token) == ("mine", 50257, 50256)
    assert theirs.encode_ordinary(multilingual[:9000]) == gpt2.encode(multilingual[:9000])
    text = f"one{EOT} two"
    assert theirs.encode(text, allowed_special="all") == gpt2.encode(text, allowed_special="all")


def test_special_tokens_first_to_tiktoken():
    """Convert a tokenizer that tiktoken supports, but its rank files do not."""
    pytest.importorskip("tiktoken")
    ours = Tokenizer([EOT.encode(), *bpe.BYTES, b"he"], [(72, 69, 257)], {EOT: 0})
    assert ours.encode("he") == [257]
    theirs = ours.to_tiktoken()
    assert theirs.encode(f"the{EOT}he", allowed_special="all") == ours.encode(
        f"the{EOT}he", allowed_special="all"
    )


def test_to_tiktoken_without_tiktoken(gpt2, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "tiktoken":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install tiktoken"):
        gpt2.to_tiktoken()


# --- OpenAI's merges, and Hugging Face's names for them ------------------------------------------


@pytest.mark.parametrize("name", ["vocab.bpe", "merges.txt"])
def test_merges_are_read_back(name, tmp_path, gpt2):
    for ours in (small(), small([]), small(["<|a|>", EOT], order=(2, 0, 1)), gpt2):
        ours.save(tmp_path / name)
        assert Tokenizer.load(tmp_path) == ours
        assert Tokenizer.load(tmp_path / name) == ours


def test_hugging_face_reads_our_merges(gpt2, tmp_path, multilingual):
    tokenizers = pytest.importorskip("tokenizers")
    for ours in (gpt2, small(order=(2, 0, 1))):
        ours.save(tmp_path / "merges.txt")
        files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        for text in [*TEXTS, multilingual]:
            assert theirs.encode(text).ids == ours.encode(text)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (small(order=(1, 0, 2)), "cannot represent the merge 't he': each merge must join"),
        (Tokenizer([*bpe.BYTES, b"abc"], [], {}), "represent token 'abc' without a merge"),
        (
            Tokenizer([*bpe.BYTES, b"he", b"he"], [(71, 68, 256)], {"he": 257}),
            "cannot represent a repeated name",
        ),
    ],
)
def test_what_merges_cannot_hold(tokenizer, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*save it as tokenizer.json"):
        tokenizer.save(tmp_path / "vocab.bpe")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_format_is_read_back_equal_or_not_written(tmp_path, data):
    words = data.draw(st.lists(st.text("ab", min_size=2, max_size=3), unique=True, max_size=6))
    specials = data.draw(st.lists(st.sampled_from([EOT, "ab", "<|x|>", "Ġ"]), unique=True))
    ordinary = [*bpe.BYTES, *map(str.encode, words)]
    first = data.draw(st.sampled_from([0, 256, len(ordinary)]))
    tokens = [*ordinary[:first], *map(str.encode, specials), *ordinary[first:]]
    id_of = {t: i + (len(specials) if i >= first else 0) for i, t in enumerate(ordinary)}
    splits = [(t[:k], t[k:]) for t in map(str.encode, words) for k in range(1, len(t))]
    pairs = [(a, b) for a, b in splits if a in id_of and b in id_of]
    merges = [(id_of[a], id_of[b], id_of[a + b]) for a, b in data.draw(st.permutations(pairs))]
    ours = Tokenizer(tokens, merges, {name: first + i for i, name in enumerate(specials)})
    for name in ("tokenizer.json", "vocab.bpe", "merges.txt", "a.tiktoken"):
        try:
            ours.save(tmp_path / name)
        except ValueError:
            continue
        names = specials if name.endswith(".tiktoken") else None
        assert Tokenizer.load(tmp_path / name, special_tokens=names) == ours


def test_a_name_that_says_no_format(gpt2, tmp_path):
    with pytest.raises(ValueError, match=r"name the file \*\.json, \*\.tiktoken, vocab\.bpe or"):
        gpt2.save(tmp_path / "mine")
    CharTokenizer("ab").save(tmp_path / "mine.json")  # it has only one format


# --- tokenizer.json as saved by newer versions of Hugging Face's tokenizers ----------------------


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split_by(pattern, behavior="Isolated", invert=False):
    how = {"behavior": behavior, "invert": invert}
    return {"type": "Split", "pattern": {"Regex": pattern}, **how}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


@pytest.mark.parametrize(
    "steps",
    [
        [{**BYTE_LEVEL, "use_regex": True}],
        *([split_by(pattern), {**BYTE_LEVEL, "use_regex": False}] for pattern in GPT2_PATTERNS),
        [split_by(GPT2_PATTERNS[0], "Removed", True), {**BYTE_LEVEL, "use_regex": False}],
    ],
)
def test_the_same_splitting_in_other_words(steps, tmp_path, multilingual):
    small().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["pre_tokenizer"] = sequence(*steps)
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path) == small()
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    for text in [*TEXTS, multilingual[:9000]]:
        assert theirs.encode(text).ids == small().encode(text)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [{"type": "Whitespace"}],
        [{**BYTE_LEVEL, "use_regex": False}],
        [split_by(GPT2_PATTERNS[0]), {**BYTE_LEVEL, "use_regex": True}],
        [split_by(GPT2_PATTERNS[0]), {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": False}],
        [split_by(r"\d"), {**BYTE_LEVEL, "use_regex": False}],
        [split_by(GPT2_PATTERNS[0], "Removed"), {**BYTE_LEVEL, "use_regex": False}],
        [split_by(GPT2_PATTERNS[0]), {**BYTE_LEVEL, "use_regex": False}, BYTE_LEVEL],
        7,
    ],
)
def test_another_splitting_is_refused(steps, tmp_path):
    small().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["pre_tokenizer"] = sequence(*steps) if steps != 7 else {"type": "Sequence"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: pre_tokenizer.* is not supported"):
        Tokenizer.load(path)
