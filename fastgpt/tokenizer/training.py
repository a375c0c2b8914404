"""Train BPE vocabularies on text; see :meth:`fastgpt.tokenizer.Tokenizer.train`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from operator import index
from pathlib import Path

from fastgpt.tokenizer.base import to_utf8
from fastgpt.tokenizer.vocabulary_files import Vocabulary
from fastgpt.utils.extension import _C
from fastgpt.utils.files import reject_file_name
from fastgpt.utils.text_files import Advance, read_blocks

Source = str | Path | Iterable[str | bytes | Path]

BLOCK_BYTES = 1 << 24  # bytes of a file that are read and counted at a time
MERGES_AT_A_TIME = 256  # between two updates of the progress bar


def learn_vocabulary(
    source: Source,
    vocab_size: int,
    special_tokens: Iterable[str],
    min_frequency: int = 0,
    threads: int = 1,
    progress: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Vocabulary:
    """Learn a vocabulary; see :meth:`Tokenizer.train`.

    block_bytes: size of the blocks in which files are read.
    """
    # Not imported above: it imports rich, which nothing else in this package needs.
    from fastgpt.utils.progress import CountProgress, FileProgress

    names = _check_special_tokens(special_tokens)
    n_merges = index(vocab_size) - 256 - len(names)
    if n_merges < 0:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(names)} special tokens "
            f"require at least {256 + len(names)}"
        )
    if index(min_frequency) < 0:
        raise ValueError(f"min_frequency must be at least 0, not {min_frequency}")
    if index(threads) < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")

    trainer = _C.BpeTrainer(threads)
    with FileProgress("reading", None, progress) as bar:
        _read(trainer, source, bar.advance, block_bytes)
    with CountProgress("merging", n_merges, progress) as bar:
        n_made = _merge(trainer, n_merges, min_frequency, bar.advance)
    if (size := vocab_size - n_merges + n_made) < vocab_size / 2:
        warnings.warn(
            f"the vocabulary has {size:,} tokens instead of {vocab_size:,}: the text has no more "
            "pairs to merge; train on more text",
            stacklevel=3,
        )
    return _vocabulary(trainer, names)


def _check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens must be a list of names, not the str {special_tokens!r}")
    names = list(special_tokens)
    for i, name in enumerate(names):
        if not name:
            raise ValueError("a special token must not be empty")
        if name in names[:i]:
            raise ValueError(f"special token {name!r} is given twice")
        if _is_one_piece(name):
            raise ValueError(
                f"special token {name!r} is a single piece of GPT-2's pattern, so merges could "
                f"also produce it: use one that is several, such as '<|{name.strip()}|>'"
            )
    return names


def _is_one_piece(text: str) -> bool:
    trainer = _C.BpeTrainer()
    trainer.feed(text.encode())
    trainer.end_text()
    return trainer.n_pieces == 1


def _read(trainer: _C.BpeTrainer, source: Source, advance: Advance, block_bytes: int) -> None:
    """Feed all texts and files to the trainer."""
    items: Iterable[object] = [Path(source)] if isinstance(source, (str, Path)) else source
    n_bytes = 0  # since the last update of the progress bar, which costs more than a short text
    for item in items:
        for block in _blocks(item, block_bytes):
            trainer.feed(block)
            n_bytes += len(block)
            if n_bytes >= 1_000_000:
                advance(n_bytes)
                n_bytes = 0
        trainer.end_text()
    if trainer.n_pieces == 0:
        raise ValueError("there is no text to train on: the source is empty")


def _blocks(item: object, block_bytes: int) -> Iterator[bytes]:
    """Yield the bytes of one text, or of one file."""
    if isinstance(item, Path):
        _check_there(item)
        yield from read_blocks(item, block_bytes)
    elif isinstance(item, (str, bytes)):
        if isinstance(item, str):
            reject_file_name(item, "Path({!r}), or bytes to train on the name itself")
        data = to_utf8(item)
        for begin in range(0, len(data), block_bytes):  # Ctrl-C is handled between blocks
            yield data[begin : begin + block_bytes]
    else:
        raise TypeError(
            f"a text must be str, UTF-8 bytes or the Path of a file, not {type(item).__name__} (to "
            "train on one text, pass a list that contains it)"
        )


def _check_there(path: Path) -> None:
    if not os.path.exists(path):  # Path.exists can raise for strings that are not valid file names
        name = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
        raise FileNotFoundError(
            f"file {name!r} does not exist (a str is a path; to train on one text, pass a list "
            "that contains it)"
        )


def _merge(trainer: _C.BpeTrainer, n_merges: int, min_frequency: int, advance: Advance) -> int:
    """Make up to `n_merges` merges; return how many there were."""
    for begin in range(0, n_merges, MERGES_AT_A_TIME):
        wanted = min(MERGES_AT_A_TIME, n_merges - begin)
        made = trainer.train(wanted, min_frequency)
        advance(made)
        if made < wanted:  # no more pairs to merge
            return begin + made
    return n_merges


def _vocabulary(trainer: _C.BpeTrainer, special_tokens: list[str]) -> Vocabulary:
    tokens, _ = _C.parse_merges_file(b"")  # the 256 bytes
    merges = trainer.merges()
    for left, right, _ in merges.tolist():
        tokens.append(tokens[left] + tokens[right])
    ids = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
    return Vocabulary([*tokens, *(name.encode() for name in special_tokens)], merges, ids)
