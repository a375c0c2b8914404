"""Tests of Hugging Face's and OpenAI's vocabulary files, valid and malformed."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import Tokenizer, load_tokenizer
from fastgpt.tokenizer.bpe import GPT2_MERGES
from fastgpt.tokenizer.vocabulary_files import LETTER_OF_BYTE

TEXTS = ["Hello world", "don't  stop\n\n now", " 1234 é漢字 😀\t\x00", "x" * 200, ""]


@pytest.fixture(scope="module")
def hugging_face():
    return pytest.importorskip("tokenizers")


@pytest.fixture
def saved(tmp_path):
    """Return the contents of tokenizer.json for 260 ids, to be modified by the tests."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"the", b"in", b"<|endoftext|>"]
    merges = [(104, 101, 256), (116, 256, 257), (105, 110, 258)]
    Tokenizer(tokens, merges, {"<|endoftext|>": 259}).save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))


def test_hugging_face_reads_ours(gpt2, hugging_face, tmp_path, multilingual):
    gpt2.save(tmp_path)
    theirs = hugging_face.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, multilingual]:
        ids = gpt2.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.token_to_id("<|endoftext|>") == 50256
    assert theirs.encode("a<|endoftext|>").ids == [64, 50256]


def test_we_read_hugging_faces(gpt2, hugging_face, tmp_path, multilingual):
    gpt2.save(tmp_path)
    theirs = hugging_face.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.post_processor = hugging_face.processors.ByteLevel(trim_offsets=False)
    theirs.save(str(tmp_path / "theirs.json"))
    ours = Tokenizer.load(tmp_path / "theirs.json")
    assert ours == gpt2
    assert ours.encode(multilingual) == gpt2.encode(multilingual)


def test_we_read_a_trained_one(hugging_face, tmp_path, shakespeare, multilingual):
    """Load a vocabulary whose special token has the first id, which shifts the other ids."""
    theirs = hugging_face.Tokenizer(hugging_face.models.BPE())
    theirs.pre_tokenizer = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = hugging_face.decoders.ByteLevel()
    trainer = hugging_face.trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=hugging_face.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([shakespeare[:200_000]], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|pad|>": 1}
    assert ours.eot_token == 0
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in [*TEXTS, shakespeare[200_000:300_000], multilingual]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_openai_files(gpt2, tmp_path):
    shutil.copy(GPT2_MERGES, tmp_path / "vocab.bpe")
    assert Tokenizer.load(tmp_path) == gpt2
    assert Tokenizer.load(tmp_path / "vocab.bpe") == gpt2
    ids = gpt2_names(gpt2)
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    assert Tokenizer.load(tmp_path) == gpt2
    (tmp_path / "encoder.json").write_text(json.dumps({k: 50256 - v for k, v in ids.items()}))
    mirrored = Tokenizer.load(tmp_path)
    assert mirrored.eot_token == 0
    assert mirrored.encode("Hello world") == [50256 - 15496, 50256 - 995]
    ids["Ġthe-other"] = ids.pop("Ġthe")
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    with pytest.raises(ValueError, match=r"encoder\.json: token 'Ġthe' of vocab\.bpe is missing"):
        Tokenizer.load(tmp_path)


def gpt2_names(gpt2):
    names = {"".join(LETTER_OF_BYTE[byte] for byte in gpt2.token_bytes(i)): i for i in range(50256)}
    return {**names, "<|endoftext|>": 50256}


def test_old_names_of_hugging_face(gpt2, tmp_path):
    shutil.copy(GPT2_MERGES, tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text(json.dumps(gpt2_names(gpt2)))
    assert load_tokenizer(tmp_path) == gpt2


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.bpe"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.type", "WordPiece", "model.type = 'WordPiece' is not supported"),
        ("model.ignore_merges", True, "model.ignore_merges = True is not supported"),
        ("model.dropout", 0.1, "model.dropout = 0.1"),
        ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix = '</w>'"),
        ("normalizer", {"type": "NFC"}, "normalizer = .*NFC"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer.type = 'Whitespace'"),
        ("pre_tokenizer", None, "pre_tokenizer.type = None"),
        ("pre_tokenizer.add_prefix_space", True, "pre_tokenizer.add_prefix_space = True"),
        ("pre_tokenizer.use_regex", False, "pre_tokenizer.use_regex = False"),
        ("post_processor", {"type": "TemplateProcessing"}, "post_processor = .*: it adds tokens"),
        ("post_processor", {"type": "Sequence", "processors": [7]}, "post_processor = .*: it adds"),
        ("decoder", {"type": "BPEDecoder"}, "decoder.type = 'BPEDecoder'"),
        ("model", None, "model.type|vocabulary"),
        ("model.vocab", [], "must map each token to its id"),
        ("model.vocab.the", "262", "must map each token to its id"),
        ("model.vocab.the", 260, "each once: 257 is missing"),
        ("model.vocab.the", -1, "each once: 257 is missing"),
        ("model.vocab.the", 2**40, "each once: 257 is missing"),
        ("model.vocab.the", 0, "each once: 257 is missing"),
        ("model.vocab.two words", 260, "'two words' contains ' ', which does not"),
        ("model.merges", {}, "model.merges must be a list"),
        ("model.merges.2", "i n x", r"model.merges\[2\]: 'i n x' is not a pair"),
        ("model.merges.2", ["i", "漢"], r"model.merges\[2\]: .* is not a pair"),
        ("model.merges.2", 7, r"model.merges\[2\]: 7 is not a pair"),
        ("model.merges.2", ["i", ["n"]], r"model.merges\[2\]: .* is not a pair"),
        ("model.merges.2", "h e", r"model.merges\[2\]: 'h e' is repeated"),
        ("added_tokens.0.special", "false", r"added_tokens\[0\].special must be true or false"),
        ("added_tokens.0.content", None, r"added_tokens\[0\].content must be a string, not None"),
        ("added_tokens.0.id", None, "added token '<|endoftext|>' must have an id"),
        ("added_tokens.0.lstrip", True, r"added_tokens\[0\].*lstrip is not supported"),
        ("added_tokens.0.id", 7, "'<|endoftext|>' has two ids"),
        ("added_tokens.0", 7, r"added_tokens\[0\] must be an object, not 7"),
        ("added_tokens", 7, "added_tokens must be a list"),
    ],
)
def test_unsupported_or_malformed_json(saved, tmp_path, place, value, message):
    *folders, last = place.split(".")
    at = saved
    for key in folders:
        at = at[int(key) if key.isdigit() else key]
    at[int(last) if last.isdigit() else last] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message.replace("|endoftext|", r"\|endoftext\|")) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


