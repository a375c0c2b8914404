"""Random damage to JSON files: the result is the model that the file describes, or one line.

Every file is changed at a random place, many times. `fastgpt.load` must then either fail with a
UsageError of one line, with which a command ends with exit code 2, or return what another
implementation makes of the same file.
"""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastgpt import GPT, GPTConfig, Tokenizer
from fastgpt.checkpoint.save import Checkpointer
from fastgpt.interop import load
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils import cli
from tests.checkpoint.states import state_of

transformers = pytest.importorskip("transformers")

TEXT = "the quick brown fox jumps over the lazy dog "
TEXTS = (TEXT, "<x>fox<|endoftext|> <pad><pad>", "a\n 12 é<x><x>")
IDS = torch.tensor([[3, 200, 288, 7, 7, 290]])
CONFIG = GPTConfig(vocab_size=291, block_size=9, n_layer=2, n_head=2, n_embd=16)
CHECKPOINT = "checkpoints/step-00000007"
WRITTEN = ("manifest.json", "model.safetensors")


# --- the folders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(3)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokens, merges, specials = Tokenizer.train([TEXT * 5], 289).vocabulary
    specials = {**specials, "<pad>": 290}
    return Tokenizer([*tokens, b"<x>", b"<pad>"], merges, specials, {"<x>": 289})


@pytest.fixture
def hugging_face(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A folder of transformers, in two shards."""
    model.save_pretrained(tmp_path / "whole", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    return tmp_path / "m"


@pytest.fixture
def older_hugging_face(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A folder of transformers with the tokenizer's files from before tokenizer.json."""
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    tokens, merges, specials = tokenizer.vocabulary
    end = {"<|endoftext|>": specials["<|endoftext|>"]}
    Tokenizer(tokens[:289], merges, end).save(folder / "merges.txt")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 289, "<pad>": 290}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    assert load(folder)[1] == tokenizer
    return folder


@pytest.fixture
def run(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path / "m"
    hashes = {"tokenizer_hash": tokenizer.fingerprint, "extra": {"best": 1.5, "bad": [0]}}
    with Checkpointer(folder) as checkpointer:
        optimizer = torch.optim.AdamW(model.parameters())
        checkpointer.save(state_of(model, optimizer, 7, 2.5, **hashes))
    (folder / "config.json").write_text(json.dumps({"name": "m", "recipe": {"n_layer": 2}}))
    tokenizer.save(folder)
    return folder


@pytest.fixture
def openai(tmp_path: Path) -> Path:
    written = Path(__file__).parents[1] / "assets" / "tf-checkpoints" / "openai"
    return Path(shutil.copytree(written, tmp_path / "m"))


@pytest.fixture
def mingpt(tmp_path: Path) -> Path:
    written = Path(__file__).parents[1] / "assets" / "gpt-nano-sort"
    return Path(shutil.copytree(written, tmp_path / "m"))


# --- what other implementations make of a damaged file ----------------------------------------


# Settings without an effect on the logits of fastgpt, of which transformers checks the values.
_UNUSED = ("summary", "pad_token", "embd_pdrop", "attn_pdrop", "init", "use_cache", "reorder")


@torch.no_grad()
def assert_as_in_transformers(folder: Path, model: GPT, tokenizer: BaseTokenizer) -> None:
    """Compare a loaded folder with transformers: its settings, its tensors and its tokenizer."""
    settings = json.loads((folder / "config.json").read_bytes())
    config = {"bos_token_id": None, "eos_token_id": None}
    for name in [*transformers.GPT2Config.__annotations__, *transformers.GPT2Config.attribute_map]:
        if name in settings and name not in config and not name.startswith(_UNUSED):
            config[name] = settings[name]
    if "n_ctx" in settings and "max_position_embeddings" not in config:  # the name before version 4
        config.setdefault("n_positions", settings["n_ctx"])
    for name, kind in transformers.GPT2Config.__annotations__.items():
        if name in config and kind in (float, bool):  # transformers rejects 0 for 0.0 and False
            config[name] = kind(config[name])
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for file in folder.glob("*.safetensors"):
        theirs.load_state_dict(load_file(file), strict=False)
    ids = IDS % tokenizer.vocab_size
    logits = theirs(ids).logits[..., : tokenizer.vocab_size]
    torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-4, equal_nan=True)
    with contextlib.suppress(Exception):  # transformers rejects more
        named = transformers.AutoTokenizer.from_pretrained(folder)
        named.model_max_length = 1000
        for text in TEXTS:
            found, expected = (
                tokenizer.encode(text, allowed_special="all"),
                named(text)["input_ids"],
            )
            if found != expected and max(expected) < len(theirs.lm_head.weight):
                pytest.fail(f"{text!r} is {found}, but in transformers {expected}")


