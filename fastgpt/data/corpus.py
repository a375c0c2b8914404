"""Text to tokens to batches.

The order of the training windows is a function of (seed, sample) alone: each epoch cuts the tokens
into windows from a fresh offset and visits them in a pseudo-random permutation, every window
exactly once. Nothing has to be stored to continue anywhere.
"""

import codecs
import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.data.documents import split_documents
from fastgpt.data.external import is_foreign, read_foreign
from fastgpt.data.pipeline import META
from fastgpt.data.pipeline import prepare as prepare
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
from fastgpt.utils.hashing import mix as mix
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.text_files import not_utf8
from fastgpt.utils.threads import map_in_order

PACKAGED = {"shakespeare": Path(__file__).parents[1] / "assets" / "tinyshakespeare.txt"}

Tokens = Ids | ShardedIds


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: `train` and `val` (uint16 or uint32), and what made them.

    Tokens that are in files already stay on disk and are read where they are indexed. `sha256`
    tells whether a text is the same one later on.
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
    """Read a text (a path, or the name of a packaged one) and tokenize its two parts.

    tokenizer: ``"char"`` (one token per different character of the text), ``"gpt2"``, ``"bpe"``
    (one of `vocab_size` ids, learned from the training part), the path of one, or one that is
    given. The last `val_fraction` of the characters is for validation, or, if it is given,
    `val_data`, another text. sha256: the text's, if it must be a certain one. Lines of
    ``<|endoftext|>`` part the text into documents, if the tokenizer has a token for that.

    A folder that :func:`prepare` made, or one of nanoGPT's or llm.c's token files
    (:mod:`fastgpt.data.external`), is tokenized and split already: `val_fraction` says nothing of
    it, and `tokenizer` only if one is given, which must be the folder's own. All ids in it are
    checked. To hash them takes ten times as long, so a prepared folder, which holds its own
    hashes, is hashed only if `sha256` is given; other files are always.

    check: False if another process has done so just now, and `sha256` is what it found; then only
    sizes and headers are looked at.
    """
    if data not in PACKAGED and Path(data).suffix == ".bin" and Path(data).is_file():
        raise UsageError(
            f"{data} is a file of token ids: give the folder that it is in (--data "
            f"{shlex.quote(str(Path(data).parent))}), which holds the validation part, too"
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
            f"val_data goes with a text to train on; {data} is a folder, and has its own "
            "validation part (python -m fastgpt.prepare takes --val)"
        )
    folder = Path(data)
    if not (folder / META).is_file() and is_foreign(folder):
        corpus = _load_foreign(folder, sha256, check)
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
    """The two parts of a text, and what to call it in a message."""

    train: str
    val: str
    sha256: str
    names: str

    @classmethod
    def read(cls, data: str, val_data: str | None, val_fraction: float) -> "_Text":
        """Read a text, cut in two, or two texts."""
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
    """Return the tokenizer that is meant; where it comes from the text, make it."""
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
    """Encode a text; where lines of <|endoftext|> end a document, its id stands in their place."""
    if tokenizer.eot_token is None or END_OF_TEXT not in text:
        return tokenizer.encode_to_numpy(text)
    documents = split_documents(text)
    marked = END_OF_TEXT.join(documents)
    if marked.count(END_OF_TEXT) < len(documents):  # none within a document, where it is text
        return tokenizer.encode_to_numpy(marked, allowed_special={END_OF_TEXT})
    rows = [tokenizer.encode_to_numpy(document) for document in documents]
    end = np.array([tokenizer.eot_token], rows[0].dtype)
    return np.concatenate([ids for row in rows for ids in (row, end)][:-1])


def _load_prepared(folder: Path, sha256: str | None, check: bool) -> Corpus:
    """Open the shards of a prepared folder."""
    if not (folder / META).is_file():
        raise UsageError(
            f"{folder} is a folder, but no prepared one (it has no {META}); make one of the texts "
            f"in it: python -m fastgpt.prepare {shlex.quote(str(folder))} --out data/my"
        )
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of {folder} cannot be read: {error}") from None
    train, val = (read_shards(folder / name, tokenizer) for name in ("train", "val"))
    digest = hashlib.sha256(b"".join(shard.header.pack() for shard in [*train, *val])).hexdigest()
    if check and sha256 in (None, digest):
        _look_through([*train, *val], hashed=sha256 is not None)
    ids = [joined([shard.ids for shard in part]) for part in (train, val)]
    return Corpus(ids[0], ids[1], tokenizer, digest)


