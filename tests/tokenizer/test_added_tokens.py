"""Tokens that the files of a Hugging Face folder add to a vocabulary, compared to transformers."""

import json
from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.interop import load
from fastgpt.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.utils.errors import UsageError

transformers = pytest.importorskip("transformers")

WORDS = "the quick brown fox jumps over the lazy dog "
SIZE = 289  # of the vocabulary below: 256 bytes, 32 merges, <|endoftext|>
EOT = "<|endoftext|>"
TEXTS = (
    "the <x> fox<|endoftext|> <pad>the<x><x>",
    "<x>, fox<pad><y>",
    "<<x>> <|endoftext|> the\n<pad> jumps",
    "a foxfox <z>!",
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([WORDS * 5], SIZE)


@pytest.fixture(params=["tokenizer.json", "merges.txt"])
def folder(tmp_path: Path, tokenizer, request) -> Path:
    tokenizer.save(tmp_path / request.param)
    transformers.GPT2Config(vocab_size=SIZE).save_pretrained(tmp_path)
    return tmp_path


def write(folder: Path, **files) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def assert_same_ids(folder: Path) -> Tokenizer:
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allowed_special="all") == ids
        assert ours.decode(ids) == theirs.decode(ids)
    return ours


def token(content: str, special: bool = False, **flags) -> dict:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"content": content, **usual, "special": special, **flags}


