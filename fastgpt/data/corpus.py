"""Load a corpus of tokens and sample training and validation windows from it.

The order of the training windows depends on the seed and the sample index alone. Each epoch cuts
the tokens into windows, starting at a new offset, and visits every window exactly once in a
pseudo-random order. No sampler state has to be saved to resume at any sample.
"""

import codecs
import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.data.documents import split_documents
from fastgpt.data.encode import encode_pieces
from fastgpt.data.external import is_external, read_external
from fastgpt.data.pipeline import META
from fastgpt.data.shards import Shard, read_shards, verify_shard
from fastgpt.data.token_files import (
    LONG,
    IdFile,
    Ids,
    ShardedIds,
    check_and_hash,
    check_ids,
    cut_windows,
    joined,
)
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT
from fastgpt.utils.errors import UsageError
from fastgpt.utils.hashing import mix
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.text_files import not_utf8
from fastgpt.utils.threads import map_in_order

PACKAGED = {"shakespeare": Path(__file__).parents[1] / "assets" / "tinyshakespeare.txt"}

Tokens = Ids | ShardedIds


@dataclass(frozen=True)
class Corpus:
    """A tokenized text, split into a training part and a validation part.

    Attributes:
        train: token ids of the training part, uint16 or uint32. Ids of a prepared folder are memory
            mapped: they stay on disk and are read when indexed.
        val: token ids of the validation part.
        tokenizer: the tokenizer that produced the ids.
        sha256: hash that identifies the data, so that a resumed run can check that it is unchanged.
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
    check: bool = True,
    *,
    val_data: str | None = None,
    vocab_size: int = 10_000,
) -> Corpus:
    """Load a corpus: tokenize a text, or open a folder of token files.

    Args:
        data: path of a text file, name of a packaged text, a folder made by :func:`prepare`, or a
            folder with token files of nanoGPT or llm.c (:mod:`fastgpt.data.external`).
        tokenizer: ``"char"`` (one token per distinct character of the text), ``"gpt2"``, ``"bpe"``
            (a vocabulary of `vocab_size` ids, trained on the training part), the path of a
            tokenizer, or a tokenizer object.
        val_fraction: share of the text, counted in characters from its end, that is used for
            validation.
        sha256: expected hash of the data; an error is raised if it differs.
        check: False skips the check of the ids and the hash, so that only sizes and headers are
            checked. Use it if another process has just checked the data and `sha256` is its result.
        val_data: text used for validation, instead of the last `val_fraction` of `data`.
        vocab_size: vocabulary size for ``"bpe"``.

    Lines that hold only ``<|endoftext|>`` separate the documents of a text, if the tokenizer has
    this token.

    Token folders are already tokenized and split: `val_fraction` is ignored, and `tokenizer` is
    ignored unless it is a tokenizer object, which must then equal the tokenizer of the folder. All
    ids are checked to be in the vocabulary. Hashing takes ten times as long as this check, so a
    prepared folder, whose headers contain hashes, is hashed only if `sha256` is given. Other token
    files are always hashed.

    Raises: UsageError if the data is missing or invalid, or does not match the arguments.
    """
    if data not in PACKAGED and Path(data).suffix == ".bin" and Path(data).is_file():
        raise UsageError(
            f"{data} is a file of token ids: pass the folder that contains it (--data "
            f"{shlex.quote(str(Path(data).parent))}), which also holds the validation part"
        )
    if data in PACKAGED or not Path(data).is_dir():
        text = _Text.read(data, val_data, val_fraction)
        if sha256 not in (None, text.sha256):
            raise UsageError(
                f"{text.names} is not the text that the run was trained on: its SHA-256 differs"
            )
        return _encode_text(text, _find_tokenizer(tokenizer, text, vocab_size))
    if val_data is not None:
        raise UsageError(
            f"val_data can only be used with a text file; {data} is a folder with its own "
            "validation part (use --val of python -m fastgpt.prepare)"
        )
    folder = Path(data)
    if not (folder / META).is_file() and is_external(folder):
        corpus = _load_external(folder, sha256, check)
    else:
        corpus = _load_prepared(folder, sha256, check)
    if sha256 not in (None, corpus.sha256):
        raise UsageError(f"{folder} is not what the run was trained on: its SHA-256 differs")
    if isinstance(tokenizer, BaseTokenizer) and tokenizer != corpus.tokenizer:
        raise UsageError(
            f"{folder} was prepared with another tokenizer: its fingerprint is "
            f"{corpus.tokenizer.fingerprint[:16]}, not {tokenizer.fingerprint[:16]}"
        )
    return corpus


@dataclass(frozen=True)
class _Text:
    """The training and validation parts of a text, its hash, and its name in error messages."""

    train: str
    val: str
    sha256: str
    names: str

    @classmethod
    def read(cls, data: str, val_data: str | None, val_fraction: float) -> "_Text":
        """Read one text and split it, or read two texts."""
        paths = [PACKAGED.get(name, Path(name)) for name in (data, val_data) if name is not None]
        texts = [read_text(path) for path in paths]
        names = " with ".join(map(str, paths))
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        if len(texts) == 2:
            both = hashlib.sha256("".join(digests).encode()).hexdigest()
            return cls(texts[0], texts[1], both, names)
        text = texts[0]
        cut = len(text) - int(len(text) * val_fraction)
        return cls(text[:cut], text[cut:], digests[0], names)


def _find_tokenizer(tokenizer: str | BaseTokenizer, text: _Text, vocab_size: int) -> BaseTokenizer:
    """Resolve the `tokenizer` argument of `load_corpus`; build one from the text if necessary."""
    if isinstance(tokenizer, BaseTokenizer):
        return tokenizer
    if tokenizer == "char":
        return CharTokenizer.from_text(text.train + text.val)
    if tokenizer == "gpt2":
        return Tokenizer.gpt2()
    try:
        if tokenizer == "bpe":
            return Tokenizer.train(split_documents(text.train), vocab_size)
        return load_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer {tokenizer}: {error}") from None


def _encode_text(text: _Text, tokenizer: BaseTokenizer) -> Corpus:
    try:
        train, val = (_encode(tokenizer, part) for part in (text.train, text.val))
    except ValueError as error:
        raise UsageError(f"{text.names}: {error}") from None
    return Corpus(train, val, tokenizer, text.sha256)


def _encode(tokenizer: BaseTokenizer, text: str) -> Ids:
    """Encode a text, replacing each separator line <|endoftext|> by the id of that token."""
    if tokenizer.eot_token is None or END_OF_TEXT not in text:
        return tokenizer.encode_to_numpy(text)
    *ended, last = split_documents(text)
    return encode_pieces(tokenizer, [*((text, True) for text in ended), (last, False)])[0]


def _load_prepared(folder: Path, sha256: str | None, check: bool) -> Corpus:
    """Open the shards of a prepared folder."""
    if not (folder / META).is_file():
        raise UsageError(
            f"{folder} is not a prepared folder (it has no {META}); prepare the texts in it with: "
            f"python -m fastgpt.prepare {shlex.quote(str(folder))} --out data/my"
        )
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of {folder} cannot be read: {error}") from None
    train, val = (read_shards(folder / name, tokenizer) for name in ("train", "val"))
    digest = hashlib.sha256(b"".join(shard.header.pack() for shard in [*train, *val])).hexdigest()
    if check and sha256 in (None, digest):
        _verify_shards([*train, *val], hashed=sha256 is not None)
    ids = [joined([shard.ids for shard in part]) for part in (train, val)]
    return Corpus(ids[0], ids[1], tokenizer, digest)


def _verify_shards(shards: Sequence[Shard], hashed: bool) -> None:
    """Check all ids and, if `hashed`, the SHA-256 of each shard. Each thread checks one file."""
    check: Callable[[Shard], None] = verify_shard if hashed else lambda s: check_ids(s.id_file)
    with _progress([shard.id_file for shard in shards]) as bar:
        for shard, _ in zip(shards, map_in_order(check, shards, None), strict=True):
            bar.advance(shard.id_file.n_bytes)


def _load_external(folder: Path, sha256: str | None, check: bool) -> Corpus:
    """Open the token files of another project."""
    found = read_external(folder)
    files = [*found.train, *found.val]
    digest = sha256 or ""
    if check:
        with _progress(files) as bar:
            digest = check_and_hash(files, bar.advance)
    ids = [joined([file.ids() for file in part]) for part in (found.train, found.val)]
    return Corpus(ids[0], ids[1], found.tokenizer, digest)


def _progress(files: Sequence[IdFile]) -> FileProgress:
    total = sum(file.n_bytes for file in files)
    return FileProgress("checking the data", total, shown=total >= LONG)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, without its byte order mark and with Unix line endings.

    Raises: UsageError if the file is missing, empty or not valid UTF-8.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        packaged = ", ".join(PACKAGED)
        raise UsageError(
            f"data file {path} does not exist; pass a plain text file, or one of: {packaged}"
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
    """The shuffled training samples of a run, addressed by a sample index that starts at 0.

    Args:
        tokens: the training tokens, cut into windows of `block_size`.
        block_size: tokens per sample.
        seed: seed of the order of the samples.

    Sample i depends only on the arguments and i, not on earlier calls. Processes can therefore
    divide a run by dividing the indices, and resuming at any index is immediate.

    Raises: UsageError if the text is shorter than two windows.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int) -> None:
        self.n_windows = (len(tokens) - block_size) // block_size
        if self.n_windows < 1:
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, but block_size={block_size} needs "
                f"at least {2 * block_size:,}; use more text or lower --block-size to at most "
                f"{len(tokens) // 2}"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed

    def samples(self, first: int, count: int) -> Tensor:
        """Return samples `first` to `first + count - 1`; see :func:`gather`.

        They can be unpacked: ``inputs, targets = batches.samples(0, 8)``.
        """
        return gather(self.tokens, self.starts(first, count), self.block_size)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the positions in the tokens at which these samples start, int64 `[count]`."""
        if first < 0 or count < 1:
            raise ValueError(f"first must be >= 0 and count >= 1, not first={first}, count={count}")
        chunks = range(first // _CHUNK, (first + count - 1) // _CHUNK + 1)
        starts = [_window_starts(i, self.n_windows, self.block_size, self.seed) for i in chunks]
        at = first % _CHUNK
        return np.concatenate(starts)[at : at + count]


# Start positions are computed for this many samples at a time. For a single micro-batch, the
# overhead of the NumPy calls would cost as much as computing about a thousand start positions.
_CHUNK = 4096


@lru_cache(maxsize=4)  # consecutive calls usually need the same chunk
def _window_starts(chunk: int, n_windows: int, block_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the start positions of a chunk of samples, int64 `[_CHUNK]`.

    Sample i is number i % n_windows of epoch i // n_windows. The epoch determines a key, and the
    key determines the position of the first window (so that the windows of each epoch are cut at
    other places) and a permutation of the windows.
    """
    sample = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK, dtype=np.uint64)
    epoch, index = np.divmod(sample, np.uint64(n_windows))
    key = mix(seed, epoch)
    offset = mix(key, 0) % np.uint64(block_size)
    window = permute(index, n_windows, key)
    return (offset + window * np.uint64(block_size)).astype(np.int64)


