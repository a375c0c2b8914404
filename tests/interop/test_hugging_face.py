"""Import and export of Hugging Face folders, compared to transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fastgpt import GPT, CharTokenizer, GPTConfig, Tokenizer
from fastgpt.interop import load
from fastgpt.utils.errors import UsageError

SMALL = {"vocab_size": 301, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4}
# The four released shapes: layers, heads, width. The larger ones have only a few of their 24 to 48
# layers, which are identical in shape; complete models would take gigabytes and minutes.
SHAPES = {
    "124M": (12, 12, 768),
    "355M": (3, 16, 1024),
    "774M": (3, 20, 1280),
    "1.6B": (3, 25, 1600),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def theirs(noise: float = 0.1, **settings) -> GPT2LMHeadModel:
    """Return a GPT-2 of transformers with `noise` on all weights, to expose mistakes."""
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **ends, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model


def ids(model: GPT2LMHeadModel, batch: int = 2, time: int = 40) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, time))


@torch.no_grad()
def assert_same_logits(model: GPT2LMHeadModel, ours: GPT, time: int = 40) -> None:
    text = ids(model, time=time)
    torch.testing.assert_close(ours(text), model(text).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_in(tmp_path: Path, tied: bool, sharded: bool) -> None:
    model = theirs(tie_word_embeddings=tied, layer_norm_epsilon=1e-3)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else True
    ours = GPT.from_pretrained(tmp_path)
    assert not ours.training
    assert ours.config.dropout == 0.1
    assert_same_logits(model, ours)


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("kept", ["both", "head", "embedding", "different"])
def test_the_stored_tensors_decide_whether_the_head_is_tied(
    tmp_path: Path, kept: str, pickled: bool
) -> None:
    """`safetensors.torch.save_model` keeps only the head of a tied pair."""
    model = theirs()
    model.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kept == "head":
        del weights["transformer.wte.weight"]
    if kept == "embedding":
        del weights["lm_head.weight"]
    if kept == "different":
        weights["lm_head.weight"] += torch.randn_like(weights["lm_head.weight"])
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.tie_weights == (kept != "different")
    assert_same_logits(GPT2LMHeadModel.from_pretrained(tmp_path).eval(), ours)


def test_a_file_of_save_model_is_read(tmp_path: Path) -> None:
    model = theirs()
    model.config.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"), {"format": "pt"})
    assert "transformer.wte.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_logits(model, GPT.from_pretrained(tmp_path))


ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}


def test_the_other_names_of_settings_are_known(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    renamed = settings | {alias: settings.pop(name) for alias, name in ALIASES.items()}
    path.write_text(json.dumps(renamed))
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert_same_logits(model, GPT.from_pretrained(folder))
    path.write_text(json.dumps({**renamed, "n_embd": 48, "n_ctx": 7}))  # n_ctx is obsolete
    assert_same_logits(model, GPT.from_pretrained(folder))
    path.write_text(json.dumps({**renamed, "n_embd": 24}))
    with pytest.raises(UsageError, match=r"'n_embd', 'hidden_size'\) are names of one setting"):
        GPT.from_pretrained(folder)
    renamed["n_ctx"] = renamed.pop("max_position_embeddings")
    path.write_text(json.dumps(renamed))
    assert_same_logits(model, GPT.from_pretrained(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = theirs().to(dtype)
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(model.float(), ours)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights_come_without_code(tmp_path: Path, legacy: bool) -> None:
    """Old folders have names without a prefix, mask tensors and a pickle."""
    model = theirs()
    model.config.save_pretrained(tmp_path)
    weights = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    for layer in range(3):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    assert_same_logits(model, GPT.from_pretrained(tmp_path))

    marker = tmp_path / "ran"
    torch.save({"wte.weight": Malicious(marker)}, path)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin contains more than tensors"):
        GPT.from_pretrained(tmp_path)
    assert not marker.exists()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"pytorch_model\.bin cannot be read"):
        GPT.from_pretrained(tmp_path)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_out_and_in_again(tmp_path: Path, tied: bool, bias: bool) -> None:
    config = GPTConfig(301, 40, 2, 4, 48, dropout=0.2, bias=bias, tie_weights=tied)
    ours = GPT(config).eval()
    ours.save_pretrained(tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_logits(model.eval(), ours)
    again = GPT.from_pretrained(tmp_path / "out")
    assert again.config.dropout == 0.2
    for name, tensor in again.state_dict().items():
        expected = ours.state_dict().get(name, torch.zeros_like(tensor))
        assert torch.equal(tensor, expected), name
    with pytest.raises(UsageError, match=r"already contains config\.json"):
        ours.save_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_released_shapes_both_ways(tmp_path: Path, shape: str) -> None:
    n_layer, n_head, n_embd = SHAPES[shape]
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    model = theirs(0.02, vocab_size=50257, n_positions=1024, **sizes)
    model.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert_same_logits(model, ours, time=200)
    prompt = ids(model, 1, 20)
    expected = model.generate(prompt, max_new_tokens=100, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 100, temperature=0), expected)
    ours.save_pretrained(tmp_path / "ours")
    del ours
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


TEXTS = ("First Citizen:\nBefore we", "  two  spaces\n\n\tand more 12345", "naïve café 🙂 日本語")


@pytest.mark.parametrize("kind", ["gpt2", "own", "no end of text", "characters"])
def test_the_tokenizer_goes_along(tmp_path: Path, kind: str) -> None:
    text = "".join(TEXTS) * 3
    tokenizer = {
        "gpt2": Tokenizer.gpt2,
        "own": lambda: Tokenizer.train([text], 300),
        "no end of text": lambda: Tokenizer.train([text], 300, special_tokens=()),
        "characters": lambda: CharTokenizer.from_text(text),
    }[kind]()
    model = GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 1, 8))
    model.save_pretrained(tmp_path / "out", tokenizer)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(found) == tokenizer.vocab_size
    assert found.eos_token_id == tokenizer.eot_token
    assert found.model_max_length == 8
    found.model_max_length = 1000  # or it warns
    for text in TEXTS:
        expected = tokenizer.encode(text)
        assert found(text)["input_ids"] == expected
        assert found.decode(expected) == text
    if tokenizer.eot_token is not None:
        assert found("a<|endoftext|>")["input_ids"][-1] == tokenizer.eot_token
    assert load(tmp_path / "out")[1] == tokenizer
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.eot_token


def test_padded_rows_are_left_out_beside_a_tokenizer(tmp_path: Path) -> None:
    model = GPT(GPTConfig(50304, 8, 1, 1, 8, tie_weights=False)).eval()
    model.save_pretrained(tmp_path / "m", Tokenizer.gpt2())
    assert GPT.from_pretrained(tmp_path / "m").config.vocab_size == 50304
    cropped, tokenizer = load(tmp_path / "m")
    assert cropped.config.vocab_size == tokenizer.vocab_size == 50257
    text = torch.tensor([[1, 2, 50256]])
    assert torch.equal(cropped(text), model(text)[..., :50257])
    small = GPT(GPTConfig(300, 8, 1, 1, 8))
    small.save_pretrained(tmp_path / "small", Tokenizer.gpt2())
    with pytest.raises(UsageError, match="tokenizer has 50,257 ids, but its model only 300"):
        load(tmp_path / "small")


# --- what is not as it must be ---------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs().save_pretrained(tmp_path)
    return tmp_path


def test_every_mismatched_tensor_is_listed(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.0.ln_1.weight"] = torch.zeros(47)
    weights["transformer.h.1.surplus"] = weights.pop("transformer.h.1.attn.c_attn.bias")
    save_file(weights, path)
    with pytest.raises(UsageError) as info:
        GPT.from_pretrained(folder)
    for part in (
        "h.0.ln_1.weight is [47] instead of [48]",
        "h.1.surplus is not in the model",
        "h.1.attn.c_attn.bias is missing",
    ):
        assert part in str(info.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'gpt2' is supported"),
        ({"activation_function": "relu"}, "activation_function = 'relu' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"n_inner": 100}, "n_inner = 100 is not supported"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head"),
        ({"n_layer": "three"}, "config.json: n_layer must be an integer, not 'three'"),
        ({"n_layer": True}, "config.json: n_layer must be an integer, not True"),
        ({"n_layer": None}, "config.json: n_layer must be an integer, not None"),
        ({"vocab_size": 10**30}, "config.json: vocab_size must be at most 16777216"),
        ({"vocab_size": 301.0}, "config.json: vocab_size must be an integer, not 301.0"),
        ({"resid_pdrop": None}, "config.json: resid_pdrop must be a number, not None"),
        ({"resid_pdrop": "0.1"}, "config.json: resid_pdrop must be a number, not '0.1'"),
        ({"layer_norm_epsilon": "1e-5"}, "config.json: layer_norm_epsilon must be a number"),
        ({"layer_norm_epsilon": None}, "config.json: layer_norm_epsilon must be a number"),
        ({"layer_norm_epsilon": math.inf}, "config.json: layer_norm_epsilon must be in [0, 1]"),
        ({"layer_norm_epsilon": math.nan}, "config.json: layer_norm_epsilon must be in [0, 1]"),
        ({"layer_norm_epsilon": 10**400}, "config.json: layer_norm_epsilon must be a number"),
        (
            {"tie_word_embeddings": "false"},
            "config.json: tie_word_embeddings must be true or false",
        ),
        ({"tie_word_embeddings": None}, "config.json: tie_word_embeddings must be true or false"),
        ({"n_layer": 4}, "h.3.ln_1.weight is missing"),
    ],
)
def test_settings_that_would_compute_something_else(folder: Path, changes, message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError) as info:
        GPT.from_pretrained(folder)
    assert message in str(info.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "index"])
def test_malformed_files_are_rejected(tmp_path: Path, file: str, content: bytes) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="60KB" if file == "index" else "1GB")
    name = "model.safetensors.index.json" if file == "index" else file
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        GPT.from_pretrained(tmp_path)


def test_faults_1_and_4_a_part_cut_short_or_missing(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="60KB")
    last = max(tmp_path.glob("model-*.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=last.name):
        GPT.from_pretrained(tmp_path)
    last.unlink()
    with pytest.raises(UsageError, match=last.name):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "..", "", 3])
def test_an_index_that_points_outside_the_folder_is_rejected(tmp_path: Path, place) -> None:
    inside = tmp_path / "inside"
    theirs().save_pretrained(inside, max_shard_size="60KB")
    shutil.copy(next(inside.glob("model-00001*")), tmp_path / "model.safetensors")
    index = inside / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], place)
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"index\.json"):
        GPT.from_pretrained(inside)


def test_nothing_and_the_unknown(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="give a run folder of fastgpt; or"):
            GPT.from_pretrained(path)
    with pytest.raises(UsageError, match="gpt2-xxl is not a local file or folder") as info:
        GPT.from_pretrained("gpt2-xxl")
    assert "save config.json, model.safetensors" in str(info.value)
    for name in ("./gpt2", "gpt2/", "/no/gpt2"):  # local paths are never looked up on the Hub
        with pytest.raises(UsageError, match="gpt2 does not exist; give a run folder"):
            GPT.from_pretrained(name)


def test_a_tokenizer_that_is_not_known(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer for its 301 token ids"):
        load(folder)
