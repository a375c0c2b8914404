"""GGUF files: all values and keys that llama.cpp needs, read back with the package `gguf`."""

import contextlib
import itertools
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.data.pipeline import prepare
from fastgpt.interop import gguf as exported
from fastgpt.interop import load
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer
from fastgpt.training.recipes import Recipe
from fastgpt.training.trainer import Trainer
from fastgpt.utils.errors import UsageError

CONFIG = GPTConfig(vocab_size=12, block_size=10, n_layer=2, n_head=2, n_embd=32)
CHARACTERS = "\n\t\\ abcxn\0\x7f<"
LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOP = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}


def random_model(config: GPTConfig = CONFIG) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def by_its_names(model: GPT) -> dict[str, Tensor]:
    named = {}
    for name, tensor in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module in TOP:
            named[f"{TOP[module]}.{kind}"] = tensor
        else:
            _, layer, module = module.split(".", 2)
            named[f"blk.{layer}.{LAYER[module]}.{kind}"] = tensor
    return named


def write(
    tmp_path: Path, model: GPT, tokenizer: BaseTokenizer, precision: exported.Precision = "f32"
) -> gguf.GGUFReader:
    path = tmp_path / "new" / f"model-{precision}.gguf"
    exported.write(model, path, tokenizer, precision)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return gguf.GGUFReader(path)


def keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_tensor_is_there_to_the_bit(bias: bool, tie_weights: bool, tmp_path: Path) -> None:
    model = random_model(replace(CONFIG, bias=bias, tie_weights=tie_weights))
    tensors = write(tmp_path, model, CharTokenizer(CHARACTERS)).tensors
    expected = by_its_names(model)
    for name, tensor in by_its_names(GPT(replace(CONFIG, bias=True))).items():
        expected.setdefault(name, torch.zeros_like(tensor))  # biases that the model lacks
    assert {tensor.name for tensor in tensors} == expected.keys()
    assert ("output.weight" in expected) != tie_weights
    for tensor in tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, expected[tensor.name].numpy()), tensor.name


@pytest.mark.parametrize(
    ("precision", "file_type", "worst"),
    [("f16", 1, 2**-11), ("bf16", 32, 2**-8), ("q8_0", 7, 1 / 254 + 2**-10)],
)
def test_matrices_may_be_smaller(
    precision: exported.Precision, file_type: int, worst: float, tmp_path: Path
) -> None:
    """The error of each value is within the type's limit, relative to the value or its block."""
    model = random_model()
    reader = write(tmp_path, model, CharTokenizer(CHARACTERS), precision)
    assert keys(reader)["general.file_type"] == file_type
    expected = by_its_names(model)
    for tensor in reader.tensors:
        exact = expected[tensor.name].numpy()
        if exact.ndim == 1 or tensor.name == "position_embd.weight":
            assert np.array_equal(tensor.data, exact)
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType[precision.upper()]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == exact.shape
        blocks = exact.reshape(-1, 32)
        scale = abs(blocks).max(1, keepdims=True) if precision == "q8_0" else abs(blocks)
        assert (abs(values.reshape(-1, 32) - blocks) <= worst * scale + 1e-7).all()


def test_the_shape_and_the_settings_are_the_models(tmp_path: Path) -> None:
    config = replace(CONFIG, layer_norm_eps=1e-4)
    found = keys(write(tmp_path, random_model(config), CharTokenizer(CHARACTERS)))
    eps = found.pop("gpt2.attention.layer_norm_epsilon")
    assert eps == pytest.approx(1e-4)
    assert {key: value for key, value in found.items() if "tokenizer" not in key} == {
        "general.architecture": "gpt2",
        "general.file_type": 0,
        "gpt2.vocab_size": 12,
        "gpt2.context_length": 10,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
    }


def letters() -> dict[str, int]:
    """Return the byte of each character in the byte encoding of GPT-2's vocabulary.

    Printable bytes are their own characters; the others are numbered from U+0100 on.
    """
    prints = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace() and b != 0xAD]
    others = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(others)}


