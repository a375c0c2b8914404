"""`python -m fastgpt.convert`, and other projects' models at `python -m fastgpt.generate`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgpt import GPT, CharTokenizer, GPTConfig, convert, generate, load
from fastgpt.errors import UsageError
from fastgpt.interop import hugging_face
from tests.test_cli import SMALL, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastgpt import train

    folder = tmp_path_factory.mktemp("convert") / "run"
    assert run(train.main, *SMALL, "--out", str(folder), "--eval-tokens", "500") == 0
    return folder


def test_a_run_for_transformers(trained: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    assert run(convert.main, str(trained), "--to", "hf", "--out", str(out)) == 0
    printed = capfd.readouterr().out
    assert "read back, it is equal" in printed
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in printed
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ours, tokenizer = load(trained)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("ROMEO:")["input_ids"]])
    assert ids.tolist() == [tokenizer.encode("ROMEO:")]
    torch.testing.assert_close(model(ids).logits, ours(ids), rtol=0, atol=1e-4)
    # and as a source: the same text as from the run itself
    texts = []
    for source in (trained, out):
        assert run(generate.main, str(source), "--seed", "3", "--max-new-tokens", "30") == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
    assert run(convert.main, str(out), "--to", "hf", "--out", str(tmp_path / "again")) == 0
    capfd.readouterr()
    assert run(convert.main, str(trained), "--to", "hf", "--out", str(out)) == 2
    assert "is there already; give another --out" in capfd.readouterr().err


def test_without_a_tokenizer_it_says_so(tmp_path: Path, capfd) -> None:
    GPT(GPTConfig(30, 8, 1, 1, 8)).save_pretrained(tmp_path / "in")
    out = str(tmp_path / "out")
    assert run(convert.main, str(tmp_path / "in"), "--to", "hf", "--out", out) == 0
    assert "without a tokenizer: " in capfd.readouterr().out


def test_what_was_not_written_as_it_should_be_is_told(tmp_path: Path) -> None:
    model = GPT(GPTConfig(3, 8, 1, 1, 8, bias=False))
    tokenizer = CharTokenizer("abc")
    model.save_pretrained(tmp_path / "x", tokenizer)
    convert.refuse_unequal(tmp_path / "x", hugging_face.read(tmp_path / "x"), model, tokenizer)
    other = GPT(GPTConfig(3, 8, 1, 1, 8, dropout=0.5))
    with pytest.raises(UsageError) as info:
        convert.refuse_unequal(
            tmp_path / "x", hugging_face.read(tmp_path / "x"), other, CharTokenizer("abd")
        )
    for part in ("h.0.mlp.c_fc.weight differs", "the settings are", "the tokenizer differs"):
        assert part in str(info.value)


@pytest.mark.parametrize("source", ["none", "."])
def test_a_source_that_is_none(source: str, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(convert.main, source, "--to", "hf", "--out", "out") == 2
    assert capfd.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
