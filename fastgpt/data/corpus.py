"""Load a corpus of tokens: tokenize a text, or open a folder of token files."""

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.data.encode import encode_pieces
from fastgpt.data.external import is_external, read_external
from fastgpt.data.pipeline import META
from fastgpt.data.shards import Shard, read_shards, verify_shard
from fastgpt.data.text import PACKAGED, Text, read_text
from fastgpt.data.token_files import (
    LONG,
    IdFile,
    Ids,
    Tokens,
    check_and_hash,
    check_ids,
    joined,
)
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.tokenizer.base import to_utf8
from fastgpt.utils.errors import UsageError
from fastgpt.utils.progress import FileProgress
from fastgpt.utils.threads import map_in_order


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
        data: path of a file of texts in any format of
            :func:`fastgpt.data.documents.read_documents`, name of a packaged text, a folder made by
            :func:`prepare`, or a folder with token files of nanoGPT or llm.c
            (:mod:`fastgpt.data.external`).
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

    Lines that hold only ``<|endoftext|>`` separate the documents of a plain text, if the tokenizer
    has this token. Without it, each document of JSON lines or of a table ends with a newline.

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
        text = _Texts.read(data, val_data, val_fraction)
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
class _Texts:
    """The texts for training and for validation, their hash, and their names in messages."""

    train: Text
    val: Text
    sha256: str
    names: str

    @classmethod
    def read(cls, data: str, val_data: str | None, val_fraction: float) -> "_Texts":
        """Read one text and split it, or read two texts."""
        text = read_text(data)
        if val_data is None:
            return cls(*text.split(val_fraction), text.sha256, data)
        val = read_text(val_data)
        both = hashlib.sha256((text.sha256 + val.sha256).encode()).hexdigest()
        return cls(text, val, both, f"{data} with {val_data}")


def _find_tokenizer(tokenizer: str | BaseTokenizer, text: _Texts, vocab_size: int) -> BaseTokenizer:
    """Resolve the `tokenizer` argument of `load_corpus`; build one from the text if necessary."""
    if isinstance(tokenizer, BaseTokenizer):
        return tokenizer
    if tokenizer == "char":
        return CharTokenizer.from_text(str(text.train) + str(text.val))
    if tokenizer == "gpt2":
        return Tokenizer.gpt2()
    try:
        if tokenizer == "bpe":
            # As bytes, which are not taken for names of files.
            documents = (to_utf8(piece) for piece, _ in text.train.documents)
            return Tokenizer.train(documents, vocab_size)
        return load_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer {tokenizer}: {error}") from None


def _encode_text(text: _Texts, tokenizer: BaseTokenizer) -> Corpus:
    try:
        train, val = (_encode(tokenizer, part) for part in (text.train, text.val))
    except ValueError as error:
        raise UsageError(f"{text.names}: {error}") from None
    return Corpus(train, val, tokenizer, text.sha256)


def _encode(tokenizer: BaseTokenizer, text: Text) -> Ids:
    """Encode a text, with the id of <|endoftext|> after each document that ends in it."""
    if tokenizer.eot_token is None:
        return tokenizer.encode_to_numpy(str(text))
    return encode_pieces(tokenizer, text.documents)[0]


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
