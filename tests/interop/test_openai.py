"""OpenAI's folders, and those of fine-tuned models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastgpt.checkpoint.load import CheckpointError
from fastgpt.interop import openai
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.utils.errors import UsageError
from tests.interop.bundle_writer import write_bundle
from tests.interop.write_tf_checkpoint import HPARAMS, gpt2_values

WRITTEN = Path(__file__).parents[1] / "assets" / "tf-checkpoints"
Array = NDArray[np.float64]


def test_knows_its_folders() -> None:
    for folder in ("openai", "gpt-2-simple", "with-optimizer"):
        assert openai.recognizes(WRITTEN / folder)


def test_knows_no_others(tmp_path: Path) -> None:
    assert not openai.recognizes(tmp_path)
    assert not openai.recognizes(tmp_path / "missing")
    (tmp_path / "hparams.json").write_text("{}")
    assert not openai.recognizes(tmp_path)
    assert not openai.recognizes(tmp_path / "hparams.json")
    assert not openai.recognizes(WRITTEN / "many")


def test_names_and_shapes_are_exactly_the_models() -> None:
    found = openai.read(WRITTEN / "openai")
    with torch.device("meta"):
        state = GPT(found.config).state_dict()
    assert found.config == GPTConfig(vocab_size=61, block_size=17, n_layer=2, n_head=3, n_embd=12)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in found.tensors.items():
        assert tensor.read().shape == tensor.shape, name


@pytest.mark.parametrize(
    ("folder", "seed"), [("openai", 0), ("gpt-2-simple", 2), ("with-optimizer", 3)]
)
def test_weights_are_those_written_to_the_bit(folder: str, seed: int) -> None:
    values = gpt2_values(seed)
    state = openai.read(WRITTEN / folder).load_model().state_dict()
    assert len(state) == len(values)
    _equal(state["wpe.weight"], values["model/wpe"])
    _equal(state["h.1.attn.c_attn.weight"], values["model/h1/attn/c_attn/w"][0].T)
    _equal(state["h.0.mlp.c_proj.weight"], values["model/h0/mlp/c_proj/w"][0].T)
    _equal(state["h.0.mlp.c_fc.bias"], values["model/h0/mlp/c_fc/b"])
    _equal(state["h.1.ln_2.weight"], values["model/h1/ln_2/g"])
    _equal(state["ln_f.bias"], values["model/ln_f/b"])


def test_logits_are_those_of_the_papers_formulas() -> None:
    model = openai.read(WRITTEN / "openai").load_model()
    ids = np.random.RandomState(5).randint(0, HPARAMS["n_vocab"], (2, HPARAMS["n_ctx"]))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).numpy()
    expected = np.stack([_logits(row, gpt2_values(0)) for row in ids])
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() < 1e-4


def test_a_saved_run_is_read_as_its_state_file_says(tmp_path: Path) -> None:
    folder = _copy("gpt-2-simple", tmp_path)
    for line, seed in {
        'model_checkpoint_path: "model-100"': 1,
        'model_checkpoint_path: "model-1000"': 2,
        'model_checkpoint_path: "/content/checkpoint/run1/model-100"': 1,
        r'model_checkpoint_path: "C:\\Users\\me\\run1\\model-1000"': 2,
        r'model_checkpoint_path: "mod\145l-100"': 1,
        'all_model_checkpoint_paths: "a"\r\n model_checkpoint_path : "model-100"\r\n': 1,
    }.items():
        (folder / "checkpoint").write_text(line)
        _equal(openai.read(folder).tensors["wte.weight"].read(), gpt2_values(seed)["model/wte"])


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xff\xfe\0",
        b"model-100",
        b'model_checkpoint_path: "model-100',
        b'model_checkpoint_path: ""',
        b'model_checkpoint_path: "run1/.."',
        b'all_model_checkpoint_paths: "model-100"',
        b'model_checkpoint_path: "model-100"\nmodel_checkpoint_path: "model-1000"',
    ],
)
def test_a_state_file_that_names_no_checkpoint_is_refused(tmp_path: Path, state: bytes) -> None:
    folder = _copy("gpt-2-simple", tmp_path)
    (folder / "checkpoint").write_bytes(state)
    with pytest.raises(CheckpointError, match="checkpoint does not name one checkpoint"):
        openai.read(folder)


def test_a_named_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path,
) -> None:
    folder = _copy("gpt-2-simple", tmp_path)
    (folder / "model-1000.index").unlink()
    with pytest.raises(CheckpointError, match=r"names 'model-1000', .* it has model-100: copy"):
        openai.read(folder)


def test_without_a_state_file_the_only_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = _copy("gpt-2-simple", tmp_path)
    (folder / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"several .*\(model-100, model-1000\): choose one"):
        openai.read(folder)
    (folder / "model-1000.index").unlink()
    _equal(openai.read(folder).tensors["wte.weight"].read(), gpt2_values(1)["model/wte"])


def test_only_what_training_alone_needed_is_left_out(tmp_path: Path) -> None:
    """Unknown tensors are not ignored: the error of the model's loader lists them."""
    values = gpt2_values(0)
    extra = {
        **{"global_step": np.int64(9), "beta1_power": np.float32(1), "beta2_power": np.float32(1)},
        **{f"model/wte/{kept}": values["model/wte"] for kept in ("Adam", "Adam_1", "adafactor_v")},
    }
    unknown = ("model/wtf", "model/h0/mlp/c_fc/g", "model/h00/ln_1/g", "model/gone/w/Adam", "Adam")
    _write(tmp_path, values | extra | {name: np.float32([1]) for name in unknown})
    assert len(openai.read(tmp_path).tensors) == len(values) + len(unknown)
    with pytest.raises(CheckpointError) as refusal:
        openai.read(tmp_path).load_model()
    assert str(refusal.value).count("is not in the model") == len(unknown)
    for name in unknown:
        assert f"{name} is not in the model" in str(refusal.value)


