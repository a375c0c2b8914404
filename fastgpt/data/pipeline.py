"""Prepare a folder of token shards for training from text files.

    train-00000.bin ...    token ids; each document ends with <|endoftext|> (fastgpt.data.shards)
    val-00000.bin ...      token ids of the validation part
    tokenizer.json         the tokenizer
    meta.json              counts, source files and the command

The folder is written under a temporary name in the same parent folder and then renamed, so that an
existing prepared folder is always complete. A lock next to it keeps other processes away.
"""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import fastgpt
from fastgpt.data.documents import Piece, read_documents
from fastgpt.data.encode import encode_pieces
from fastgpt.data.shards import TOKENS_PER_SHARD, ShardWriter
from fastgpt.data.sources import find_sources
from fastgpt.tokenizer import BaseTokenizer, Tokenizer, load_tokenizer
from fastgpt.tokenizer.base import IdArray, to_utf8
from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_directory, contents, sha256, temporary_path, write_json
from fastgpt.utils.hashing import mix
from fastgpt.utils.lock import FileLock, LockedError
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.text_files import regular_file
from fastgpt.utils.threads import map_in_order

META = "meta.json"
# Validation documents are selected pseudo-randomly. If fewer than this many are expected, the last
# part of the whole text is used for validation instead.
MIN_VALIDATION_DOCUMENTS = 10
_DRAW_KEY = 0x76616C  # "val"
_BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Part:
    """The size of one part (training or validation) of the prepared data."""

    tokens: int
    documents: int
    bytes: int  # of text
    shards: int


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        folder: the folder that was written.
        tokenizer: the tokenizer of the ids.
        train: size of the training part.
        val: size of the validation part.
        sources: the files that were read, without those of the validation texts.
        skipped: the paths in the given folders that were not read, with the reason for each.
        invalid: number of rows and JSON objects without a text, which were skipped.
    """

    folder: Path
    tokenizer: BaseTokenizer
    train: Part
    val: Part
    sources: list[Path]
    skipped: dict[Path, str]
    invalid: int

    @property
    def bytes_per_token(self) -> float:
        """Average number of bytes of text per token."""
        text = self.train.bytes + self.val.bytes
        return text / (self.train.tokens + self.val.tokens)


def prepare(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | BaseTokenizer = "gpt2",
    train_vocab: int | None = None,
    field: str = "text",
    skip_invalid: bool = False,
    val: str | Path | Sequence[str | Path] = (),
    val_fraction: float = 0.01,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Tokenize texts into a folder of token shards that ``load_corpus`` and the trainer read.

    Args:
        inputs: files of text, JSON or parquet, which may be compressed, pipes, ``"-"`` for the
            standard input, and folders; see :func:`fastgpt.data.documents.read_documents` and
            :func:`fastgpt.data.sources.find_sources`.
        out: the folder to create.
        tokenizer: ``"gpt2"``, the path of a tokenizer file or folder, or a tokenizer object.
        train_vocab: if given, train a tokenizer with this vocabulary size on the texts.
        field: name of the JSON field or parquet column with the text.
        skip_invalid: skip rows and JSON objects in which `field` is missing, null or not a string.
            They are an error by default. Empty texts are always skipped.
        val: texts for validation, in the same formats. If given, all of `inputs` is used for
            training, except files that are also in `val`.
        val_fraction: without `val`, the share of the documents used for validation. Documents are
            selected by a hash of their index. If fewer than ten are expected, this share of the
            whole text, from its end, is used instead.
        tokens_per_shard: maximum number of ids per file.
        threads: number of batches to encode in parallel. By default one per CPU.
        overwrite: replace an existing folder that was created by this function.
        progress: show progress bars, if standard error is a terminal.

    Memory use does not grow with the size of the texts.

    Raises: UsageError; no files are left behind in this case.
    """
    folder = Path(out)
    _check_options(val_fraction, tokens_per_shard, threads)
    if train_vocab is not None and tokenizer != "gpt2":
        raise UsageError("give --tokenizer or --train-vocab, not both")
    with ExitStack() as stack:
        beside = stack.enter_context(_opened(folder, overwrite))
        val_documents = _DocumentReader(val, field, skip_invalid, progress, stack)
        documents = _DocumentReader(inputs, field, skip_invalid, progress, stack, val_documents)
        if not documents.files:
            raise UsageError(_nothing_to_prepare(documents.skipped))
        chosen = _choose_tokenizer(tokenizer, train_vocab, documents)
        with closing(_parts(documents, val_documents, val_fraction)) as pieces:
            sizes = _write_shards(beside, chosen, tokens_per_shard, pieces, threads)
        _check_not_empty(*sizes, None if val_documents.files else val_fraction)
        invalid = documents.n_invalid + val_documents.n_invalid
        prepared = Prepared(folder, chosen, *sizes, documents.files, documents.skipped, invalid)
        chosen.save(beside / "tokenizer.json")
        _write_meta(beside / META, prepared, documents, val_documents, val_fraction)
    return prepared