def encode_by(found: dict[str, Any], text: str) -> list[int]:
    """Encode one word with the tokens and merges of a file by a naive algorithm."""
    byte_letters = {byte: letter for letter, byte in letters().items()}
    parts = [byte_letters[byte] for byte in text.encode()]
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(found["tokenizer.ggml.merges"])}
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        at = next(i for i in range(len(parts)) if (*parts[i : i + 2],) == best)
        parts[at : at + 2] = ["".join(best)]
    return [found["tokenizer.ggml.tokens"].index(part) for part in parts]


def test_byte_pairs_have_the_same_ids(checkout: Path, tmp_path: Path) -> None:
    text = (checkout / "tests" / "assets" / "multilingual.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([text[:20_000]], 600, special_tokens=["<|endoftext|>", "<|x y|>"])
    config = replace(CONFIG, vocab_size=604, n_layer=1)
    found = keys(write(tmp_path, random_model(config), tokenizer))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 604
    for token_id in range(598):
        stands_for = bytes(letters()[letter] for letter in tokens[token_id])
        assert stands_for == tokenizer.token_bytes(token_id)
    assert tokens[598:600] == ["<|endoftext|>", "<|x y|>"]
    assert types == [1] * 598 + [3] * 2 + [5] * 4
    for word in {*text[:3000].split(), "éé", "  ", "\n\n", "日本語"}:
        assert encode_by(found, word) == tokenizer.encode(word), word
    others = {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    assert {key: others[key] for key in others if not isinstance(others[key], list)} == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 598,
        "tokenizer.ggml.eos_token_id": 598,
        "tokenizer.ggml.unknown_token_id": 598,
        "tokenizer.ggml.add_bos_token": False,
    }


def test_gpt2s_own_vocabulary(tmp_path: Path) -> None:
    model = random_model(GPTConfig(50257, 4, 1, 1, 4))
    found = keys(write(tmp_path, model, Tokenizer.gpt2()))
    tokens, merges = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.merges"]
    assert (tokens[0], tokens[220], tokens[198]) == ("!", "Ġ", "Ċ")
    assert (tokens[262], tokens[50256]) == ("Ġthe", "<|endoftext|>")
    assert (len(merges), merges[0]) == (50_000, "Ġ t")


def test_added_words_are_user_defined_tokens(tmp_path: Path) -> None:
    """llama.cpp finds these in every text, and control tokens only on demand."""
    tokens, merges, specials = Tokenizer.train(["the lazy dog " * 9], 260).vocabulary
    ours = Tokenizer([*tokens, b"<x>"], merges, specials, {"<x>": 260})
    reader = write(tmp_path, random_model(replace(CONFIG, vocab_size=261)), ours)
    types = keys(reader)["tokenizer.ggml.token_type"]
    assert types[259:] == [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    assert set(types[:259]) == {gguf.TokenType.NORMAL}
    assert load(tmp_path / "new" / "model-f32.gguf")[1] == ours


def test_single_characters_are_rwkvs_tokens(tmp_path: Path) -> None:
    """Tokens are escaped with backslashes as in RWKV's vocabulary, and unescaped here."""
    config = replace(CONFIG, vocab_size=len(CHARACTERS) + 2)
    found = keys(write(tmp_path, random_model(config), CharTokenizer(CHARACTERS)))
    tokens = found["tokenizer.ggml.tokens"]
    unescaped = [token.encode().decode("unicode_escape") for token in tokens]
    assert "".join(unescaped[: len(CHARACTERS)]) == CHARACTERS
    # No UTF-8 text begins like the token of an unused row.
    assert [ord(name[0]) for name in unescaped[len(CHARACTERS) :]] == [0xFF, 0xFF]
    assert found["tokenizer.ggml.token_type"] == [1] * len(CHARACTERS) + [5, 5]
    assert found["tokenizer.ggml.model"] == "rwkv"
    assert not any(key.endswith("token_id") for key in found)  # nothing ends a text


REFUSED: list[tuple[BaseTokenizer | None, dict[str, Any], str]] = [
    (None, {}, "requires the model's tokenizer"),
    (CharTokenizer(CHARACTERS + "yz"), {}, "14 ids, the model only 12"),
    (CharTokenizer("aé"), {}, "no tokenizer for single characters such as 'é'"),
    (Tokenizer.train(["aa aa"], 257, special_tokens=[]), {"vocab_size": 257}, "at token 11"),
    (Tokenizer.train(["a"], 257), {"vocab_size": 257}, "without merges"),
    (CharTokenizer(CHARACTERS), {"n_embd": 48}, "multiple of 32, not 48"),
]


@pytest.mark.parametrize(("tokenizer", "change", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_llama_cpp_cannot_hold_is_not_written(
    tokenizer: BaseTokenizer | None, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(UsageError, match=message):
        exported.write(GPT(replace(CONFIG, **change)), path, tokenizer, "q8_0")
    assert not [*tmp_path.iterdir()]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="already exists"):
        exported.write(GPT(CONFIG), path, CharTokenizer(CHARACTERS))
    assert path.read_bytes() == b"mine"


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install gguf"):
        exported.write(GPT(CONFIG), tmp_path / "model.gguf", CharTokenizer(CHARACTERS))


# --- in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("characters", [True, False])
def test_what_is_written_is_read_back_to_the_bit(
    characters: bool, tie_weights: bool, tmp_path: Path
) -> None:
    tokenizer: BaseTokenizer = CharTokenizer(CHARACTERS)
    if not characters:
        tokenizer = Tokenizer.train(["a text of some more words, a text"], 266)
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size + 3, tie_weights=tie_weights)
    model = random_model(replace(config, layer_norm_eps=1e-6))
    exported.write(model, tmp_path / "model.gguf", tokenizer)
    read = GPT.from_pretrained(tmp_path / "model.gguf")
    assert read.config == model.config
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read.state_dict().items())
    cropped, its_tokenizer = load(tmp_path / "model.gguf")
    assert its_tokenizer == tokenizer
    assert cropped.config.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0"])
def test_other_types_are_read(precision: exported.Precision, tmp_path: Path) -> None:
    model = random_model()
    exported.write(model, tmp_path / "model.gguf", CharTokenizer(CHARACTERS), precision)
    read = GPT.from_pretrained(tmp_path / "model.gguf").state_dict()
    for name, tensor in model.state_dict().items():
        assert read[name].dtype == torch.float32
        assert (read[name] - tensor).abs().max() <= 0.01 * tensor.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "architecture 'llama', not 'gpt2'"),
        ({"gpt2.block_count": 3}, "h.2.ln_1.weight is missing"),
        ({"gpt2.attention.head_count": 5}, "32 is not a multiple of 5"),
        ({"tokenizer.ggml.model": "llama"}, "of the kind .'llama', None. is not supported"),
    ],
)
def test_what_is_no_gpt2_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_key_value
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_key_value",
        lambda self, key, value, *types: add(self, key, change.get(key, value), *types),
    )
    exported.write(random_model(), tmp_path / "model.gguf", CharTokenizer(CHARACTERS))
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    exported.write(random_model(replace(CONFIG, n_layer=1)), path, CharTokenizer(CHARACTERS))
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(4, 60_000), flips=st.lists(st.integers(32, 8 * 1600), max_size=3))
def test_damaged_files_are_refused_or_read(
    size: int, flips: list[int], whole: bytes, tmp_path: Path
) -> None:
    content = bytearray(whole[:size])
    for flip in flips:
        if flip // 8 < len(content):
            content[flip // 8] ^= 1 << flip % 8
    (tmp_path / "model.gguf").write_bytes(content)
    with contextlib.suppress(UsageError):  # no other exception is allowed
        load(tmp_path / "model.gguf")


def test_a_damaged_length_does_not_keep_the_reader_busy(whole: bytes, tmp_path: Path) -> None:
    content = bytearray(whole)
    key = b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 4 + 4  # after the types of the value and of its items
    assert struct.unpack_from("<Q", content, at) == (12,)
    struct.pack_into("<Q", content, at, 2**60)
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UsageError, match="inside its keys"):
        load(tmp_path / "model.gguf")