def test_tensors_that_are_missing_or_of_another_shape_are_listed(tmp_path: Path) -> None:
    values = gpt2_values(0)
    del values["model/ln_f/g"]
    values["model/h0/ln_1/b"] = np.float32([1, 2])
    values["model/h1/mlp/c_fc/w"] = values["model/h1/mlp/c_fc/w"][0]
    _write(tmp_path, values)
    with pytest.raises(CheckpointError) as refusal:
        openai.read(tmp_path).load_model()
    for difference in (
        "ln_f.weight is missing",
        "h.0.ln_1.bias is [2] instead of [12]",
        "h.1.mlp.c_fc.weight is [12, 48] instead of [48, 12]",
    ):
        assert difference in str(refusal.value)


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, gpt2_values(0) | {"model/h0/ln_1/g": np.ones(12, np.int32)})
    with pytest.raises(CheckpointError, match=r"'model/h0/ln_1/g' has dtype torch\.int32"):
        openai.read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"n_vocab": None}, "vocab_size must be an integer, not None"),
        ({"n_ctx": "1024"}, "block_size must be an integer, not '1024'"),
        ({"n_head": True}, "n_head must be an integer, not True"),
        ({"n_head": 0}, "n_head must be at least 1"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head"),
        ({"n_layer": 10**6}, "28 tensors are too few for 1,000,000 layers"),
        ({"n_layer": 1}, "h.1.ln_1.weight is not in the model"),
        ({"n_layer": 3}, "h.2.ln_1.weight is missing"),
        ({"n_vocab": 10**30}, "vocab_size must be at most 16777216, not 10{30}"),
        ({"n_embd": 24}, r"wte.weight is \[61, 12\] instead of \[61, 24\]"),
        ({"n_ctx": 16}, r"wpe.weight is \[17, 12\] instead of \[16, 12\]"),
    ],
)
def test_settings_that_the_tensors_do_not_bear_out_are_refused(
    tmp_path: Path, changed: dict[str, object], what: str
) -> None:
    folder = _copy("openai", tmp_path)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS | changed))
    with pytest.raises(UsageError, match=rf"{folder}.*{what}"):
        openai.read(folder).load_model()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"bert/embeddings/word_embeddings": np.float32([[1]])})
    with pytest.raises(UsageError, match=r"does not fit the model: 1 tensors are too few"):
        openai.read(tmp_path).load_model()


