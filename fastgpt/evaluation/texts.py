"""Texts to score a model on: found, read, tokenized, their bytes counted.

What is counted: every token of the text, the first one too where the tokenizer has an
``<|endoftext|>`` to read before it. Documents are parted by that token, which is scored like any
other (a model must know where a document ends) but stands for no bytes; contexts reach over it,
into the document before. Bytes are those of UTF-8 that the scored tokens stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastgpt.data.corpus import PACKAGED, Tokens, load_corpus, read_text
from fastgpt.data.documents import cut_at_pieces, read_documents, split_documents
from fastgpt.data.token_files import Ids
from fastgpt.evaluation.log_likelihood import Advance, Scores, perplexity
from fastgpt.model import GPT
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils.errors import UsageError
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.text_files import read_blocks

VAL_FRACTION = 0.1  # of a text that no run says it of
FIELD = "text"  # of JSON objects and parquet tables
FORMATS = (".jsonl", ".json", ".parquet")
LARGE = 1 << 26  # bytes that take seconds to tokenize: worth a bar
_PIECE = 1 << 20  # tokens whose bytes are counted at once

Part = Literal["train", "val"]


@dataclass(frozen=True)
class ScoredText:
    """A text as tokens; `name` says in words what it is."""

    tokens: Tokens
    tokenizer: BaseTokenizer
    name: str

    @property
    def n_scored(self) -> int:
        """How many of its tokens are scored."""
        return len(self.tokens) - (self.tokenizer.eot_token is None)

    @property
    def n_bytes(self) -> int:
        """How many bytes of text those stand for: none where a document ends."""
        first = len(self.tokens) - self.n_scored
        pieces = range(first, len(self.tokens), _PIECE)
        return sum(_n_bytes(self.tokenizer, self.tokens[i : i + _PIECE]) for i in pieces)

    def cut(self, max_tokens: int | None) -> ScoredText:
        """Return so many tokens of it, the first ones, or all."""
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

        Raises UsageError if the text has nothing to score, or the window does not fit the model.
        """
        if self.n_scored < 1:
            raise UsageError(
                f"{self.name} has {len(self.tokens)} token, and its tokenizer no <|endoftext|> to "
                "stand before it: there is nothing to score; bring more text"
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

    Raises: UsageError for a text that is empty, unknown characters and bad files.
    """
    if isinstance(text, Path):
        found = load_text(str(text), tokenizer, skip_unknown=skip_unknown)
    else:
        found = _tokenize(_documents(text, tokenizer), tokenizer, "the text", skip_unknown)
    return found.score(model, context=context, stride=stride, batch_size=batch_size)


def load_text(
    data: str,
    tokenizer: BaseTokenizer,
    part: Part | None = None,
    *,
    skip_unknown: bool = False,
    max_tokens: int | None = None,
) -> ScoredText:
    """Find and tokenize a text: a file, a folder of tokens, or the name of a packaged text.

    A file is UTF-8 text, .jsonl, .json or .parquet (their field ``text``), also with .gz; it is
    taken whole, unless `part` is given: the last tenth of the characters of a plain text is for
    validation, as where a model is trained on it. Folders (of `fastgpt.prepare`, nanoGPT, llm.c)
    hold a training and a validation part, and packaged texts are split as files are; of both the
    validation part is taken unless `part` is "train". max_tokens: where reading may end.

    Raises: UsageError that names the file and the place.
    """
    path = PACKAGED.get(data, Path(data))
    if path.is_dir():
        corpus = load_corpus(data, tokenizer)
        return part_of(corpus.train, corpus.val, part, tokenizer, data).cut(max_tokens)
    if data in PACKAGED or part is not None:
        name = f"the {_PARTS[part or 'val']} part of {data}"
        documents = _documents(_text_of_part(path, part or "val"), tokenizer)
        return _tokenize(documents, tokenizer, name, skip_unknown).cut(max_tokens)
    with _reading(path) as bar:
        pieces = _read_file(path, tokenizer, bar.advance)
        return _tokenize(pieces, tokenizer, data, skip_unknown, max_tokens).cut(max_tokens)


def part_of(
    train: Tokens, val: Tokens, part: Part | None, tokenizer: BaseTokenizer, data: str
) -> ScoredText:
    """Return the training or, by default, the validation part of `data`."""
    tokens = train if part == "train" else val
    return ScoredText(tokens, tokenizer, f"the {_PARTS[part or 'val']} part of {data}")


# --- helpers ---------------------------------------------------------------------------------

_PARTS: dict[Part, str] = {"train": "training", "val": "validation"}


def _read_file(path: Path, tokenizer: BaseTokenizer, advance: Advance) -> Iterator[str | None]:
    """Yield the pieces of a file's text, and None where a document ends.

    To a tokenizer that has no token for it, <|endoftext|> is text like any other.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    if tokenizer.eot_token is None and kind not in FORMATS:
        for block in cut_at_pieces(read_blocks(path, advance=advance)):
            yield block.decode()
        return
    for text, ends in read_documents(path, FIELD, advance):
        if text:
            yield text
        if ends:
            yield None


def _text_of_part(path: Path, part: Part) -> str:
    """Return one part of a plain text, cut where training cuts it."""
    text = read_text(path)
    cut = len(text) - int(len(text) * VAL_FRACTION)
    return text[:cut] if part == "train" else text[cut:]


def _documents(text: str, tokenizer: BaseTokenizer) -> Iterator[str | None]:
    """Yield the documents of a text, and None between them."""
    parted = [text] if tokenizer.eot_token is None else split_documents(text)
    for number, document in enumerate(parted):
        if number:
            yield None
        yield document


def _tokenize(
    pieces: Iterable[str | None],
    tokenizer: BaseTokenizer,
    name: str,
    skip_unknown: bool,
    max_tokens: int | None = None,
) -> ScoredText:
    """Encode the pieces of a text, in which None parts documents, until there are `max_tokens`."""
    errors: Literal["ignore", "strict"] = "ignore" if skip_unknown else "strict"
    rows: list[Ids] = [np.zeros(0, np.uint32)]
    n_tokens, n_read, n_known, ended = 0, 0, 0, False  # the middle two in bytes
    for piece in pieces:
        if piece is None:
            ended = True
            continue
        if ended:
            rows.append(_separator(tokenizer))
            ended = False
        try:
            rows.append(tokenizer.encode_to_numpy(piece, errors=errors))
        except ValueError as error:
            raise _unknown(name, n_read, error) from None
        n_tokens += len(rows[-1])
        n_read += len(piece.encode("utf-8", "replace"))
        n_known += _n_bytes(tokenizer, rows[-1]) if skip_unknown else 0
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    if not n_tokens:
        raise UsageError(f"{name} is empty: there is nothing to score")
    if skip_unknown and n_known < n_read:
        name += f", but {n_read - n_known:,} bytes of unknown characters"
    return ScoredText(np.concatenate(rows), tokenizer, name)


def _separator(tokenizer: BaseTokenizer) -> Ids:
    """Return what stands between two documents: <|endoftext|>, else a newline."""
    if tokenizer.eot_token is not None:
        return np.array([tokenizer.eot_token], np.uint32)
    return tokenizer.encode_to_numpy("\n", errors="ignore")


def _unknown(name: str, n_bytes_before: int, error: ValueError) -> UsageError:
    place = f", after {n_bytes_before:,} bytes" if n_bytes_before else ""
    return UsageError(f"{name}{place}: {error}")


def _n_bytes(tokenizer: BaseTokenizer, ids: Ids) -> int:
    """Return how many bytes of text ids stand for; special tokens stand for none."""
    specials = tokenizer.special_tokens.items()
    names = sum(int((ids == special).sum()) * len(name.encode()) for name, special in specials)
    return len(tokenizer.decode_bytes(ids)) - names


def _reading(path: Path) -> FileProgress:
    size = path.stat().st_size if path.is_file() else 0
    return FileProgress(f"reading {path.name}", size, shown=size >= LARGE)