# --- llama.cpp itself, where it is installed ---------------------------------------------------

# llama.cpp's GELU and key/value cache have half precision. For q8_0, the error is 1/254 of a
# block's largest weight, times an accumulation over a few layers.
CLOSE = {"f32": 0.01, "f16": 0.01, "bf16": 0.1, "q8_0": 0.3}


@pytest.fixture(scope="module", params=["byte pairs", "characters"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small model on the packaged text until it generates words."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("trained")
    recipe = Recipe(n_layer=2, n_head=2, n_embd=64, block_size=128, max_steps=400, lr=3e-3)
    if request.param == "byte pairs":
        text = Path(sys.modules["fastgpt"].__file__ or "").parent / "assets" / "tinyshakespeare.txt"
        prepare([text], folder / "data", train_vocab=512)
        recipe = replace(recipe, data=str(folder / "data"), bias=True)
    small = replace(recipe, out=str(folder / "run"), device="cpu", dtype="float32")
    return Trainer(replace(small, batch_size=8, warmup_steps=40, eval_interval=200)).fit().run


@pytest.mark.slow
@pytest.mark.parametrize("precision", get_args(exported.Precision))
def test_llama_cpp_computes_and_writes_the_same(
    precision: exported.Precision, trained: Path, checkout: Path, tmp_path: Path
) -> None:
    import llama_cpp

    model, tokenizer = load(trained)
    path = tmp_path / "model.gguf"
    exported.write(model, path, tokenizer, precision)
    llama = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    for text in texts(checkout, ascii_only=isinstance(tokenizer, CharTokenizer)):
        ids = tokenizer.encode(text, errors="ignore")
        text = tokenizer.decode(ids)  # the text without characters that are not in the vocabulary
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        assert llama.detokenize(ids) == text.encode()

    ids = tokenizer.encode(texts(checkout, ascii_only=True)[0])[:128]
    llama.eval(ids)
    theirs = torch.from_numpy(llama.scores[: len(ids)].copy())
    ours = model(torch.tensor([ids]))[0].detach()
    assert (theirs - ours).abs().max() < CLOSE[precision]

    prompt = tokenizer.encode("ROMEO:\nWhat")
    written = model.generate(torch.tensor([prompt]), 100, temperature=0)[0].tolist()
    llama.reset()
    llama.eval(prompt)
    for token_id in written[len(prompt) :]:
        row = llama.scores[llama.n_tokens - 1]
        # the same greedy text, except for tokens of equal logits within the type's precision
        assert row.max() - row[token_id] <= (0 if precision == "f32" else CLOSE[precision])
        llama.eval([token_id])


def texts(checkout: Path, *, ascii_only: bool) -> list[str]:
    """Return diverse texts; the first is like the model's training data."""
    play = (checkout / "fastgpt" / "assets" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    found = [play[at : at + 400] for at in range(0, 400_000, 20_000)]
    found += ["  a  b   c\n\n\n d e ", "it's we're I'LL don't '  's", " ", "\n", "-- a:b;c"]
    if not ascii_only:
        many = (checkout / "tests" / "assets" / "multilingual.txt").read_text(encoding="utf-8")
        found += [many[at : at + 500] for at in range(0, len(many), 5000)]
        found += [
            "x²½Ⅷ ٣٤ 123 4567",
            "👩\u200d👧 é e\u0301 \u00a0\u2003x",
            "a\r\nb\0c\x7f\t\t",
            "<|endoftext|>",
        ]
    return found