def test_more_settings_and_files_are_no_matter(tmp_path: Path) -> None:
    folder = _copy("openai", tmp_path)
    (folder / "hparams.json").write_text(json.dumps({**HPARAMS, "res_dropout": 0.1}))
    (folder / "model.ckpt.meta").write_bytes(b"\0" * 100)
    (folder / "counter").write_text("1000\n")
    assert openai.read(folder).config.n_layer == 2


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_in_the_small_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, quoted: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-bytes"
    if not folder.exists():
        _copy("openai", folder)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    (folder / "checkpoint").write_bytes(b'model_checkpoint_path: "%s"' % data if quoted else data)
    with pytest.raises(CheckpointError):
        openai.read(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    (folder / "hparams.json").write_bytes(b'{"n_vocab": 61, "n_ctx": %s' % data if quoted else data)
    with pytest.raises(UsageError):
        openai.read(folder)


def test_deeply_nested_settings_are_refused(tmp_path: Path) -> None:
    folder = _copy("openai", tmp_path)
    (folder / "hparams.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"hparams\.json"):
        openai.read(folder)


def test_the_tokenizer_is_the_folders(tmp_path: Path) -> None:
    folder = _copy("openai", tmp_path)
    letters = [chr(33 + i) for i in range(94)]
    tokenizer = Tokenizer.train(["".join(letters) * 3], vocab_size=260)
    tokenizer.save(folder / "vocab.bpe")
    assert (folder / "encoder.json").exists()
    assert openai.read(folder).read_tokenizer() == tokenizer


def test_without_one_in_the_folder_it_is_gpt2s_if_the_size_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer for its 61 token ids"):
        openai.read(WRITTEN / "openai").read_tokenizer()
    wte = np.zeros((50257, 12), np.float32)
    _write(tmp_path, gpt2_values(0) | {"model/wte": wte}, n_vocab=50257)
    assert openai.read(tmp_path).read_tokenizer() == Tokenizer.gpt2()


def test_damage_is_found_when_the_model_is_loaded(tmp_path: Path) -> None:
    folder = _copy("openai", tmp_path)
    data = bytearray((folder / "model.ckpt.data-00000-of-00001").read_bytes())
    data[-1] ^= 1
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match the checksum of tensor 'model/wte'"):
        openai.read(folder).load_model()


def _logits(ids: Array, values: dict[str, Array]) -> Array:
    """Compute GPT-2's logits [T, n_vocab] in float64 as published, with weights [in, out]."""
    v = {name: value.astype(np.float64) for name, value in values.items()}

    def norm(x: Array, name: str) -> Array:
        centered = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return centered / scale * v[f"{name}/g"] + v[f"{name}/b"]

    def layer(x: Array, name: str) -> Array:
        return x @ v[f"{name}/w"][0] + v[f"{name}/b"]

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def attention(x: Array, name: str) -> Array:
        qkv = layer(x, f"{name}/c_attn").reshape(len(x), 3, HPARAMS["n_head"], -1)
        q, k, val = qkv.transpose(1, 2, 0, 3)  # each [n_head, T, n_embd / n_head]
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        weights = np.exp(np.where(np.tri(len(x)) > 0, scores, -np.inf))
        mixed = weights / weights.sum(-1, keepdims=True) @ val
        return layer(mixed.swapaxes(0, 1).reshape(x.shape), f"{name}/c_proj")

    x = v["model/wte"][ids] + v["model/wpe"][: len(ids)]
    for block in (f"model/h{i}" for i in range(HPARAMS["n_layer"])):
        x = x + attention(norm(x, f"{block}/ln_1"), f"{block}/attn")
        hidden = gelu(layer(norm(x, f"{block}/ln_2"), f"{block}/mlp/c_fc"))
        x = x + layer(hidden, f"{block}/mlp/c_proj")
    return norm(x, "model/ln_f") @ v["model/wte"].T


def _write(folder: Path, values: dict[str, NDArray[np.generic]], **changed: int) -> None:
    """Write a folder like OpenAI's, without the `checkpoint` file."""
    write_bundle(folder / "model.ckpt", values)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS | changed))


def _copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / name, to, dirs_exist_ok=True))


def _equal(tensor: torch.Tensor, value: NDArray[np.float32]) -> None:
    assert np.array_equal(tensor.numpy(), value)