DECODER = {"288": token(EOT, special=True), "289": token("<x>")}
CASES = {
    "nothing": {},
    "a decoder": {"tokenizer_config": {"added_tokens_decoder": DECODER}},
    "a decoder and a role": {
        "tokenizer_config": {"added_tokens_decoder": DECODER, "pad_token": "<pad>"}
    },
    "the decoder hides the older files": {
        "tokenizer_config": {"added_tokens_decoder": DECODER},
        "added_tokens": {"<y>": 290},
        "special_tokens_map": {"pad_token": "<pad>"},
    },
    "only the older file": {"added_tokens": {"<x>": 289, "<y>": 290}},
    "both older files": {
        "added_tokens": {"<x>": 289, "<y>": 290},
        "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<y>"]},
    },
    "a role": {"special_tokens_map": {"pad_token": "<pad>", "eos_token": token(EOT)}},
    "several roles": {
        "tokenizer_config": {"mask_token": "<x>", "picture_token": "<z>"},
        "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<y>"]},
    },
    "extra special tokens": {"tokenizer_config": {"extra_special_tokens": ["<x>", "<y>"]}},
    "extra special tokens by name": {
        "tokenizer_config": {"extra_special_tokens": {"a": "<x>", "b": "<y>"}}
    },
    "a word that is in the vocabulary": {"added_tokens": {"o": 78, "<x>": 289}},
    "an older class": {
        "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<x>"}
    },
    "settings without an effect": {
        "tokenizer_config": {
            "add_prefix_space": False,
            "add_bos_token": False,
            "bos_token": EOT,
            "pad_token": None,
            "model_max_length": 3,
        }
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(folder: Path, case: str) -> None:
    write(folder, **CASES[case])
    assert_same_ids(folder)


def test_added_words_are_found_in_every_text_and_special_ones_on_demand(folder: Path) -> None:
    write(folder, added_tokens={"<x>": 289}, special_tokens_map={"pad_token": "<pad>"})
    ours = load_tokenizer(folder)
    assert ours.special_tokens == {EOT: 288, "<pad>": 290}
    assert ours.added_tokens == {"<x>": 289}
    assert 289 in ours.encode("a<x>b")
    assert 290 not in ours.encode("a<pad>b")
    assert 290 in ours.encode("a<pad>b", allowed_special={"<pad>"})
    ids, offsets = ours.encode_with_offsets("é<x>")
    assert ids[-1] == 289
    assert offsets[-1].tolist() == [1, 4]


def test_saved_again_they_are_the_same(folder: Path, tmp_path_factory) -> None:
    write(folder, added_tokens={"<x>": 289}, special_tokens_map={"pad_token": "<pad>"})
    ours, again = load_tokenizer(folder), tmp_path_factory.mktemp("again")
    GPT(GPTConfig(291, 8, 1, 1, 8)).save_pretrained(again, ours)
    assert assert_same_ids(again) == ours
    assert ours.fingerprint != Tokenizer(*ours.vocabulary).fingerprint
    for name in ("vocab.bpe", "merges.txt", "a.tiktoken"):
        with pytest.raises(ValueError, match=f"{name} cannot represent the added token '<x>'"):
            ours.save(again / name)
    with pytest.raises(ValueError, match="tiktoken cannot represent the added token '<x>'"):
        ours.to_tiktoken()


@pytest.mark.parametrize("kind", ["bytes", "characters"])
@pytest.mark.parametrize("used", [True, False])
def test_our_export_saved_by_transformers_is_read(tmp_path, tokenizer, kind, used) -> None:
    """transformers adds a post-processor that does nothing, and the settings of the last call."""
    ours = tokenizer if kind == "bytes" else CharTokenizer.from_text(WORDS)
    GPT(GPTConfig(ours.vocab_size, 8, 1, 1, 8)).save_pretrained(tmp_path / "a", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    if used and kind == "bytes":
        theirs.pad_token = theirs.eos_token
        theirs([WORDS, "the"], padding=True, truncation=True, max_length=4)
    theirs.save_pretrained(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    assert content["post_processor"]["type"] == "TemplateProcessing"
    assert (content["truncation"] is not None) == (used and kind == "bytes")
    assert load_tokenizer(tmp_path / "b") == ours
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    again.model_max_length = 100
    assert again(WORDS)["input_ids"] == ours.encode(WORDS)


def test_tokens_added_in_transformers_keep_their_rows(tmp_path, tokenizer) -> None:
    model = GPT(GPTConfig(SIZE, 8, 1, 1, 8))
    model.save_pretrained(tmp_path / "a", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    named.add_tokens(["<x>", "<y>"])
    named.add_special_tokens({"pad_token": "<pad>"})
    theirs.resize_token_embeddings(len(named), mean_resizing=False)
    theirs.save_pretrained(tmp_path / "b")
    named.save_pretrained(tmp_path / "b")
    ours = assert_same_ids(tmp_path / "b")
    assert ours.added_tokens == {"<x>": 289, "<y>": 290}
    loaded, _ = load(tmp_path / "b")
    assert torch.equal(loaded.wte.weight, theirs.transformer.wte.weight)
    assert loaded.config.vocab_size == 292


def test_a_padding_token_without_a_row_is_left_out(folder: Path, tokenizer) -> None:
    """transformers, too, loads such a model; it fails only if it is given the id."""
    model = GPT(GPTConfig(SIZE, 8, 1, 1, 8))
    (folder / "config.json").unlink()
    own = {
        name: (folder / name).read_bytes()
        for name in ("tokenizer.json",)
        if (folder / name).exists()
    }
    for name in own:
        (folder / name).unlink()
    model.save_pretrained(folder)
    for name, content in own.items():
        (folder / name).write_bytes(content)
    write(folder, special_tokens_map={"pad_token": "<pad>"})
    assert load_tokenizer(folder).special_tokens["<pad>"] == SIZE
    assert load(folder)[1] == tokenizer


REJECTED = [
    ({"tokenizer_config": {"add_prefix_space": True}}, "add_prefix_space = true is not supported"),
    ({"tokenizer_config": {"added_tokens_decoder": {"289": token("a", lstrip=True)}}}, "lstrip"),
    ({"tokenizer_config": {"added_tokens_decoder": {"x": token("a")}}}, "'x' is not an id"),
    ({"tokenizer_config": {"added_tokens_decoder": {"289": 3}}}, "289 must be an object, not 3"),
    ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object"),
    ({"tokenizer_config": {"pad_token": 3}}, "pad_token must be an object, not 3"),
    ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra_special_tokens must be a list"),
    ({"tokenizer_config": []}, "its content must be an object"),
    ({"special_tokens_map": {"pad_token": {"content": 3}}}, "pad_token.content must be a string"),
    ({"added_tokens": {"<x>": "289"}}, "<x>: id must be an integer"),
    ({"added_tokens": {"<x>": 10**30}}, "<x>: id must be at most"),
    ({"added_tokens": {"<x>": 300}}, "each once: 289 is missing"),
    ({"added_tokens": {"<x>": 12}}, "each once: 289 is missing|the ids must be"),
    ({"added_tokens": {"": 289}}, "an added token must not be empty"),
    ({"added_tokens": {"two words": 289}}, "'two words' is not supported: white space within it"),
    (
        {"added_tokens": {"<x><pa": 289}, "special_tokens_map": {"pad_token": "<pad>"}},
        "'<pad>' and '<x><pa' are not supported: they overlap",
    ),
    (
        {"added_tokens": {"<pad>s": 289}, "special_tokens_map": {"pad_token": "<pad>"}},
        "'<pad>' and '<pad>s' are not supported: they overlap",
    ),
]


@pytest.mark.parametrize(("files", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_what_would_give_other_ids_is_rejected(folder: Path, files, message: str) -> None:
    write(folder, **files)
    with pytest.raises(ValueError, match=message) as info:
        load_tokenizer(folder)
    assert str(folder) in str(info.value)
    assert "\n" not in str(info.value)


def test_a_token_that_starts_every_text_is_rejected(tmp_path: Path, tokenizer) -> None:
    """In transformers, `tokenizer.json` decides about it, if there is one."""
    tokenizer.save(tmp_path / "merges.txt")
    write(tmp_path, tokenizer_config={"add_bos_token": True})
    with pytest.raises(ValueError, match="add_bos_token = true is not supported"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    transformers.GPT2Config(vocab_size=SIZE).save_pretrained(tmp_path)
    assert assert_same_ids(tmp_path) == tokenizer


def test_a_list_that_the_config_replaces_is_rejected(tmp_path: Path, tokenizer) -> None:
    Tokenizer(*tokenizer.vocabulary).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 289, **token("<x>")})
    write(tmp_path, tokenizer=content, tokenizer_config={"added_tokens_decoder": {}})
    with pytest.raises(ValueError, match="'<x>' is not in added_tokens_decoder of"):
        load_tokenizer(tmp_path)


def test_a_character_vocabulary_has_no_added_tokens(tmp_path: Path) -> None:
    characters = CharTokenizer.from_text(WORDS)
    characters.save(tmp_path)
    assert load_tokenizer(tmp_path) == characters
    write(tmp_path, special_tokens_map={"pad_token": "<pad>"})
    with pytest.raises(ValueError, match="cannot have the added token '<pad>'"):
        load_tokenizer(tmp_path)
    GPT(GPTConfig(27, 8, 1, 1, 8)).save_pretrained(tmp_path / "a", characters)
    write(tmp_path / "a", tokenizer_config={"pad_token": "<pad>"})
    with pytest.raises(UsageError, match="cannot have the added token '<pad>'"):
        load(tmp_path / "a")
