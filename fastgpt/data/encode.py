"""A text file of any size into token shards, as one document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from fastgpt.data.documents import cut_at_pieces
from fastgpt.data.shards import TOKENS_PER_SHARD, ShardWriter
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.tokenizer.bpe import IdArray
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

    The ids are those of the whole text, as one document; special tokens in it are ordinary text. A
    byte order mark is left out, and Windows line ends become newlines.

    Args:
        tokenizer: encodes the text.
        path: the text.
        out: folder and name of the shards: ``OUT-00000.bin`` and so on
            (:mod:`fastgpt.data.shards`).
        threads: number of blocks to encode at once, while the caller's thread reads and writes; by
            default one for each CPU.
        progress: show a bar, if standard error is a terminal.
        tokens_per_shard: the largest number of ids in a file.

    Returns: the files. Raises: UsageError for a text that is missing, empty or not UTF-8 (it says
        where), ValueError for a character that the vocabulary does not have, FileExistsError if
        there are such shards already. Then none are written.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"data file {path} cannot be read: {error.strerror}") from None
    with (
        FileProgress(path.name, size, progress) as bar,
        ShardWriter(out, tokenizer, tokens_per_shard) as writer,
    ):
        blocks = _with_offsets(cut_at_pieces(read_blocks(path, advance=bar.advance)))
        encode = partial(_encode_block, tokenizer, path)
        for ids in map_in_order(encode, blocks, threads):
            writer.append(ids, document_starts=() if writer.n_tokens else (0,))
        if not writer.n_tokens:
            raise UsageError(f"data file {path} is empty ({size} bytes)")
    return writer.paths


def _encode_block(tokenizer: BaseTokenizer, path: Path, block: tuple[int, bytes]) -> IdArray:
    offset, text = block
    try:
        return tokenizer.encode_to_numpy(text)
    except ValueError as error:
        raise ValueError(f"{path}, after {offset:,} bytes: {error}") from None


def _with_offsets(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Put in front of each block how many bytes came before it."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)