def _look_through(shards: Sequence[Shard], hashed: bool) -> None:
    """Check all ids, and that the files still are what was written, one file in each thread."""
    look: Callable[[Shard], None] = verify_shard if hashed else lambda s: check_ids(s.id_file)
    with _progress([shard.id_file for shard in shards]) as bar:
        for shard, _ in zip(shards, map_in_order(look, shards, None), strict=True):
            bar.advance(shard.id_file.n_bytes)


def _load_foreign(folder: Path, sha256: str | None, check: bool) -> Corpus:
    """Open the token files of another project."""
    found = read_foreign(folder)
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
    """The training samples of a run, numbered from 0: `tokens` cut into windows, shuffled.

    Sample i is the same whoever asks for it and whatever was asked for before, so that processes
    share a run by sharing its numbers, and to continue anywhere takes no time.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int) -> None:
        self.n_windows = (len(tokens) - block_size) // block_size
        if self.n_windows < 1:
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, but block_size={block_size} needs "
                f"at least {2 * block_size:,}; bring more text or lower --block-size to at most "
                f"{len(tokens) // 2}"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self._kept = -1, np.zeros(0, np.int64)

    def samples(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return samples `first` to `first + count - 1`: inputs, and targets one token on.

        Both are int64 `[count, block_size]`, contiguous, on the CPU.
        """
        inputs, targets = self.pair(first, count).unbind()
        return inputs, targets

    def pair(self, first: int, count: int) -> Tensor:
        """Return inputs and targets as one int64 tensor `[2, count, block_size]`."""
        return gather_pair(self.tokens, self.starts(first, count), self.block_size)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return where in the tokens these samples start: `[count]`."""
        if first < 0 or count < 1:
            raise ValueError(f"samples are numbered from 0: not {count} from {first} on")
        numbers = range(first // _CHUNK, (first + count - 1) // _CHUNK + 1)
        chunks = [self._chunk(number) for number in numbers]
        starts = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        at = first - numbers[0] * _CHUNK
        return starts[at : at + count]

    def _chunk(self, number: int) -> npt.NDArray[np.int64]:
        """Return the starts of a chunk of samples; the last one is kept, for the next are in it."""
        kept = self._kept  # taken once, as several threads may ask
        if kept[0] != number:
            first = number * _CHUNK
            sample = np.arange(first, first + _CHUNK, dtype=np.uint64)
            kept = self._kept = number, self._starts_of(sample)
        return kept[1]

    def _starts_of(self, sample: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        epoch, index = np.divmod(sample, np.uint64(self.n_windows))
        key = mix(self.seed, epoch)
        offset = mix(key, 0) % np.uint64(self.block_size)
        window = permute(index, self.n_windows, key)
        return (offset + window * np.uint64(self.block_size)).astype(np.int64)


# Starts are computed so many at a time: for one micro-batch alone, NumPy's calls would cost as
# much as for a thousand samples.
_CHUNK = 4096


def gather(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> tuple[Tensor, Tensor]:
    """Cut the windows at `starts`: inputs and targets, int64 `[len(starts), block_size]`."""
    inputs, targets = gather_pair(tokens, starts, block_size).unbind()
    return inputs, targets


def gather_pair(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> Tensor:
    """Cut as :func:`gather` does, into one int64 tensor `[2, len(starts), block_size]`."""
    windows = cut_windows(tokens, starts, block_size + 1)
    pair = np.empty((2, len(starts), block_size), np.int64)
    pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
    return torch.from_numpy(pair)


def validation_windows(
    tokens: Tokens, block_size: int, most_tokens: int, rank: int = 0, n_ranks: int = 1
) -> npt.NDArray[np.int64]:
    """Return where the windows start that process `rank` of `n_ranks` evaluates.

    All processes together have every window of the text exactly once, or, if these are more than
    `most_tokens` tokens, as many as fit in, evenly spread, and the same at each evaluation. Their
    shares differ by one window at most, and are empty where windows are fewer than processes.
    """
    starts = np.arange(0, len(tokens) - block_size, block_size, dtype=np.int64)
    if len(starts) == 0:
        raise UsageError(
            f"the validation part has {len(tokens):,} tokens, not more than "
            f"block_size={block_size}; bring more text, lower --block-size or raise --val-fraction"
        )
    most = max(1, most_tokens // block_size)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
    return np.array_split(starts, n_ranks)[rank]


def permute(
    index: npt.NDArray[np.uint64], size: int, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Map each index below `size` to another, one to one under each key, by a Feistel network.

    key: one for all, or one for each index. Four rounds on the smallest even number of bits that
    holds `size`; what falls outside goes through again until it falls inside (cycle walking, Black
    & Rogaway 2002).
    """
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
