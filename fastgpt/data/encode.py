"""Encode documents into token ids, and a text file of any size into token shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgpt.data.documents import Piece, cut_at_pieces
from fastgpt.data.shards import TOKENS_PER_SHARD, ShardWriter
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.tokenizer.base import IdArray
from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT
from fastgpt.utils.errors import UsageError
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.text_files import read_blocks
from fastgpt.utils.threads import map_in_order


def encode_file(
    tokenizer: BaseTokenizer,
    path: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    progress: bool = True,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> list[Path]:
    """Encode a UTF-8 text file of any size into token shards, without holding it in memory.

    The ids are those of the whole text encoded as one document; special tokens in it are encoded as
    ordinary text. A byte order mark is removed, and Windows line endings become newlines.

    Args:
        tokenizer: tokenizer that encodes the text.
        path: path of the text file.
        out: path prefix of the shards, which are named ``OUT-00000.bin`` and so on
            (:mod:`fastgpt.data.shards`).
        threads: number of blocks to encode in parallel, while the calling thread reads and writes.
            By default one per CPU.
        progress: show a progress bar, if standard error is a terminal.
        tokens_per_shard: maximum number of ids per file.

    Returns: the paths of the shards.

    Raises: UsageError for a text that is missing, empty or not UTF-8 (with the position),
        ValueError for a character that is not in the vocabulary, FileExistsError if such shards
        exist. No shards are written in case of an error.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # read_blocks reports the error
    with (
        FileProgress(path.name, size, progress) as bar,
        ShardWriter(out, tokenizer, tokens_per_shard) as writer,
    ):
        blocks = _with_offsets(cut_at_pieces(read_blocks(path, advance=bar.advance)))
        encode = partial(_encode_block, tokenizer, path)
        for ids in map_in_order(encode, blocks, threads):
            writer.append(ids)
        if not writer.n_tokens:
            raise UsageError(f"data file {path} is empty ({size} bytes)")
    return writer.paths


def encode_pieces(
    tokenizer: BaseTokenizer, pieces: Sequence[Piece]
) -> tuple[IdArray, NDArray[np.int64]]:
    """Encode the pieces of documents, with the id of ``<|endoftext|>`` after each document's end.

    The tokenizer must have this token. Where a text contains the string itself, it is ordinary
    text.

    Returns: ids ``[n]``, and the positions after the ends of documents.
    """
    marked = "".join(text + END_OF_TEXT if ends else text for text, ends in pieces)
    if marked.count(END_OF_TEXT) == sum(ends for _, ends in pieces):
        # No text contains the string: every occurrence ends a document. One call encodes them all.
        ids = tokenizer.encode_to_numpy(marked, allowed_special={END_OF_TEXT})
        return ids, np.flatnonzero(ids == tokenizer.eot_token) + 1
    eot = tokenizer.encode_to_numpy(END_OF_TEXT, allowed_special={END_OF_TEXT})  # [1]
    rows = [np.append(tokenizer.encode_to_numpy(text), eot[: int(ends)]) for text, ends in pieces]
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])[[ends for _, ends in pieces]]


def _encode_block(tokenizer: BaseTokenizer, path: Path, block: tuple[int, bytes]) -> IdArray:
    offset, text = block
    try:
        return tokenizer.encode_to_numpy(text)
    except ValueError as error:
        raise ValueError(f"{path}, after {offset:,} bytes: {error}") from None


def _with_offsets(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Pair each block with the number of bytes before it."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)
