"""Evaluation texts: locate, read and tokenize them, count their bytes, and score a model on them.

Every token of the text is scored. The first one is included if the tokenizer has an
``<|endoftext|>`` to precede it. Documents are separated by that token, which is scored like any
other (a model must predict where a document ends) but counts as zero bytes; the context of a token
extends over it into the previous document. Bytes are the UTF-8 bytes encoded by the scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastgpt.data.corpus import load_corpus
from fastgpt.data.documents import cut_at_pieces, file_format, read_documents
from fastgpt.data.text import PACKAGED, Text, read_text
from fastgpt.data.token_files import Ids, Tokens
from fastgpt.evaluation.log_likelihood import Advance, Scores, perplexity
from fastgpt.model import GPT
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import reject_file_name
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.text_files import read_blocks, regular_file

VAL_FRACTION = 0.1  # for texts that do not belong to a run
LARGE = 1 << 26  # file size in bytes from which a progress bar is shown: tokenizing takes seconds
_PIECE = 1 << 20  # tokens whose bytes are counted at once

Part = Literal["train", "val"]


@dataclass(frozen=True)
class ScoredText:
    """A tokenized text; `name` describes it in messages."""

    tokens: Tokens
    tokenizer: BaseTokenizer
    name: str

    @property
    def n_scored(self) -> int:
        """The number of scored tokens."""
        return len(self.tokens) - (self.tokenizer.eot_token is None)

    @property
    def n_bytes(self) -> int:
        """The number of bytes encoded by the scored tokens; separators of documents have none."""
        first = len(self.tokens) - self.n_scored
        pieces = range(first, len(self.tokens), _PIECE)
        return sum(_n_bytes(self.tokenizer, self.tokens[i : i + _PIECE]) for i in pieces)

    def cut(self, max_tokens: int | None) -> ScoredText:
        """Return the first `max_tokens` tokens of the text, or the whole text if it is None."""
        if max_tokens is None:
            return self
        if max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {max_tokens}")
        return replace(self, tokens=self.tokens[:max_tokens])

    def score(
        self,
        model: GPT,
        *,
        context: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        advance: Advance = lambda n: None,
    ) -> Scores:
        """Score the text with `fastgpt.evaluation.log_likelihood.perplexity`.

        Raises: UsageError if the text has nothing to score; ValueError for an invalid window.
        """
        if self.n_scored < 1:
            raise UsageError(
                f"{self.name} has {len(self.tokens)} token, and its tokenizer no <|endoftext|> to "
                "precede it: there is nothing to score; use a longer text"
            )
        scores = perplexity(
            model,
            self.tokens,
            context=context,
            stride=stride,
            batch_size=batch_size,
            start_token=self.tokenizer.eot_token,
            advance=advance,
        )
        return replace(scores, n_bytes=self.n_bytes)


def evaluate_text(
    model: GPT,
    tokenizer: BaseTokenizer,
    text: str | Path,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    skip_unknown: bool = False,
) -> Scores:
    """Score a text (a str), or what is in a file (a Path, in the formats of `load_text`).

    Window and batch size are those of `fastgpt.evaluation.log_likelihood.perplexity`; the module's
    docstring defines what is counted. skip_unknown: leave out characters that the tokenizer lacks
    instead of raising.

    Raises: UsageError for an empty text, unknown characters or invalid files; ValueError for a str
        that is the name of an existing file.
    """
    if isinstance(text, Path):
        found = load_text(str(text), tokenizer, skip_unknown=skip_unknown)
    else:
        reject_file_name(text, "Path({!r})")
        documents = _documents(Text([(text, False)], plain=True), tokenizer)
        found = _tokenize(documents, tokenizer, "the text", skip_unknown)
    return found.score(model, context=context, stride=stride, batch_size=batch_size)


def load_text(
    data: str,
    tokenizer: BaseTokenizer,
    part: Part | None = None,
    *,
    skip_unknown: bool = False,
    max_tokens: int | None = None,
) -> ScoredText:
    """Load and tokenize a text: a file, a folder of tokens, or the name of a packaged text.

    A file or a pipe has one of the formats of :func:`fastgpt.data.documents.read_documents`, with
    the texts in the field ``text``. The whole file is used unless `part` is given: then the last
    tenth of the characters is the validation part, as in training. Folders (of `fastgpt.prepare`,
    nanoGPT, llm.c) have a training and a validation part, and packaged texts are split like files;
    both use the validation part unless `part` is "train". max_tokens: the maximum number of tokens
    to load.

    Raises: UsageError with the file and the position of the error.
    """
    path = PACKAGED.get(data, Path(data))
    if path.is_dir():
        corpus = load_corpus(data, tokenizer)
        return part_of(corpus.train, corpus.val, part, tokenizer, data).cut(max_tokens)
    if data in PACKAGED or part is not None:
        name = f"the {_PARTS[part or 'val']} part of {data}"
        train, val = read_text(data).split(VAL_FRACTION)
        documents = _documents(train if part == "train" else val, tokenizer)
        return _tokenize(documents, tokenizer, name, skip_unknown).cut(max_tokens)
    with regular_file(path) as file, _reading(file) as bar:
        pieces = _read_file(file, tokenizer, bar.advance)
        return _tokenize(pieces, tokenizer, data, skip_unknown, max_tokens).cut(max_tokens)


def part_of(
    train: Tokens, val: Tokens, part: Part | None, tokenizer: BaseTokenizer, data: str
) -> ScoredText:
    """Return the training part of `data`, or by default its validation part."""
    tokens = train if part == "train" else val
    return ScoredText(tokens, tokenizer, f"the {_PARTS[part or 'val']} part of {data}")


# --- helpers ---------------------------------------------------------------------------------

_PARTS: dict[Part, str] = {"train": "training", "val": "validation"}


def _read_file(path: Path, tokenizer: BaseTokenizer, advance: Advance) -> Iterator[str | None]:
    """Yield the pieces of a file's text, and None at the end of each document.

    For a tokenizer without an <|endoftext|> token, that string in a text file is ordinary text.
    """
    if tokenizer.eot_token is None and file_format(path) == "text":
        yield from map(bytes.decode, cut_at_pieces(read_blocks(path, advance=advance)))
        return
    for text, ends in read_documents(path, advance=advance):
        if text:
            yield text
        if ends:
            yield None


def _documents(text: Text, tokenizer: BaseTokenizer) -> Iterator[str | None]:
    """Yield the documents of a text, and None at the end of each; see `_read_file`."""
    plain = tokenizer.eot_token is None and text.plain
    for document, ends in text.pieces if plain else text.documents:
        yield document
        if ends:
            yield None


def _tokenize(
    pieces: Iterable[str | None],
    tokenizer: BaseTokenizer,
    name: str,
    skip_unknown: bool,
    max_tokens: int | None = None,
) -> ScoredText:
    """Encode the pieces of a text, where None separates documents, up to about `max_tokens`."""
    errors: Literal["ignore", "strict"] = "ignore" if skip_unknown else "strict"
    rows: list[Ids] = [np.zeros(0, np.uint32)]
    n_tokens, n_read, n_known, ended = 0, 0, 0, False  # n_read and n_known are in bytes
    for piece in pieces:
        if piece is None:
            ended = True
            continue
        if ended:
            rows.append(_separator(tokenizer))
            ended = False
        try:
            rows.append(tokenizer.encode_to_numpy(piece, errors=errors))
        except ValueError as error:  # an unknown character
            place = f", after {n_read:,} bytes" if n_read else ""
            raise UsageError(f"{name}{place}: {error}") from None
        n_tokens += len(rows[-1])
        n_read += len(piece.encode("utf-8", "replace"))
        n_known += _n_bytes(tokenizer, rows[-1]) if skip_unknown else 0
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    if not n_tokens:
        raise UsageError(f"{name} is empty: there is nothing to score")
    if skip_unknown and n_known < n_read:
        name += f", except {n_read - n_known:,} bytes of unknown characters"
    return ScoredText(np.concatenate(rows), tokenizer, name)


def _separator(tokenizer: BaseTokenizer) -> Ids:
    """Return the ids that separate two documents: <|endoftext|>, or a newline without it."""
    if tokenizer.eot_token is not None:
        return np.array([tokenizer.eot_token], np.uint32)
    return tokenizer.encode_to_numpy("\n", errors="ignore")


def _n_bytes(tokenizer: BaseTokenizer, ids: Ids) -> int:
    """Return the number of bytes encoded by ids; special tokens count as zero bytes."""
    specials = tokenizer.special_tokens.items()
    names = sum(int((ids == special).sum()) * len(name.encode()) for name, special in specials)
    return len(tokenizer.decode_bytes(ids)) - names


def _reading(path: Path) -> FileProgress:
    size = path.stat().st_size if path.is_file() else 0
    return FileProgress(f"reading {path.name}", size, shown=size >= LARGE)