def test_missing_byte_in_json(saved, tmp_path):
    saved["model"]["vocab"]["ab-no-byte"] = saved["model"]["vocab"].pop("\u0100")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"tokenizer\.json: (no token for byte 0|model\.merges)"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#version: 0.2\nh e\nh\n", "line 3: does not consist of two tokens"),
        (b"#version: 0.2\nh e\n\nl o\n", "line 3: does not consist of two tokens"),
        (b"#version: 0.2\nh  e\n", "line 2: does not consist of two tokens"),
        (b"h e\nl o w\n", "line 2: does not consist of two tokens"),
        (b"h e\n l\n", "line 2: does not consist of two tokens"),
        (b"h e\nl \n", "line 2: does not consist of two tokens"),
        (b"#version: 0.2\r\nh e\r\n", "line 2: contains a character that represents no byte"),
        (b"h e\nl \xff\n", "line 2: contains a character that represents no byte"),
        (b"h e\nl \xc4\n", "line 2: contains a character that represents no byte"),
        ("h e\nl 漢\n".encode(), "line 2: contains a character that represents no byte"),
        (b"h e\nlo w\n", "line 2: merges a token that no earlier line produces"),
        (b"h e\nh e\n", "line 2: produces the same token as an earlier line"),
        (b"a b\nb c\nab c\na bc\n", "line 4: produces the same token as an earlier line"),
        (b"#version: 0.2\nh e\nl o", "line 3: has no newline at its end"),
    ],
)
def test_malformed_merges_are_rejected(tmp_path, content, message):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_files_without_a_vocabulary_are_rejected(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(path)


SMALL = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.text("ab Ġ", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_json_is_loaded_or_rejected(tmp_path, data):
    """Replace any value in the file by any other; it must load or raise ValueError."""
    bytes_only = {letter: i for i, letter in enumerate(LETTER_OF_BYTE)}
    content = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 257, "content": "<|x|>", "special": True}],
        "model": {"type": "BPE", "vocab": {**bytes_only, "ab": 256}, "merges": ["a b"]},
    }
    places = [content, content["model"], content["added_tokens"][0], content["model"]["vocab"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(SMALL)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert reads_or_refuses(path, f"{path}: ")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=40) | st.text("ab Ġ\n", max_size=40).map(str.encode))
def test_any_merges_file_is_loaded_or_rejected(tmp_path, content):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(content)
    assert reads_or_refuses(path, f"{path}: line ")


def reads_or_refuses(path, complaint):
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        return str(error).startswith(complaint)
    return tokenizer.decode(tokenizer.encode("abba <|x|>")) == "abba <|x|>"


def test_save_refuses_two_tokens_of_one_name(gpt2, tmp_path):
    """Check that a merged and a special token of the same name are rejected when saved as JSON."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"ab"]
    tokenizer = Tokenizer(tokens, [(97, 98, 256)], {"ab": 257})
    assert tokenizer.encode("ab") == [256]
    assert tokenizer.encode("ab", allowed_special="all") == [257]
    with pytest.raises(ValueError, match="two tokens with the same name"):
        tokenizer.save(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: ([*t[:255], b"cd"], []), "no token for byte 255"),
        (lambda t, m: ([*t, b"a"], m), "token 257 is the same byte as token 97"),
        (lambda t, m: ([*t, b""], m), "token 257 is empty"),
        (lambda t, m: (t, [*m, (97, 98, 256)]), "merge 1 repeats merge 0"),
        (lambda t, m: (t, [(97, 98, 999)]), "merge 0 refers to an id that has no token"),
        (
            lambda t, m: (t, [(98, 97, 256)]),
            "merge 0 produces a token that is not the concatenation of its parts",
        ),
    ],
)
def test_constructor_checks(change, message):
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    with pytest.raises(ValueError, match=message):
        Tokenizer(*change(tokens, [(97, 98, 256)]), {})
    with pytest.raises(ValueError, match="is not the token of its id"):
        Tokenizer(tokens, [], {"<|x|>": 256})