def assert_as_before(expected: GPT, model: GPT) -> None:
    """Compare with the undamaged model."""
    assert model.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# --- damage -----------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 8, 1.0, 0.5, -0.0, 1e-5, 1e300, 10**30, 2**31, 2**63),
    *(float("inf"), float("-inf"), float("nan"), "", "1e-5", "false", "2", "<x>", "\ud800", "\0"),
    *(
        [],
        {},
        [[]],
        [1],
        ["F32"],
        {"a": 1},
        {"content": "<y>"},
        "I32",
        "BF16",
        "../x",
        "/dev/zero",
    ),
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the content of a JSON file with a change at a random place."""
    if rng.random() < 0.1:  # of the text
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(rng.randrange(3)) + content[at + rng.randrange(9) :]
    if rng.random() < 0.02:
        return rng.choice([b"", b"[" * 100_000, json.dumps(rng.choice(VALUES)).encode()])
    data = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if isinstance(data, dict | list) and data:
            damage(data, rng)
    return json.dumps(data).encode()


def damage(container: Any, rng: random.Random) -> None:
    """Change, remove, rename or add a value at any depth."""
    key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    if isinstance(container[key], dict | list) and container[key] and rng.random() < 0.8:
        damage(container[key], rng)
        return
    value = container[key]
    match rng.randrange(5):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice([f"{key} ", "x", "n_ctx", "hidden_size", "added_tokens"])] = value
            if rng.random() < 0.5:
                container.pop(key)
        case 2 if isinstance(value, int | float):
            container[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(value)])
        case 3:
            other = rng.choice(list(container) if isinstance(container, dict) else [key])
            container[key], container[other] = container[other], value
        case _:
            container[key] = rng.choice(VALUES)


def rewrite(file: Path, whole: bytes, rng: random.Random) -> None:
    """Damage a JSON file, or the JSON header of a safetensors file, whose content was `whole`."""
    if file.suffix != ".safetensors":
        file.write_bytes(damaged(whole, rng))
        return
    end = 8 + int.from_bytes(whole[:8], "little")
    header = damaged(whole[8:end], rng)
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])


def load_as_a_command(load: Callable[[], Any]) -> Any:
    """Return what `load` returns, or None after checking how a command ends with its error."""
    results: list[Any] = []
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as exit_:
        cli.run(lambda args: results.append(load()), [])
    if exit_.value.code == 0:
        return results[0]
    assert exit_.value.code == 2
    assert errors.getvalue().startswith("error: ")
    assert errors.getvalue().count("\n") == 1
    errors.getvalue().encode(errors="backslashreplace")  # as stderr does
    return None


# The slow tests make 500 changes per file or, for an hour, as many as FASTGPT_DAMAGES says.
MANY = int(os.environ.get("FASTGPT_DAMAGES", "500"))
COUNTS = [pytest.param(40), pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hugging_face", "config.json"),
        ("hugging_face", "tokenizer.json"),
        ("hugging_face", "tokenizer_config.json"),
        ("hugging_face", "model.safetensors.index.json"),
        ("hugging_face", "model-00001-of-00003.safetensors"),
        ("older_hugging_face", "vocab.json"),
        ("older_hugging_face", "tokenizer_config.json"),
        ("older_hugging_face", "added_tokens.json"),
        ("older_hugging_face", "special_tokens_map.json"),
    ],
)
def test_a_damaged_folder_of_transformers(source: str, name: str, count: int, request) -> None:
    folder = request.getfixturevalue(source)
    whole = (folder / name).read_bytes()
    for seed in range(count):
        rewrite(folder / name, whole, random.Random(seed))
        if loaded := load_as_a_command(lambda: load(folder)):
            try:
                assert_as_in_transformers(folder, *loaded)
            except BaseException as error:
                error.add_note(f"seed {seed}: {(folder / name).read_bytes()[:1000]!r}")
                raise


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", *(f"{CHECKPOINT}/{name}" for name in WRITTEN)]
)
def test_a_damaged_run(name: str, count: int, run: Path, model: GPT, tokenizer: Tokenizer) -> None:
    whole = (run / name).read_bytes()
    for seed in range(count):
        rewrite(run / name, whole, random.Random(seed))
        if loaded := load_as_a_command(lambda: load(run)):
            assert_as_before(model, loaded[0])
            assert loaded[1] == tokenizer


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("source", "name"), [("openai", "hparams.json"), ("mingpt", "config.json")]
)
def test_damaged_settings(source: str, name: str, count: int, request) -> None:
    """Only settings that the tensors do not determine can change: heads and dropout."""
    folder = request.getfixturevalue(source)
    whole = (folder / name).read_bytes()
    expected = GPT.from_pretrained(folder)
    config = expected.config
    for seed in range(count):
        rewrite(folder / name, whole, random.Random(seed))
        model = load_as_a_command(lambda: GPT.from_pretrained(folder))
        if model is not None:
            settings = json.loads((folder / name).read_bytes())
            n_head = settings.get("n_head") or config.n_head
            dropout = settings.get("resid_pdrop", config.dropout)
            expected.config = replace(config, n_head=n_head, dropout=dropout)
            assert_as_before(expected, model)
