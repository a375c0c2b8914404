"""nanoGPT checkpoints: import of files from its train.py, export for its scripts."""

import argparse
import contextlib
import os
import pickle
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig
from fastgpt.interop import load, nanogpt, open_source
from fastgpt.interop.external import NoTokenizerError
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.utils.errors import UsageError

CHARACTERS = "\n abcdefgh"
CONFIG = GPTConfig(10, 12, 2, 2, 8, dropout=0.2, bias=True)


def meta(characters: str = CHARACTERS) -> bytes:
    itos = dict(enumerate(characters))
    stoi = {character: i for i, character in itos.items()}
    return pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi})


def random_model(config: GPTConfig = CONFIG) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def checkpoint(model: GPT, prefix: str = "", *, masks: bool = False) -> dict[str, Any]:
    """Return a checkpoint as train.py saves it after some steps; prefix: of a wrapped model."""
    config, weights = model.config, dict[str, Tensor]()
    for name, parameter in model.state_dict().items():
        weights[f"{prefix}transformer.{name}"] = parameter
        if masks and name.endswith("ln_1.weight"):
            block = name.removesuffix("ln_1.weight")
            mask = torch.tril(torch.ones(1, 1, config.block_size, config.block_size))
            weights[f"{prefix}transformer.{block}attn.bias"] = mask
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.wte.weight"]
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    return {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": 20,
        "best_val_loss": torch.tensor(3.25),
        "config": {"dataset": "letters", "out_dir": "out-letters", "compile": True},
    }


def save(folder: Path, content: Any, name: str = "ckpt.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)
    return folder


def assert_same_weights(one: GPT, two: GPT) -> None:
    weights, others = one.state_dict(), two.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_is_its_model_to_the_bit(
    bias: bool, prefix: str, masks: bool, tmp_path: Path
) -> None:
    model = random_model(replace(CONFIG, bias=bias))
    folder = save(tmp_path / "out", checkpoint(model, prefix, masks=masks))
    for path in (folder, folder / "ckpt.pt"):
        read = open_source(path).load_model()
        assert read.config == model.config
        assert not read.training
        assert_same_weights(read, model)


def test_another_name_is_known_by_what_is_in_the_file(tmp_path: Path) -> None:
    model = random_model()
    save(tmp_path, checkpoint(model), "best.pt")
    assert_same_weights(GPT.from_pretrained(tmp_path / "best.pt"), model)


def test_a_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    model = random_model()
    read = GPT.from_pretrained(save(tmp_path, checkpoint(model)))
    file = tmp_path / "ckpt.pt"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_same_weights(read, model)


def test_a_model_in_lower_precision(tmp_path: Path) -> None:
    model = random_model().bfloat16().float()
    content = checkpoint(model)
    content["model"] = {name: tensor.bfloat16() for name, tensor in content["model"].items()}
    read = GPT.from_pretrained(save(tmp_path, content))
    assert read.wte.weight.dtype == torch.float32
    expected = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(p, expected[name]) for name, p in read.state_dict().items())


@pytest.mark.parametrize("place", ["out/meta.pkl", "data/letters/meta.pkl"])
def test_characters_are_found_beside_or_in_the_data(place: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "out", checkpoint(random_model()))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(meta())
    assert load(folder)[1] == CharTokenizer(CHARACTERS)
    (tmp_path / place).unlink()
    with pytest.raises(NoTokenizerError, match=r"put the meta.pkl of its data next to it"):
        load(folder)


def test_characters_are_found_from_nanogpts_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "elsewhere" / "out", checkpoint(random_model()))
    (tmp_path / "data" / "letters").mkdir(parents=True)
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(meta())
    monkeypatch.chdir(tmp_path)
    assert load(folder)[1] == CharTokenizer(CHARACTERS)


def test_characters_of_other_data_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, checkpoint(random_model()))
    (tmp_path / "meta.pkl").write_bytes(meta(CHARACTERS + "x"))
    with pytest.raises(NoTokenizerError, match="11 characters, but the model 10 ids"):
        load(folder)