@contextmanager
def _opened(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Lock an output folder and yield the temporary folder that replaces it at the end."""
    temporary = temporary_path(folder)
    try:
        with suppress(FileExistsError):  # a file, which the next line reports
            temporary.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(temporary.with_name(f"{temporary.name}.lock"), delete=True):
            _check_output_folder(folder, overwrite)
            with atomic_directory(folder) as beside:
                yield beside
    except LockedError as holder:
        raise UsageError(
            f"{folder} is being prepared by {holder}; wait until it ends, or choose another --out"
        ) from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from None


class _DocumentReader:
    """Reads the documents of all sources; can be read several times.

    The contents of pipes are copied to temporary files, which are deleted when `stack` is closed.
    The files of `excluded` are skipped.
    """

    def __init__(
        self,
        inputs: str | Path | Sequence[str | Path],
        field: str,
        skip_invalid: bool,
        progress: bool,
        stack: ExitStack,
        excluded: _DocumentReader | None = None,
    ) -> None:
        given = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
        self._given = {stack.enter_context(regular_file(path)): path for path in given}
        sources = find_sources(self._given, excluded.files if excluded else ())
        self.files: list[Path] = sources.files
        self.skipped: dict[Path, str] = sources.skipped
        self.n_invalid = 0
        self._field, self._skip_invalid, self._progress = field, skip_invalid, progress

    def pieces(self, label: str) -> Generator[Piece, None, None]:
        """Yield the pieces of all documents, with a labeled progress bar.

        The caller must close the generator.
        """
        total = sum(path.stat().st_size for path in self.files)
        self.n_invalid = 0
        with FileProgress(label, total, self._progress) as bar:
            for path in self.files:
                yield from read_documents(path, self._field, bar.advance, self._skip_or_raise)

    def count_characters(self, max_documents: int) -> int | None:
        """Return the number of characters of all documents.

        If there are at least `max_documents` documents, stop reading there and return None.
        """
        n_characters = n_documents = 0
        with closing(self.pieces("counting")) as pieces:
            for text, ends in pieces:
                n_characters += len(text)
                n_documents += ends
                if n_documents >= max_documents:
                    return None
        if not n_characters:
            raise UsageError(f"{', '.join(map(str, self.files))}: contains no text")
        return n_characters

    def describe(self) -> list[dict[str, str | int]]:
        """Return the path, as it was given, the size and the hash of each file."""
        return [
            {
                "path": str(self._given.get(path, path)),
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in self.files
        ]

    def _skip_or_raise(self, message: str) -> None:
        if not self._skip_invalid:
            raise UsageError(f"{message}; skip such rows with --skip-invalid")
        self.n_invalid += 1


def _choose_tokenizer(
    tokenizer: str | Path | BaseTokenizer, train_vocab: int | None, documents: _DocumentReader
) -> BaseTokenizer:
    if train_vocab is not None:
        try:
            with (
                closing(documents.pieces("training a tokenizer")) as pieces,
                warnings.catch_warnings(action="ignore"),  # the result says if it is too small
            ):
                texts = (to_utf8(text) for text, _ in pieces)  # bytes are not taken for file names
                return Tokenizer.train(texts, train_vocab)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if not isinstance(tokenizer, BaseTokenizer):
        try:
            tokenizer = load_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            raise UsageError(f"tokenizer must be gpt2 or a tokenizer file: {error}") from None
    if tokenizer.eot_token is None:
        raise UsageError(
            f"{tokenizer!r:.60} has no <|endoftext|>, which is needed to end each document"
        )
    return tokenizer


def _parts(
    documents: _DocumentReader, val_documents: _DocumentReader, val_fraction: float
) -> Generator[tuple[str, Piece], None, None]:
    """Yield each piece with its part, "train" or "val". The caller must close the generator.

    Separate validation texts are read first, so that errors in them are reported early.
    """
    if val_documents.files:
        for part, reader in (("val", val_documents), ("train", documents)):
            with closing(reader.pieces("tokenizing")) as pieces:
                yield from ((part, piece) for piece in pieces)
        return
    n_characters = documents.count_characters(math.ceil(MIN_VALIDATION_DOCUMENTS / val_fraction))
    with closing(documents.pieces("tokenizing")) as pieces:
        if n_characters is None:
            yield from _split_randomly(pieces, val_fraction)
        else:
            yield from _split_at(pieces, n_characters - int(n_characters * val_fraction))


def _split_at(pieces: Iterable[Piece], n_train: int) -> Iterator[tuple[str, Piece]]:
    """Assign the first `n_train` characters to "train", and the others to "val"."""
    part = "train"
    for text, ends in pieces:
        if part == "train" and len(text) > n_train:
            yield "train", (text[:n_train], False)
            text, part = text[n_train:], "val"
        n_train -= len(text)
        yield part, (text, ends)


def _split_randomly(pieces: Iterable[Piece], val_fraction: float) -> Iterator[tuple[str, Piece]]:
    """Assign each document to a part, pseudo-randomly."""
    parts = _random_parts(val_fraction)
    part = next(parts)
    for piece in pieces:
        yield part, piece
        if piece[1]:  # it ends its document
            part = next(parts)


def _random_parts(val_fraction: float) -> Iterator[str]:
    """Yield the part of document 0, of document 1, and so on; it depends on the index alone."""
    limit = np.uint64(val_fraction * 2.0**64)  # hashes are uniform: this share is below the limit
    for first in count(0, 4096):
        hashes = mix(_DRAW_KEY, np.arange(first, first + 4096, dtype=np.uint64))
        yield from np.where(hashes < limit, "val", "train").tolist()


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, list[Piece]]]:
    """Collect the pieces of each part, in order, into batches large enough for one thread task."""
    held: dict[str, list[Piece]] = {"train": [], "val": []}
    sizes = dict.fromkeys(held, 0)
    for part, piece in pieces:
        held[part].append(piece)
        sizes[part] += len(piece[0]) + len(END_OF_TEXT)
        if sizes[part] >= _BATCH_CHARACTERS:
            yield part, held[part]
            held[part], sizes[part] = [], 0
    yield from held.items()


def _encode(
    tokenizer: BaseTokenizer, batch: tuple[str, list[Piece]]
) -> tuple[str, IdArray, NDArray[np.int64], int]:
    """Return the part of a batch, its ids, the ends of documents in them, and its bytes of text."""
    part, pieces = batch
    n_bytes = sum(len(text.encode(errors="replace")) for text, _ in pieces)
    return part, *encode_pieces(tokenizer, pieces), n_bytes


def _write_shards(
    folder: Path,
    tokenizer: BaseTokenizer,
    tokens_per_shard: int,
    pieces: Iterable[tuple[str, Piece]],
    threads: int | None,
) -> tuple[Part, Part]:
    """Encode the pieces and write them into shards; return the sizes of both parts."""
    n_bytes = {"train": 0, "val": 0}
    with (
        ShardWriter(folder / "train", tokenizer, tokens_per_shard) as train,
        ShardWriter(folder / "val", tokenizer, tokens_per_shard) as val,
    ):
        writers = {"train": train, "val": val}
        encode = partial(_encode, tokenizer)
        for part, ids, document_ends, size in map_in_order(encode, _batches(pieces), threads):
            writers[part].append(ids, document_ends)
            n_bytes[part] += size
    return (
        Part(train.n_tokens, train.n_documents, n_bytes["train"], len(train.paths)),
        Part(val.n_tokens, val.n_documents, n_bytes["val"], len(val.paths)),
    )


def _check_options(val_fraction: float, tokens_per_shard: int, threads: int | None) -> None:
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    if tokens_per_shard < 1:
        raise UsageError(f"tokens_per_shard must be at least 1, not {tokens_per_shard}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")


def _check_output_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not contents(folder)):
        return
    if not (folder / META).is_file():
        raise UsageError(f"{folder} exists, and is not a prepared folder: choose another --out")
    if not overwrite:
        raise UsageError(
            f"{folder} is already prepared: train on it (--data {shlex.quote(str(folder))}), "
            "replace it with --overwrite, or choose another --out"
        )


def _nothing_to_prepare(skipped: dict[Path, str]) -> str:
    if skipped:
        return "nothing to prepare: all texts are also used for validation"
    return "nothing to prepare: pass at least one text file or folder of text files"


def _check_not_empty(train: Part, val: Part, val_fraction: float | None) -> None:
    for what, part in (("training", train), ("validation", val)):
        if part.tokens:
            continue
        if val_fraction is None:
            raise UsageError(f"the files for {what} contain no text")
        raise UsageError(
            f"no text is left for {what}: use more text, or choose another --val-fraction "
            f"(now {val_fraction})"
        )


def _write_meta(
    path: Path,
    prepared: Prepared,
    documents: _DocumentReader,
    val_documents: _DocumentReader,
    val_fraction: float,
) -> None:
    tokenizer = prepared.tokenizer
    has_val = bool(val_documents.files)
    content = {
        "format": 1,
        "fastgpt": fastgpt.__version__,
        "command": shlex.join(sys.argv),
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.fingerprint},
        "train": asdict(prepared.train),
        "val": asdict(prepared.val),
        "val_fraction": None if has_val else val_fraction,
        "bytes_per_token": prepared.bytes_per_token,
        "sources": documents.describe(),
        **({"val_sources": val_documents.describe()} if has_val else {}),
        "skipped": {str(path): reason for path, reason in prepared.skipped.items()},
        "invalid": prepared.invalid,
    }
    write_json(path, content)
