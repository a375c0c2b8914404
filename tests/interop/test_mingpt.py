"""minGPT files: `model.pt` as saved by its projects, and the same tensors in `model.npz`."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.interop import load, open_source
from fastgpt.interop.external import NoTokenizerError
from fastgpt.tokenizer import CharTokenizer
from fastgpt.utils.errors import UsageError

CONFIG = GPTConfig(10, 12, 2, 2, 8, dropout=0.1, tie_weights=False)


def random_model(config: GPTConfig = CONFIG) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def named(model: GPT) -> dict[str, Tensor]:
    """Return a model's tensors by minGPT's names, with its masks."""
    weights = {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    size = model.config.block_size
    masks = torch.tril(torch.ones(1, 1, size, size))
    layers = range(model.config.n_layer)
    return weights | {f"transformer.h.{i}.attn.bias": masks for i in layers}


def save(folder: Path, model: GPT, kind: str, settings: Any = None) -> Path:
    if kind == "model.pt":
        torch.save(named(model), folder / kind)
    else:
        np.savez(folder / kind, **{name: t.numpy() for name, t in named(model).items()})
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["model.pt", "model.npz"])
def test_a_folder_is_its_model_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = random_model()
    save(tmp_path, model, kind, {"n_head": 2, "vocab_size": 10, "n_layer": None})
    for path in (tmp_path, tmp_path / kind):
        read = GPT.from_pretrained(path)
        assert read.config == CONFIG
        weights = model.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in read.state_dict().items())


def test_an_archive_may_be_compressed_or_of_another_precision(tmp_path: Path) -> None:
    model = random_model()
    arrays = {name: tensor.numpy() for name, tensor in named(model).items()}
    for kind in ("<f2", "<f8", ">f4"):
        np.savez_compressed(
            tmp_path / "model.npz", **{name: array.astype(kind) for name, array in arrays.items()}
        )
        (tmp_path / "config.json").write_text('{"n_head": 2}')
        read = GPT.from_pretrained(tmp_path).state_dict()
        for name, tensor in model.state_dict().items():
            expected = tensor.half().float() if kind == "<f2" else tensor
            assert torch.equal(read[name], expected)


@pytest.mark.parametrize(
    ("settings", "n_head"),
    [
        ({"n_head": 4}, 4),
        ({"model_type": None, "n_head": 12}, 12),
        ({"model_type": "gpt-nano"}, 3),
        ({"system": {}, "model": {"model_type": "gpt-mini", "n_head": None}}, 6),
        ({"system": {"seed": 1}, "model": {"n_head": 2, "block_size": None}}, 2),
    ],
)
def test_the_heads_are_what_its_settings_say(
    settings: dict[str, Any], n_head: int, tmp_path: Path
) -> None:
    model = random_model(GPTConfig(10, 12, 3, 1, 48, tie_weights=False))
    read = GPT.from_pretrained(save(tmp_path, model, "model.pt", settings))
    assert read.config.n_head == n_head


REFUSED: list[tuple[Any, str]] = [
    (None, r'write it to .*config.json: {"n_head": 6}'),
    ({"model_type": "gpt-huge"}, "does not record its number of attention heads"),
    ({"model_type": []}, "does not record its number of attention heads"),
    ({"n_head": "2"}, "n_head must be an integer, not '2'"),
    ({"n_head": 3}, "8 is not a multiple of 3"),
    ({"n_head": 2, "n_layer": 3}, "has n_layer = 2, but config.json next to it says 3"),
    ({"n_head": 2, "resid_pdrop": 2}, r"dropout must be in"),
    ([], "must be an object, not "),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=range(len(REFUSED)))
def test_settings_that_do_not_fit_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        GPT.from_pretrained(save(tmp_path, random_model(), "model.pt", settings))


def test_nobody_knows_its_tokenizer_but_the_files_beside_it(tmp_path: Path) -> None:
    save(tmp_path, random_model(), "model.npz", {"n_head": 2})
    with pytest.raises(NoTokenizerError, match="has no tokenizer for its 10 token ids"):
        load(tmp_path)
    digits = CharTokenizer("0123456789")
    digits.save(tmp_path)
    assert load(tmp_path)[1] == digits


def test_code_in_its_files_does_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "config.json").write_text('{"n_head": 2}')
    torch.save({**named(random_model()), "lm_head.weight": Malicious()}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="a pickle can execute any code"):
        GPT.from_pretrained(tmp_path)
    arrays: dict[str, Any] = {name: t.numpy() for name, t in named(random_model()).items()}
    arrays["lm_head.weight"] = np.array([[Malicious()]], dtype=object)
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(UsageError, match=r"model\.npz cannot be read: .*[Oo]bject arrays"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": None}, "lm_head.weight is missing"),
        ({"transformer.wte.weight": None}, "no matrix transformer.wte.weight"),
        ({"transformer.wpe.weight": torch.ones(3)}, "no matrix transformer.wpe.weight"),
        ({"transformer.h.1.ln_2.bias": torch.ones(9)}, r"h.1.ln_2.bias is \[9\] instead of \[8\]"),
        ({"transformer.h.7.ln_2.bias": torch.ones(8)}, "h.2.ln_1.weight is missing"),
        ({"other": torch.ones(1)}, "other is not in the model"),
    ],
)
@pytest.mark.parametrize("kind", ["model.pt", "model.npz"])
def test_tensors_that_do_not_fit_are_refused(
    kind: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {n: t for n, t in {**named(random_model()), **change}.items() if t is not None}
    if kind == "model.pt":
        torch.save(tensors, tmp_path / kind)
    else:
        np.savez(tmp_path / kind, **{name: tensor.numpy() for name, tensor in tensors.items()})
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    with pytest.raises(UsageError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.fixture(scope="module", params=["model.pt", "model.npz"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, random_model(), request.param, {"n_head": 2})
    return folder / str(request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    data: st.DataObject, saved: Path, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    if data.draw(st.booleans()):
        content = bytearray(whole)
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / saved.name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    with contextlib.suppress(UsageError):  # no other exception is allowed
        open_source(tmp_path / saved.name).load_model()