def gather(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> Tensor:
    """Return the windows at `starts` as one int64 CPU tensor `[2, len(starts), block_size]`.

    Its rows are the inputs and the targets, which are the inputs shifted by one token; unpacking it
    (``inputs, targets = gather(...)``) gives two contiguous tensors.
    """
    windows = cut_windows(tokens, starts, block_size + 1)
    pair = np.empty((2, len(starts), block_size), np.int64)
    pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
    return torch.from_numpy(pair)


def validation_windows(
    tokens: Tokens, block_size: int, max_tokens: int, rank: int = 0, n_ranks: int = 1
) -> npt.NDArray[np.int64]:
    """Return the start positions of the windows that process `rank` of `n_ranks` evaluates.

    Together, the processes evaluate every window of the text exactly once. If the windows have more
    than `max_tokens` tokens, evenly spaced windows with at most that many tokens are used, the
    same ones in each evaluation. The shares of the processes differ by at most one window, and some
    are empty if there are fewer windows than processes.

    Raises: UsageError if the text is shorter than one window and its last target.
    """
    starts = np.arange(0, len(tokens) - block_size, block_size, dtype=np.int64)
    if len(starts) == 0:
        raise UsageError(
            f"the validation part has {len(tokens):,} tokens, not more than "
            f"block_size={block_size}; use more text, lower --block-size or raise --val-fraction"
        )
    most = max(1, max_tokens // block_size)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
    return np.array_split(starts, n_ranks)[rank]


def permute(
    index: npt.NDArray[np.uint64], size: int, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Permute the indices below `size` with a Feistel network; each key gives one permutation.

    Args:
        index: indices to map, uint64 `[n]`, each below `size`.
        size: number of elements of the permutation.
        key: one key for all indices, or one per index.

    The network has four rounds and works on the smallest even number of bits that holds
    `size - 1`. It can map an index to a value of `size` or more; such values are mapped again until
    they are below `size` (cycle walking, Black & Rogaway 2002).
    """
    # A Feistel round maps (left, right) to (right, left ^ f(right)), which is invertible for any f,
    # so the four rounds are a permutation of all 2 * half bits.
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    result = index.astype(np.uint64)
    keys = np.broadcast_to(key, result.shape)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right, here = result[outside] >> half, result[outside] & mask, keys[outside]
        for turn in range(1, 5):
            left, right = right, left ^ (mix(here + np.uint64(turn), right) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result
