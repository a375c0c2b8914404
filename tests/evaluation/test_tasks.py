"""HellaSwag and LAMBADA: reading, scoring and invalid files."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.testing import assert_close

from fastgpt.evaluation import hellaswag, lambada
from fastgpt.evaluation.hellaswag import Question
from fastgpt.evaluation.log_likelihood import LogLikelihood
from fastgpt.evaluation.task_files import standard_error
from fastgpt.evaluation.tasks import encode_pair, evaluate_task
from fastgpt.model import GPT
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.utils.errors import UsageError
from tests.evaluation.task_samples import hellaswag_items, lambada_items, taught_model, write_lines


@pytest.fixture(scope="module")
def taught() -> tuple[GPT, Tokenizer]:
    return taught_model()


def test_a_question_is_cleaned_as_in_the_harness(tmp_path: Path) -> None:
    item = {
        "activity_label": "Baking",
        "ctx_a": " [header] How to bake [title] Heat the oven.   Wait.",
        "ctx_b": "then SHE",
        "endings": ["[substeps] opens it.", "a  b", "goes [step] on. ", "é"],
        "label": 3,
    }
    (question,) = hellaswag.read(write_lines(tmp_path / "q.jsonl", [item]))
    # Like the harness, replace double spaces once: three spaces become two.
    assert question == Question(
        "Baking:  How to bake. Heat the oven.  Wait. Then she",
        (" opens it.", "a b", "goes on.", "é"),
        3,
    )
    assert hellaswag.pairs(question)[1] == (question.context, " a b")


def test_acc_is_of_sums_and_acc_norm_of_characters() -> None:
    questions = [Question("c", ("ab", "abcdefgh"), 0), Question("c", ("ab", "éé"), 1)]
    found = [LogLikelihood(total, False) for total in (-2.0, -4.0, -3.0, -2.9)]
    figures = hellaswag.compute_metrics(questions, iter(found))
    assert figures["acc"] == 1.0  # -2 over -4, -2.9 over -3
    assert figures["acc_norm"] == 0.5  # -0.5 over -1: wrong; "éé" counts as two, not as four
    assert figures["acc_norm_stderr"] == standard_error([0, 1]) == 0.5
    assert math.isnan(standard_error([1]))


def test_hellaswag_is_what_one_ending_at_a_time_gives(
    taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = taught
    questions = hellaswag.read(write_lines(tmp_path / "q.jsonl", hellaswag_items()))
    found = evaluate_task("hellaswag", questions, model, tokenizer)
    right = []
    for question in questions:
        losses = []
        for ending in question.endings:
            before = tokenizer.encode(question.context)
            ids = tokenizer.encode(f"{question.context} {ending}")[-65:]
            n_scored = len(tokenizer.encode(f" {ending}"))
            assert before + tokenizer.encode(f" {ending}") == [*before, *ids[-n_scored:]]
            losses.append(_nats(model, ids, n_scored))
        right.append(int(np.argmin(losses)) == question.label)
    assert found["acc"] == np.mean(right)
    assert 0 < found["acc"] < 1
    assert found["acc"] != found["acc_norm"]


def _nats(model: GPT, ids: list[int], n_scored: int) -> float:
    import torch

    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(row[:, :-1])[0].double().log_softmax(-1)
    picked = logits.gather(-1, row[0, 1:, None])
    return -picked[-n_scored:].sum().item()


def test_lambada_scores_the_last_word_with_its_space(
    taught: tuple[GPT, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = taught
    items = lambada_items()
    passages = lambada.read(write_lines(tmp_path / "p.jsonl", items))
    assert [f"{p.context} {p.word}" for p in passages] == [item["text"] for item in items]
    assert all(" " not in p.word for p in passages)
    found = evaluate_task("lambada", passages, model, tokenizer, batch_size=3)
    nats = []
    for context, word in passages:
        ids = tokenizer.encode(f"{context} {word}")[-65:]
        nats.append(_nats(model, ids, len(tokenizer.encode(f" {word}"))))
    assert_close(found["perplexity"], math.exp(np.mean(nats)), rtol=1e-5, atol=0)
    assert 0 < found["acc"] < 1


def test_plain_text_and_gzip_and_a_limit(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one two three\n\nfour five\n", encoding="utf-8")
    assert lambada.read(tmp_path / "p.txt") == [("one two", "three"), ("four", "five")]
    lines = "".join(json.dumps(item) + "\n" for item in lambada_items())
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(lambada.read(tmp_path / "p.jsonl.gz")) == 40
    assert len(lambada.read(tmp_path / "p.jsonl.gz", 7)) == 7


def test_the_hubs_tables_are_read_too(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    items = [{**item, "label": str(item["label"])} for item in hellaswag_items()]
    parquet.write_table(pa.Table.from_pylist(items), tmp_path / "q.parquet")
    expected = hellaswag.read(write_lines(tmp_path / "q.jsonl", hellaswag_items()))
    assert hellaswag.read(tmp_path / "q.parquet") == expected
    assert hellaswag.read(tmp_path / "q.parquet", 7) == expected[:7]
    (tmp_path / "q.parquet.gz").write_bytes(gzip.compress((tmp_path / "q.parquet").read_bytes()))
    with pytest.raises(UsageError, match=r"q\.parquet\.gz is a parquet file .* decompress it"):
        hellaswag.read(tmp_path / "q.parquet.gz")


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("a dog", " ran", ("a dog", " ran")),
        ("a dog ", "ran", ("a dog", " ran")),  # the space belongs to the word
        ("a dog\n\n", "ran", ("a dog", "\n\nran")),
        ("", " ran", ("<|endoftext|>", " ran")),
        ("  ", "ran", ("<|endoftext|>", "  ran")),
    ],
)
def test_white_space_goes_to_the_continuation(
    context: str, continuation: str, expected: tuple[str, str]
) -> None:
    gpt2 = Tokenizer.gpt2()
    before, after = encode_pair(gpt2, context, continuation)
    assert (gpt2.decode(before), gpt2.decode(after)) == expected


def test_characters_never_seen_are_refused_or_left_out() -> None:
    tokenizer = CharTokenizer("abc \n")
    with pytest.raises(ValueError, match="character 'é'"):
        encode_pair(tokenizer, "ab", " é")
    before, after = encode_pair(tokenizer, "ab", " éc", errors="ignore")
    assert tokenizer.decode(before + after) == "ab c"


GOOD = hellaswag_items(1)[0]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("hellaswag", '{"ctx_a" 1}', "line 2, column 10: Expecting ':'"),
        ("hellaswag", "[1]", "line 2: expected an object with a field 'ctx_a', not [1]"),
        ("hellaswag", {**GOOD, "ctx_a": None}, "line 2: has no field 'ctx_a'"),
        ("hellaswag", {"text": "a b"}, "line 2: has no field 'ctx_a'"),
        ("hellaswag", {**GOOD, "label": ""}, "line 2: has no label; use the validation part"),
        ("hellaswag", {**GOOD, "label": 4}, "line 2: label 4 is not in 0 to 3"),
        ("hellaswag", {**GOOD, "label": True}, "line 2: label True is not in 0 to 3"),
        ("hellaswag", {**GOOD, "label": "x"}, "line 2: label 'x' is not in 0 to 3"),
        ("hellaswag", {**GOOD, "endings": "abcd"}, "line 2: 'endings' must be a list of texts"),
        ("hellaswag", {**GOOD, "endings": ["a", 3]}, "line 2: 'endings' must be"),
        ("hellaswag", {**GOOD, "endings": []}, "line 2: 'endings' must be"),
        ("hellaswag", {**GOOD, "endings": ["a", "[b]"]}, "line 2: an ending has only white space"),
        ("lambada", {"text": "word"}, "line 2: 'word' does not end with a text, a space"),
        ("lambada", {"text": " word"}, "line 2: ' word' does not end"),
        ("lambada", {"text": "a word "}, "line 2: 'a word ' does not end"),
        ("lambada", {"text": 5}, "line 2: 'text' holds 5, expected a text"),
        ("lambada", GOOD, "line 2: has no field 'text'"),
    ],
)
def test_damaged_files_are_refused_with_the_line(
    task: str, line: Any, message: str, tmp_path: Path
) -> None:
    good = GOOD if task == "hellaswag" else lambada_items(1)[0]
    written = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(good)}\n{written}\n", encoding="utf-8")
    read = hellaswag.read if task == "hellaswag" else lambada.read
    with pytest.raises(UsageError) as info:
        read(path)
    assert str(path) in str(info.value)
    assert message in str(info.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 noir\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b"}\n' * 99)[:-20])
    for name, message in {
        "empty.jsonl": "is empty: it contains no questions",
        "latin1.txt": "is not UTF-8: byte 0xe9 at offset 3",
        "cut.jsonl.gz": "is not a complete gzip file",
        "none.jsonl": "cannot be read: No such file",
    }.items():
        with pytest.raises(UsageError, match=message):
            lambada.read(tmp_path / name)
    with pytest.raises(UsageError, match="limit must be at least 1, not 0"):
        lambada.read(tmp_path / "empty.jsonl", 0)
