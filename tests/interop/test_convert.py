"""`python -m fastgpt.convert`, and other projects' models in `python -m fastgpt.generate`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgpt import GPT, CharTokenizer, GPTConfig, Tokenizer, convert, generate, load
from fastgpt.interop import hugging_face
from fastgpt.utils.errors import UsageError
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
    assert "read back: identical" in printed
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in printed
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ours, tokenizer = load(trained)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("ROMEO:")["input_ids"]])
    assert ids.tolist() == [tokenizer.encode("ROMEO:")]
    torch.testing.assert_close(model(ids).logits, ours(ids), rtol=0, atol=1e-4)
    # used as a source, it generates the same text as the run
    texts = []
    for source in (trained, out):
        assert run(generate.main, str(source), "--seed", "3", "--max-new-tokens", "30") == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
    assert run(convert.main, str(out), "--to", "hf", "--out", str(tmp_path / "again")) == 0
    capfd.readouterr()
    assert run(convert.main, str(trained), "--to", "hf", "--out", str(out)) == 2
    assert "already exists; give another --out" in capfd.readouterr().err


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0"])
def test_a_run_for_llama_cpp(trained: Path, tmp_path: Path, precision: str, capfd) -> None:
    pytest.importorskip("gguf")
    wide = tmp_path / "wide"
    GPT(GPTConfig(300, 8, 1, 1, 32)).save_pretrained(wide, Tokenizer.train(["abcabc"], 259))
    out, options = tmp_path / "model.gguf", ["--to", "gguf", "--precision", precision]
    assert run(convert.main, str(wide), *options, "--out", str(out)) == 0
    printed = capfd.readouterr().out
    assert "read back: identical" in printed
    assert f"llama-cli -m {out}" in printed
    model, tokenizer = load(out)
    assert tokenizer == load(wide)[1]
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids), load(wide)[0](ids), rtol=0, atol=2e-2)
    assert run(convert.main, str(wide), "--to", "hf", "--precision", "f16", "--out", "x") == 2


def test_a_run_for_nanogpt(trained: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    assert run(convert.main, str(trained), "--to", "nanogpt", "--out", str(out)) == 0
    assert f"python sample.py --out_dir={out}" in capfd.readouterr().out
    ids = torch.tensor([[1, 2, 3]])
    ours, theirs = load(trained), load(out)
    assert torch.equal(ours[0](ids), theirs[0](ids))
    assert ours[1] == theirs[1]


def test_rounding_is_no_excuse_for_another_number(tmp_path: Path) -> None:
    gguf = pytest.importorskip("fastgpt.interop.gguf")
    model, tokenizer = GPT(GPTConfig(259, 8, 1, 1, 32)), Tokenizer.train(["abcabc"], 259)
    gguf.write(model, tmp_path / "x.gguf", tokenizer, "q8_0")
    with torch.no_grad():
        weight = model.h[0].mlp.c_fc.weight
        weight[3, 4] += 0.02 * weight[3].abs().max()
    with pytest.raises(UsageError, match=r"h\.0\.mlp\.c_fc\.weight differs"):
        convert.check_written(
            tmp_path / "x.gguf", gguf.read(tmp_path / "x.gguf"), model, tokenizer, "q8_0"
        )


def test_without_a_tokenizer_it_says_so(tmp_path: Path, capfd) -> None:
    GPT(GPTConfig(30, 8, 1, 1, 8)).save_pretrained(tmp_path / "in")
    out = str(tmp_path / "out")
    assert run(convert.main, str(tmp_path / "in"), "--to", "hf", "--out", out) == 0
    assert "without a tokenizer: " in capfd.readouterr().out


def test_what_was_not_written_as_it_should_be_is_told(tmp_path: Path) -> None:
    model = GPT(GPTConfig(3, 8, 1, 1, 8, bias=False))
    tokenizer = CharTokenizer("abc")
    model.save_pretrained(tmp_path / "x", tokenizer)
    convert.check_written(tmp_path / "x", hugging_face.read(tmp_path / "x"), model, tokenizer)
    other = GPT(GPTConfig(3, 8, 1, 2, 8))
    with pytest.raises(UsageError) as info:
        convert.check_written(
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


def test_what_a_killed_export_left_does_not_block_the_next_one(tmp_path: Path, capfd) -> None:
    GPT(GPTConfig(30, 8, 1, 1, 8)).save_pretrained(tmp_path / "in")
    (tmp_path / "out" / ".saving").mkdir(parents=True)
    args = (str(tmp_path / "in"), "--to", "hf", "--out", str(tmp_path / "out"))
    assert run(convert.main, *args) == 0
    assert not (tmp_path / "out" / ".saving").exists()
    assert run(convert.main, *args) == 2