def test_padded_rows_of_gpt2s_vocabulary_are_left_out(tmp_path: Path) -> None:
    whole = random_model(GPTConfig(50304, 4, 1, 1, 4))
    folder = save(tmp_path, checkpoint(whole))
    assert_same_weights(GPT.from_pretrained(folder), whole)
    model, tokenizer = load(folder)
    assert tokenizer == Tokenizer.gpt2()
    assert model.config.vocab_size == 50257
    assert torch.equal(model.wte.weight, whole.wte.weight[:50257])


def test_code_in_a_pickled_checkpoint_is_not_executed(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name in ("model", "config"):
        content = {**checkpoint(random_model()), name: Malicious()}
        folder = save(tmp_path / name, content)
        with pytest.raises(UsageError, match="a pickle can execute any code"):
            GPT.from_pretrained(folder)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "ckpt.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UsageError, match="a pickle can execute any code"):
        GPT.from_pretrained(tmp_path / "plain")
    save(tmp_path / "meta", checkpoint(random_model()))
    (tmp_path / "meta" / "meta.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UsageError, match="no code in it was run"):
        load(tmp_path / "meta")
    assert not (tmp_path / "ran").exists()


def changed(part: str, **changes: Any) -> dict[str, Any]:
    content = checkpoint(random_model())
    content[part] = {**content[part], **changes}
    return content


REFUSED = [
    ([1, 2], "is not a nanoGPT checkpoint"),
    ({"model": {}}, "is not a nanoGPT checkpoint"),
    ({"model": {}, "model_args": 3}, "not a dict of settings"),
    ({"model": [1], "model_args": {}}, "vocab_size must be an integer, not None"),
    (changed("model_args", n_layer=10**6), "28 tensors are too few for 1,000,000 layers"),
    (changed("model_args", n_layer=2.0), "n_layer must be an integer, not 2.0"),
    (changed("model_args", n_layer=True), "n_layer must be an integer, not True"),
    (changed("model_args", n_embd=10**15), "n_embd must be at most 16777216, not 10{15}"),
    (changed("model_args", n_head=3), "8 is not a multiple of 3"),
    (changed("model_args", dropout="x"), "ckpt.pt: "),
    (changed("model_args", bias=False), "h.0.ln_1.bias is not in the model"),
    (changed("model", other=torch.zeros(1)), "other is not in the model"),
    (changed("model", other=3), "other is not a plain tensor"),
    (changed("model", **{"lm_head.weight": torch.zeros(10, 8)}), "made by a modified nanoGPT"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_does_not_fit_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        GPT.from_pretrained(save(tmp_path, content))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = save(tmp_path_factory.mktemp("saved"), checkpoint(random_model()))
    return (folder / "ckpt.pt").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    data: st.DataObject, saved: bytes, tmp_path: Path
) -> None:
    size = data.draw(st.integers(0, len(saved)))
    content = bytearray(saved[:size])
    if data.draw(st.booleans()):
        content = bytearray(saved)
        for place in data.draw(st.lists(st.integers(0, len(saved) - 1), max_size=4)):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "ckpt.pt").write_bytes(content)
    with contextlib.suppress(UsageError):  # no other exception is allowed
        GPT.from_pretrained(tmp_path)


# --- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_written_is_read_back_to_the_bit(bias: bool, tmp_path: Path) -> None:
    model, tokenizer = random_model(replace(CONFIG, bias=bias)), CharTokenizer(CHARACTERS)
    nanogpt.write(model, tmp_path / "out", tokenizer)
    read, its_tokenizer = load(tmp_path / "out")
    assert read.config == model.config
    assert_same_weights(read, model)
    assert its_tokenizer == tokenizer


class Theirs(nn.Module):
    """The parameters of nanoGPT's model under its names, without the computation."""

    def __init__(self, n_layer: int, n_embd: int, block_size: int, vocab_size: int, bias: bool):
        super().__init__()

        def norm() -> nn.Module:
            return nn.LayerNorm(n_embd, bias=bias)

        def linear(n_in: int, n_out: int) -> nn.Module:
            return nn.Linear(n_in * n_embd, n_out * n_embd, bias=bias)

        blocks = [
            nn.ModuleDict(
                {
                    "ln_1": norm(),
                    "attn": nn.ModuleDict({"c_attn": linear(1, 3), "c_proj": linear(1, 1)}),
                    "ln_2": norm(),
                    "mlp": nn.ModuleDict({"c_fc": linear(1, 4), "c_proj": linear(4, 1)}),
                }
            )
            for _ in range(n_layer)
        ]
        wte = nn.Embedding(vocab_size, n_embd)
        parts = {"wte": wte, "wpe": nn.Embedding(block_size, n_embd), "ln_f": norm()}
        self.transformer = nn.ModuleDict({**parts, "h": nn.ModuleList(blocks)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = wte.weight


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_written_resumes_as_nanogpt_does(bias: bool, tmp_path: Path) -> None:
    """sample.py needs the weights and `config`; train.py also needs the optimizer's state."""
    model = random_model(replace(CONFIG, bias=bias))
    nanogpt.write(model, tmp_path / "out", CharTokenizer(CHARACTERS))
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    args = content["model_args"]
    theirs = Theirs(args["n_layer"], args["n_embd"], args["block_size"], args["vocab_size"], bias)
    theirs.load_state_dict(content["model"])
    assert torch.equal(theirs.lm_head.weight, model.wte.weight)
    groups = [[p for p in theirs.parameters() if (p.dim() >= 2) == decays] for decays in (1, 0)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(content["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert not optimizer.state
    assert (content["iter_num"], content["best_val_loss"]) == (0, 1e9)
    # sample.py, run in nanoGPT's folder with its `data`, opens this path:
    (tmp_path / "data").mkdir()
    found = tmp_path / "data" / content["config"]["dataset"] / "meta.pkl"
    assert pickle.loads(found.read_bytes())["itos"] == dict(enumerate(CHARACTERS))


def test_with_gpt2s_tokenizer_no_characters_are_written(tmp_path: Path) -> None:
    model = random_model(GPTConfig(50257, 4, 1, 1, 4))
    nanogpt.write(model, tmp_path / "out", Tokenizer.gpt2())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ckpt.pt"]
    assert "dataset" not in torch.load(tmp_path / "out" / "ckpt.pt")["config"]
    assert load(tmp_path / "out")[1] == Tokenizer.gpt2()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_weights": False}, "does not support an untied head"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-05; this model has 1e-06"),
    ],
)
def test_what_nanogpt_cannot_hold_is_not_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        nanogpt.write(GPT(replace(CONFIG, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_not_written(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some text, some more text"], 260)
    with pytest.raises(UsageError, match="decode the same ids to other text"):
        nanogpt.write(GPT(replace(CONFIG, vocab_size=260)), tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(random_model()))
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        nanogpt.write(random_model(), tmp_path)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


# build-nanogpt's train_gpt2.py in short: it saves its configuration as an object.
TRAIN_GPT2 = """
import sys
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 12
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 8

checkpoint = {"model": torch.load("weights.pt"), "config": GPTConfig(), "step": 5, "val_loss": 9.5}
torch.save(checkpoint, "model_00005.pt", _use_new_zipfile_serialization=sys.argv[1] == "new")
"""


@pytest.mark.parametrize("form", ["new", "old"])
def test_a_file_of_build_nanogpt_can_be_saved_again(form: str, tmp_path: Path) -> None:
    model = GPT(GPTConfig(50304, 12, 2, 2, 8)).eval()
    weights = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, tmp_path / "weights.pt")
    subprocess.run([sys.executable, "-c", TRAIN_GPT2, form], cwd=tmp_path, check=True)
    with pytest.raises(UsageError, match=r"and plain values \('__main__\.GPTConfig'\)") as info:
        load(tmp_path / "model_00005.pt")
    assert "\n" not in str(info.value)
    command = shlex.split(str(info.value).partition("configuration: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    again, tokenizer = load(tmp_path / "ckpt.pt")
    assert tokenizer == Tokenizer.gpt2()
    ids = torch.tensor([[1, 50256, 7]])
    assert torch.equal(again(ids), model(ids)[..., :50257])


def test_other_classes_in_a_pickle_are_named(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(layer=torch.nn.Linear(2, 2)), tmp_path / "ckpt.pt")
    with pytest.raises(UsageError, match=r"'argparse\.Namespace', 'torch\.nn\..*'\)"):
        load(tmp_path / "ckpt.pt")
