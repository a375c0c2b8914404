"""Evaluation of a model on a text: what is counted, and the `evaluate` command."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fastgpt.evaluation
from fastgpt import __main__ as fastgpt_main
from fastgpt import evaluate, train
from fastgpt.data.corpus import load_corpus
from fastgpt.data.pipeline import prepare
from fastgpt.evaluation import evaluate_text, perplexity
from fastgpt.evaluation.texts import load_text
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer
from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError
from tests.evaluation.task_samples import hellaswag_items, lambada_items, write_lines

SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"),
    *("--batch-size", "4", "--max-steps", "4", "--warmup-steps", "1", "--eval-interval", "2"),
    *("--sample-tokens", "0", "--device", "cpu"),
]
GPT2 = Tokenizer.gpt2()


def small_model(tokenizer: BaseTokenizer, block_size: int = 16) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, block_size, n_layer=1, n_head=2, n_embd=16)
    return GPT(config).eval()


def run(command: Callable[..., None], *args: object) -> int:
    """Run a command in this process; return its exit code."""
    with pytest.raises(SystemExit) as info:
        cli.run(command, [str(arg) for arg in args])
    return int(info.value.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    words = "the cat sat on the mat, and the dog lay by it.\n"
    (folder / "text.txt").write_text(words * 120, encoding="utf-8")
    args = ["--data", folder / "text.txt", "--out", folder / "run", "--val-fraction", "0.2"]
    assert run(train.main, *SMALL, *args) == 0
    return folder / "run"


# --- what is counted -----------------------------------------------------------------------------


def test_every_token_counts_where_there_is_a_token_to_start_from() -> None:
    model, text = small_model(GPT2), "Hello world, it is me. " * 5
    scores = evaluate_text(model, GPT2, text)
    ids = GPT2.encode(text)
    assert scores.n_tokens == len(ids)
    assert scores.n_bytes == len(text)
    assert scores.nats == perplexity(model, [GPT2.eot_token, *ids]).nats
    assert_close(scores.bits_per_byte, scores.nats / math.log(2) / len(text))


def test_the_first_character_does_not_count_where_there_is_none() -> None:
    tokenizer = CharTokenizer("aé—\n")
    scores = evaluate_text(small_model(tokenizer), tokenizer, "éa—a")
    assert scores.n_tokens == 3
    assert scores.n_bytes == 1 + 3 + 1  # without the two bytes of the first é
    with pytest.raises(UsageError, match="the text has 1 token, and its tokenizer no"):
        evaluate_text(small_model(tokenizer), tokenizer, "a")


def test_the_name_of_a_file_is_not_a_text(tmp_path: Path) -> None:
    tokenizer, path = CharTokenizer("abc"), tmp_path / "text.txt"
    path.write_text("abc")
    with pytest.raises(ValueError, match="is the name of a file, not a text: pass Path"):
        evaluate_text(small_model(tokenizer), tokenizer, str(path))


def says(tokenizer: BaseTokenizer, probabilities: dict[str, float]) -> GPT:
    """Return a model with fixed token probabilities; the other tokens share the rest equally."""
    config = GPTConfig(tokenizer.vocab_size, 16, n_layer=1, n_head=1, n_embd=8, tie_weights=False)
    model, size = GPT(config).eval(), tokenizer.vocab_size
    others = (1 - sum(probabilities.values())) / max(1, size - len(probabilities))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(8)[0])  # the last hidden state is (1, 0, 0, ...)
        for token in range(size):
            known = probabilities.get(tokenizer.token_bytes(token).decode("latin-1"), others)
            model.lm_head.weight[token, 0] = math.log(known)
    return model


def test_bits_per_byte_are_equal_where_models_of_other_tokens_say_the_same() -> None:
    """Letters of probability 1/2 and pairs of letters of probability 1/4 are both one bit/byte."""
    text = "aabb" * 40
    letters, pairs = CharTokenizer("ab"), Tokenizer.train([text], 259)
    assert {pairs.token_bytes(i) for i in pairs.encode(text)} == {b"aa", b"bb"}
    of_letters = evaluate_text(says(letters, {"a": 0.5, "b": 0.5}), letters, text)
    of_pairs = evaluate_text(says(pairs, {"aa": 0.25, "bb": 0.25}), pairs, text)
    assert_close(of_letters.bits_per_byte, 1.0, rtol=1e-6, atol=0)
    assert_close(of_pairs.bits_per_byte, 1.0, rtol=1e-6, atol=0)
    assert_close(of_pairs.loss, 2 * of_letters.loss, rtol=1e-6, atol=0)


def test_documents_are_parted_by_a_token_that_stands_for_no_bytes(tmp_path: Path) -> None:
    text = "One thing.\n<|endoftext|>\nAnother, né.\n"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    found = load_text(str(tmp_path / "t.txt"), GPT2)
    first, second = GPT2.encode("One thing."), GPT2.encode("Another, né.\n")
    assert found.tokens.tolist() == [*first, GPT2.eot_token, *second]
    assert found.n_bytes == len("One thing.Another, né.\n".encode())
    scores = evaluate_text(small_model(GPT2), GPT2, text)
    assert scores.n_tokens == found.n_scored == len(first) + 1 + len(second)
    assert scores.n_bytes == found.n_bytes


def test_a_tokenizer_without_that_token_reads_it_as_text(tmp_path: Path) -> None:
    text = "one\n<|endoftext|>\ntwo\n"
    (tmp_path / "t.txt").write_text(text)
    found = load_text(str(tmp_path / "t.txt"), CharTokenizer.from_text(text))
    assert found.tokenizer.decode(found.tokens) == text


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "txt.gz"])
def test_other_formats_hold_the_same_documents(tmp_path: Path, kind: str) -> None:
    documents = ["First of all.", "Second\nto none."]
    content = {
        "jsonl": "".join(json.dumps({"text": d}) + "\n" for d in documents),
        "json": json.dumps(documents),
        "txt": "\n<|endoftext|>\n".join(documents),
    }[kind.removesuffix(".gz")].encode()
    path = tmp_path / f"t.{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    expected = [*GPT2.encode(documents[0]), GPT2.eot_token, *GPT2.encode(documents[1])]
    assert load_text(str(path), GPT2).tokens.tolist() == expected


def test_a_long_text_is_tokenized_as_a_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.utils.text_files.BLOCK_BYTES", 50)
    text = "It wasn't  him — 1234567 né!\n\n" * 30
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    assert load_text(str(tmp_path / "t.txt"), GPT2).tokens.tolist() == GPT2.encode(text)
    cut = load_text(str(tmp_path / "t.txt"), GPT2, max_tokens=33)
    assert cut.tokens.tolist() == GPT2.encode(text)[:33]


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_the_parts_of_a_text_are_those_that_training_makes(
    tmp_path: Path, tokenizer: str, part: str
) -> None:
    (tmp_path / "t.txt").write_text("Some words.\n<|endoftext|>\nAnd more, né.\n" * 40)
    corpus = load_corpus(str(tmp_path / "t.txt"), tokenizer)
    found = load_text(str(tmp_path / "t.txt"), corpus.tokenizer, part)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.tokens, getattr(corpus, part))


def test_a_prepared_folder_and_a_packaged_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Some words.\n<|endoftext|>\nAnd more of it.\n" * 200)
    prepared = prepare([tmp_path / "t.txt"], tmp_path / "data", val_fraction=0.2)
    val = load_text(str(tmp_path / "data"), GPT2)
    train_part = load_text(str(tmp_path / "data"), GPT2, "train")
    assert (len(train_part.tokens), len(val.tokens)) == (
        prepared.train.tokens,
        prepared.val.tokens,
    )
    scores = val.cut(40).score(small_model(GPT2))
    assert scores.n_tokens == 40
    shakespeare = load_text("shakespeare", GPT2)
    assert shakespeare.name == "the validation part of shakespeare"
    assert shakespeare.n_bytes == 111_539  # the last tenth of 1,115,394 characters
    with pytest.raises(UsageError, match="was prepared with another tokenizer"):
        load_text(str(tmp_path / "data"), CharTokenizer("ab"))


def test_characters_never_seen(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("caf \n")
    model = small_model(tokenizer)
    with pytest.raises(UsageError, match=r"the text: character 'é' \(U\+00E9\) at position 3"):
        evaluate_text(model, tokenizer, "café")
    skipped = evaluate_text(model, tokenizer, "cafféx fa", skip_unknown=True)
    assert skipped.nats == evaluate_text(model, tokenizer, "caff fa").nats
    assert skipped.n_bytes == 6
    (tmp_path / "t.txt").write_text("caf é\nx", encoding="utf-8")
    found = load_text(str(tmp_path / "t.txt"), tokenizer, skip_unknown=True)
    assert found.name.endswith("t.txt, except 3 bytes of unknown characters")
    with pytest.raises(UsageError, match="the text is empty"):
        evaluate_text(model, tokenizer, "é", skip_unknown=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: there is nothing to score"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9", "is not UTF-8: byte 0xe9 at offset 3"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    for tokenizer in (GPT2, CharTokenizer("cafe\n")):
        with pytest.raises(UsageError, match=message):
            evaluate_text(small_model(tokenizer), tokenizer, path)


def test_the_package_exports_its_functions() -> None:
    assert fastgpt.evaluation.perplexity is perplexity
    with pytest.raises(AttributeError, match=r"fastgpt\.evaluation.*'nothing'"):
        fastgpt.evaluation.nothing  # noqa: B018


# --- the command ---------------------------------------------------------------------------------


def test_a_run_is_measured_on_its_own_validation_part(trained: Path, capfd) -> None:
    assert run(evaluate.main, trained, "--stride", 16, "--device", "cpu", "--json") == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert err == ""
    assert len(out.splitlines()) == 1
    assert found["tokens"] == int(0.2 * 47 * 120) - 1  # all characters but the first
    assert found["data"].startswith("the validation part of ")
    assert (found["context"], found["stride"], found["dtype"]) == (16, 16, "float32")
    # Training only leaves out the tokens that do not fill a last window.
    evaluated = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    best = min(line["val_loss"] for line in evaluated if "val_loss" in line)
    assert_close(found["loss"], best, rtol=2e-3, atol=0)
    assert_close(found["perplexity"], math.exp(found["loss"]))
    assert_close(found["bits_per_byte"], found["loss"] / math.log(2))


def test_a_run_on_a_file_as_a_person_sees_it(trained: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "other.txt").write_text("the dog sat by the cat.\n" * 9)
    assert run(evaluate.main, trained, "--data", tmp_path / "other.txt", "--device", "cpu") == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{trained} on {tmp_path / 'other.txt'}"
    assert [line[:15].strip() for line in lines[1:]] == [
        *("loss", "perplexity", "bits per byte", "scored", "window", "speed")
    ]
    assert "215 tokens, 215 bytes of text" in out
    assert "context 16, stride 8; training measures without overlap: --stride 16\n" in out


def test_parts_tokens_windows_and_precision(trained: Path, capfd) -> None:
    options = ["--part", "train", "--max-tokens", 50, "--context", 8, "--stride", 2]
    for dtype in ("bfloat16", "float32", "auto"):
        assert run(evaluate.main, trained, *options, "--dtype", dtype, "--json") == 0
    lossy, exact, auto = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert lossy["dtype"] == "bfloat16"
    assert auto["dtype"] in ("bfloat16", "float32")
    assert exact["tokens"] == 49
    assert (exact["context"], exact["stride"]) == (8, 2)
    assert_close(lossy["loss"], exact["loss"], rtol=5e-3, atol=0)


def test_a_model_of_another_project(tmp_path: Path, capfd) -> None:
    tokenizer = Tokenizer.train(["some words, some other words"], 300)
    model = small_model(tokenizer)
    model.save_pretrained(tmp_path / "hf", tokenizer)
    (tmp_path / "t.txt").write_text("some other words " * 20)
    args = [tmp_path / "hf", "--data", tmp_path / "t.txt", "--json", "--device", "cpu"]
    assert run(evaluate.main, *args) == 0
    found = json.loads(capfd.readouterr().out)
    expected = evaluate_text(model, tokenizer, tmp_path / "t.txt")
    assert_close(found["loss"], expected.loss, rtol=1e-6, atol=0)
    assert found["bytes"] == expected.n_bytes == 340


def test_tasks(tmp_path: Path, capfd) -> None:
    tokenizer = Tokenizer.train([item["text"] for item in lambada_items()], 300)
    small_model(tokenizer, 64).save_pretrained(tmp_path / "hf", tokenizer)
    write_lines(tmp_path / "h.jsonl", hellaswag_items())
    write_lines(tmp_path / "l.jsonl", lambada_items())
    for task, names in {"h": {"acc", "acc_norm"}, "l": {"acc", "perplexity"}}.items():
        name = {"h": "hellaswag", "l": "lambada"}[task]
        data = ["--data", tmp_path / f"{task}.jsonl", "--device", "cpu"]
        assert run(evaluate.main, tmp_path / "hf", "--task", name, *data, "--json") == 0
        found = json.loads(capfd.readouterr().out)
        assert names <= found.keys()
        assert (found["task"], found["questions"]) == (name, 40)
        assert run(evaluate.main, tmp_path / "hf", "--task", name, *data, "--limit", 1) == 0
        out = capfd.readouterr().out
        assert out.startswith(f"{name}: ")
        assert "1 questions" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none/at/all"], "none/at/all does not exist; give a run folder"),
        (["RUN", "--data", "none.txt"], "none.txt cannot be read: No such file"),
        (["RUN", "--data", "empty.txt"], "empty.txt is empty: there is nothing to score"),
        (["RUN", "--data", "latin1.txt"], "is not UTF-8: byte 0xe9 at offset 3"),
        (["RUN", "--data", "cafe.txt"], "cafe.txt: character 'é' (U+00E9) at position 3"),
        (["RUN", "--data", "one.txt"], "one.txt has 1 token, and its tokenizer no"),
        (["RUN", "--data", "."], ". is not a prepared folder"),
        (["RUN", "--context", "17"], "context must be from 1 to the model's 16, not 17"),
        (["RUN", "--stride", "0"], "stride must be from 1 to the context of 16, not 0"),
        (["RUN", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["RUN", "--max-tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["RUN", "--limit", "3"], "--limit is for questions, not for --task text"),
        (["RUN", "--task", "lambada"], "--task lambada needs its questions: --data FILE"),
        (
            ["RUN", "--task", "lambada", "--data", "cafe.txt", "--max-tokens", "3"],
            "--max-tokens is for texts, not for --task lambada",
        ),
        (["RUN", "--task", "lambada", "--data", "two.txt"], "character 'é'"),
        (["RUN", "--task", "hellaswag", "--data", "cafe.txt"], "cafe.txt, line 1"),
        (["RUN", "--device", "warp"], "device 'warp' cannot be used"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    trained: Path, args: list[str], message: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "empty.txt": b"",
        "latin1.txt": b"caf\xe9",
        "cafe.txt": "cat é".replace(" ", "").encode(),
        "two.txt": "the é".encode(),
        "one.txt": b"t",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert run(evaluate.main, *(str(trained) if arg == "RUN" else arg for arg in args)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_a_text_that_changed_since_the_run_is_refused(trained: Path, capfd) -> None:
    text = trained.parent / "text.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before + b"the cat.\n")
        assert run(evaluate.main, trained) == 2
        assert "is not the text that the run was trained on" in capfd.readouterr().err
    finally:
        text.write_bytes(before)


def test_a_model_without_a_text_of_its_own_needs_one(tmp_path: Path, capfd) -> None:
    small_model(GPT2).save_pretrained(tmp_path / "hf", GPT2)
    assert run(evaluate.main, tmp_path / "hf", "--device", "cpu") == 2
    assert "is not a run folder, so it has no default text: give --data" in capfd.readouterr().err


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path: Path, capfd) -> None:
    model = small_model(GPT2)
    with torch.no_grad():
        model.wpe.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "hf", GPT2)
    (tmp_path / "t.txt").write_text("some text")
    args = ["--data", tmp_path / "t.txt", "--json", "--device", "cpu"]
    assert run(evaluate.main, tmp_path / "hf", *args) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["loss"] is None
    assert found["perplexity"] is None


def test_the_commands_are_listed(capfd) -> None:
    assert run(fastgpt_main.dispatch) == 0
    out = capfd.readouterr().out
    assert "  evaluate  measure a model" in out
    assert "  lm_eval   run EleutherAI's" in out
