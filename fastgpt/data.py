"""Text to tokens to batches.

The order of the training windows is a function of (seed, step) alone: each epoch cuts the tokens
into windows from a fresh offset and visits them in a pseudo-random permutation, every window
exactly once. Nothing has to be stored to continue anywhere.
"""

import codecs
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.documents import not_utf8
from fastgpt.errors import UsageError
from fastgpt.hashing import mix as mix
from fastgpt.preparation import META
from fastgpt.preparation import prepare as prepare
from fastgpt.shards import ShardedIds, joined, read_shards, verify_shard
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer, load_tokenizer

PACKAGED = {"shakespeare": Path(__file__).parent / "assets" / "tinyshakespeare.txt"}

Tokens = npt.NDArray[np.unsignedinteger[Any]] | ShardedIds


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: `train` and `val` (uint16 or uint32), and what made them.

    The tokens of a prepared folder stay on disk and are read where they are indexed.
    """

    train: Tokens
    val: Tokens
    tokenizer: BaseTokenizer
    sha256: str


def load_corpus(
    data: str,
    tokenizer: str | BaseTokenizer = "char",
    val_fraction: float = 0.1,
    sha256: str | None = None,
) -> Corpus:
    """Read a text (a path, or the name of a packaged one) and tokenize its two parts.

    tokenizer: ``"char"`` (one token per different character of the text), ``"gpt2"``, or one that
    is given. The last `val_fraction` of the characters is for validation. sha256: the text's, if it
    must be a certain one.

    A folder that :func:`prepare` made is tokenized and split already: `val_fraction` says nothing
    of it, and `tokenizer` only if one is given, which must be the folder's own.
    """
    if data not in PACKAGED and Path(data).is_dir():
        return _load_prepared(Path(data), tokenizer, sha256)
    text = read_text(PACKAGED.get(data, Path(data)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    if sha256 not in (None, digest):
        raise UsageError(f"{data} is not the text that the run was trained on: its SHA-256 differs")
    if tokenizer == "char":
        tokenizer = CharTokenizer.from_text(text)
    elif tokenizer == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif isinstance(tokenizer, str):
        raise UsageError(f"tokenizer must be char, gpt2 or a tokenizer, not {tokenizer!r}")
    cut = len(text) - int(len(text) * val_fraction)
    try:
        train, val = (tokenizer.encode_to_numpy(part) for part in (text[:cut], text[cut:]))
    except ValueError as error:
        raise UsageError(f"{data}: {error}") from None
    return Corpus(train, val, tokenizer, digest)


def _load_prepared(folder: Path, tokenizer: str | BaseTokenizer, sha256: str | None) -> Corpus:
    """Open the shards of a prepared folder, and check every id of them."""
    if not (folder / META).is_file():
        raise UsageError(
            f"{folder} is a folder, but no prepared one (it has no {META}); make one of the texts "
            f"in it: python -m fastgpt.prepare {shlex.quote(str(folder))} --out data/my"
        )
    try:
        own = load_tokenizer(folder / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of {folder} cannot be read: {error}") from None
    if isinstance(tokenizer, BaseTokenizer) and tokenizer != own:
        raise UsageError(
            f"{folder} was prepared with another tokenizer: its fingerprint is "
            f"{own.fingerprint[:16]}, not {tokenizer.fingerprint[:16]}"
        )
    train, val = (read_shards(folder / name, own, check=True) for name in ("train", "val"))
    headers = b"".join(shard.header.pack() for shard in [*train, *val])
    digest = hashlib.sha256(headers).hexdigest()
    if sha256 is not None:
        if sha256 != digest:
            raise UsageError(f"{folder} is not what the run was trained on: its SHA-256 differs")
        for shard in [*train, *val]:
            verify_shard(shard)
    return Corpus(joined(train), joined(val), own, digest)


def read_text(path: Path) -> str:
    """Read a UTF-8 file whole; refuse what is not one, saying where and what to do."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        packaged = ", ".join(PACKAGED)
        raise UsageError(
            f"data file {path} does not exist; give a plain text file, or one of: {packaged}"
        ) from None
    except OSError as error:
        raise UsageError(f"data file {path} cannot be read: {error.strerror}") from None
    start = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    if len(raw) == start:
        raise UsageError(f"data file {path} is empty ({len(raw)} bytes)")
    try:
        return raw[start:].decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise not_utf8(path, raw[at], at) from None


class Batches:
    """Training batches of `tokens`, addressed by step: `batches[i]` is always the same.

    Each is a pair `(inputs, targets)` of int64 `[batch_size, block_size]`, targets one token on.
    """

    def __init__(self, tokens: Tokens, block_size: int, batch_size: int, seed: int) -> None:
        self.n_windows = (len(tokens) - block_size) // block_size
        if self.n_windows < 1:
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, but block_size={block_size} needs "
                f"at least {2 * block_size:,}; bring more text or lower --block-size to at most "
                f"{len(tokens) // 2}"
            )
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed = seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        first = step * self.batch_size
        sample = np.arange(first, first + self.batch_size, dtype=np.uint64)
        epoch, index = np.divmod(sample, np.uint64(self.n_windows))
        return gather(self.tokens, self._starts(epoch, index), self.block_size)

    def _starts(
        self, epochs: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64]:
        starts = np.empty(len(epochs), dtype=np.int64)
        for epoch in np.unique(epochs):  # one, or two at an epoch's end
            key = mix(self.seed, epoch)
            offset = int(mix(key, 0)) % self.block_size
            here = epochs == epoch
            window = permute(indices[here], self.n_windows, key).astype(np.int64)
            starts[here] = offset + window * self.block_size
        return starts


def gather(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> tuple[Tensor, Tensor]:
    """Cut the windows at `starts`: inputs and targets, int64 `[len(starts), block_size]`."""
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def permute(
    index: npt.NDArray[np.uint64], size: int, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Map each index below `size` to another, one to one, by a Feistel network.

    Four rounds on the smallest even number of bits that holds `size`; what falls outside goes
    through again until it falls inside (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for turn in range(1, 5):
            left, right = right, left ^ (mix(key + np.uint64(turn), right) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result
