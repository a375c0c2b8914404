"""Tests of loading a corpus."""

from pathlib import Path

import numpy as np
import pytest

from fastgpt.data.corpus import load_corpus
from fastgpt.utils.errors import UsageError


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_text_is_split_in_order(verse: Path, tokenizer: str) -> None:
    corpus = load_corpus(str(verse), tokenizer, 0.1)
    text = verse.read_text(encoding="utf-8")
    assert corpus.tokenizer.decode(corpus.train) == text[:10_800]
    assert corpus.tokenizer.decode(corpus.val) == text[10_800:]
    assert corpus.train.dtype == np.uint16


def test_the_packaged_text() -> None:
    corpus = load_corpus("shakespeare")
    assert corpus.tokenizer.vocab_size == 65
    assert len(corpus.train) + len(corpus.val) == 1_115_394


def test_lines_that_end_documents_are_no_text(tmp_path: Path) -> None:
    eot = "<|endoftext|>"
    path = tmp_path / "stories.txt"
    stories = [f"Story {i}, with {eot} in it." for i in range(10)]
    path.write_text("".join(f"{story}\n{eot}\n\n" for story in stories), "utf-8")
    corpus = load_corpus(str(path), "gpt2", 0.5)
    ids = [*corpus.train.tolist(), *corpus.val.tolist()]
    assert ids.count(50256) == 10
    assert ids[-1] == 50256
    first = ids[: ids.index(50256)]
    assert corpus.tokenizer.decode(first) == stories[0]
    path.write_text("".join(f"{i}\n{eot}\n" for i in range(10)), "utf-8")
    assert load_corpus(str(path), "gpt2", 0.01).train.tolist() == [
        token_id for i in range(10) for token_id in (*corpus.tokenizer.encode(str(i)), 50256)
    ]
    path.write_text(f"{eot}\none\n{eot}\n{eot}\ntwo{eot}\n", "utf-8")
    assert load_corpus(str(path), "gpt2", 0.01).train.tolist() == [
        *corpus.tokenizer.encode("one"),
        50256,
        *corpus.tokenizer.encode(f"two{eot}\n"),
    ]
    path.write_text(f"{eot}\n" * 10, "utf-8")
    assert len(load_corpus(str(path), "gpt2", 0.5).train) == 0
    assert len(load_corpus(str(path), "char", 0.5).train) == 70  # the marker is ordinary text here


def test_a_changed_text_is_detected(verse: Path) -> None:
    digest = load_corpus(str(verse)).sha256
    assert load_corpus(str(verse), sha256=digest).sha256 == digest
    verse.write_text(verse.read_text("utf-8").replace("Before", "before", 1), "utf-8")
    with pytest.raises(UsageError, match=r"verse\.txt is not the text that the run was trained on"):
        load_corpus(str(verse), sha256=digest)


STORIES = "<|endoftext|>\n".join(f"Once upon a time there were {n} cats.\n" for n in range(200))


def test_a_tokenizer_is_learned_from_the_training_part(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(STORIES + "<|endoftext|>\n" + "zyzzyva " * 50)
    corpus = load_corpus(str(path), "bpe", 0.05, vocab_size=300)
    assert corpus.tokenizer.vocab_size == 300
    assert corpus.tokenizer.eot_token in corpus.train
    assert corpus.tokenizer.count(" upon") == 1
    assert corpus.tokenizer.count("zyzzyva") > 4  # of the validation part alone
    with pytest.raises(UsageError, match="tokenizer bpe: vocab_size 100 is too small"):
        load_corpus(str(path), "bpe", vocab_size=100)


def test_a_tokenizer_in_a_file_or_folder(verse: Path, tmp_path: Path) -> None:
    learned = load_corpus(str(verse), "bpe", vocab_size=300).tokenizer
    learned.save(tmp_path / "mine.json")
    (tmp_path / "folder").mkdir()
    learned.save(tmp_path / "folder")
    for name in ("mine.json", "folder"):
        assert load_corpus(str(verse), str(tmp_path / name)).tokenizer == learned
    with pytest.raises(UsageError, match=r"tokenizer .*none\.json: .*No such file"):
        load_corpus(str(verse), str(tmp_path / "none.json"))


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "bpe"])
def test_another_text_to_validate_on(verse: Path, tmp_path: Path, tokenizer: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text("O brave new world, naïve one.\n" * 9, encoding="utf-8")
    corpus = load_corpus(str(verse), tokenizer, val_data=str(other), vocab_size=300)
    assert corpus.tokenizer.decode(corpus.train) == verse.read_text()
    assert corpus.tokenizer.decode(corpus.val) == other.read_text(encoding="utf-8")
    other.write_text("Another one.\n" * 9)
    with pytest.raises(UsageError, match=r"verse\.txt with .*other\.txt is not the text"):
        load_corpus(str(verse), tokenizer, sha256=corpus.sha256, val_data=str(other))
    with pytest.raises(UsageError, match="val_data can only be used with a text file"):
        load_corpus(str(tmp_path), val_data=str(other))
