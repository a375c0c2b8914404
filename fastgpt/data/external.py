"""Open token files of nanoGPT and llm.c.

nanoGPT (github.com/karpathy/nanoGPT, ``data/*/prepare.py``) writes a folder with ``train.bin`` and
``val.bin``. They contain only ids, as little-endian uint16. If the folder has a ``meta.pkl``, it
maps the ids to characters; otherwise the ids are of GPT-2's vocabulary.

llm.c (github.com/karpathy/llm.c, ``dev/data/data_common.py`` and ``llmc/dataloader.h``) writes
files such as ``fineweb_train_000001.bin`` and ``fineweb_val_000000.bin``: a header of 256 int32
numbers (magic, version, number of ids, zeros), then ids of GPT-2's vocabulary as uint16.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastgpt.data.token_files import IdFile
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer
from fastgpt.utils.errors import UsageError

LLMC_HEADER_BYTES = 1024
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
_OTHER_MAGICS = {
    20240801: "ids of Llama 3's tokenizer, which fastgpt does not have",
    20240522: "multiple-choice questions, not a text",
}
_LARGEST_META = 1 << 24  # bytes; a vocabulary of all Unicode characters takes half of that
_NAME = re.compile(r"(?:(.+)_)?(train|val)(?:_(\d+))?\.bin")


@dataclass(frozen=True)
class ExternalTokens:
    """The token files of a nanoGPT or llm.c folder, in order, and their tokenizer."""

    train: list[IdFile]
    val: list[IdFile]
    tokenizer: BaseTokenizer


def is_external(folder: Path) -> bool:
    """Return whether a folder contains files named like token files of nanoGPT or llm.c."""
    return any(_NAME.fullmatch(path.name) for path in folder.glob("*.bin"))


def read_external(folder: Path) -> ExternalTokens:
    """Find the token files of a folder and check their headers and sizes, but not their ids.

    Raises: UsageError that names the file, the problem and a solution.
    """
    files = _files_by_part(folder)
    nanogpt = [folder / "train.bin"] == files["train"] and not _has_header(files["train"][0])
    if not nanogpt:
        tokenizer: BaseTokenizer = Tokenizer.gpt2()
        parts = {part: [_open_llmc(path) for path in paths] for part, paths in files.items()}
    else:
        meta = folder / "meta.pkl"
        tokenizer = read_meta(meta) if meta.exists() else Tokenizer.gpt2()
        size = tokenizer.vocab_size
        if size > 1 << 16:
            raise UsageError(
                f"{meta} has {size:,} characters, but the ids have two bytes, which can represent "
                f"only {1 << 16:,}: the ids do not belong to these characters; tokenize the text "
                "with GPT-2's vocabulary instead: python -m fastgpt.prepare"
            )
        parts = {part: [_open_plain(path, size) for path in paths] for part, paths in files.items()}
    return ExternalTokens(parts["train"], parts["val"], tokenizer)


def read_meta(path: Path) -> CharTokenizer:
    """Return the character tokenizer of a ``meta.pkl``, built from its `itos` dict.

    Loading a pickle can call arbitrary Python functions. This reader resolves no functions or
    classes: it accepts only plain values such as numbers, strings, lists and dicts.

    Raises: UsageError if the file is missing, too large or damaged, refers to code, or is not a
        character vocabulary.
    """
    try:
        if path.stat().st_size > _LARGEST_META:
            raise UsageError(f"{path} has more than {_LARGEST_META:,} bytes: not a character list")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        meta = _PlainUnpickler(io.BytesIO(content)).load()
    except _UnsafePickleError as error:
        raise UsageError(f"{path} was rejected: {error}; no code in it was run") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UsageError(f"{path} is damaged: {error!r:.100}") from None
    try:
        return CharTokenizer(_characters(meta))
    except ValueError as error:
        raise UsageError(
            f"{path} is not a character vocabulary of nanoGPT: {error}; prepare the original text "
            "with: python -m fastgpt.prepare"
        ) from None


class _UnsafePickleError(Exception):
    """Raised for a pickle that refers to a function, a class or an external object."""


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that loads plain values only."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise _UnsafePickleError(
            f"it refers to {module_name}.{global_name}, and could run arbitrary code"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _UnsafePickleError("it refers to an external object")


def _characters(meta: Any) -> list[str]:
    """Return the characters in the order of their ids; ValueError if `meta` is invalid."""
    if not isinstance(meta, dict) or not isinstance(meta.get("itos"), dict):
        raise ValueError("it has no dict 'itos' that maps ids to characters")
    itos, stoi = meta["itos"], meta.get("stoi")
    size = meta.get("vocab_size", len(itos))
    if size != len(itos) or set(itos) != set(range(len(itos))):
        raise ValueError(f"'itos' must have each of the ids 0 to {size} - 1 exactly once")
    characters = [itos[token_id] for token_id in range(len(itos))]
    for token_id, character in enumerate(characters):
        if not isinstance(character, str) or len(character) != 1:
            raise ValueError(f"id {token_id} maps to {character!r:.40}, which is not a character")
    if stoi is not None and stoi != {character: i for i, character in enumerate(characters)}:
        raise ValueError("'stoi' is not the inverse of 'itos'")
    return characters


def _files_by_part(folder: Path) -> dict[str, list[Path]]:
    """Return the files of the training part and of the validation part, sorted by their numbers."""
    found: dict[str, list[tuple[int, Path]]] = {"train": [], "val": []}
    texts = set()
    for path in folder.glob("*.bin"):
        if match := _NAME.fullmatch(path.name):
            texts.add(match[1] or "train.bin and val.bin")
            found[match[2]].append((int(match[3] or 0), path))
    if len(texts) > 1:
        raise UsageError(
            f"{folder} contains the token files of several texts ({', '.join(sorted(texts))}): "
            "move those of one text to a separate folder"
        )
    for part, paths in found.items():
        if not paths:
            there = ", ".join(sorted(path.name for both in found.values() for _, path in both))
            raise UsageError(
                f"{folder} contains {there:.200}, but no token file for {part} (such as {part}.bin "
                f"or text_{part}_000000.bin); both parts are required"
            )
    return {part: [path for _, path in sorted(paths)] for part, paths in found.items()}


def _open_plain(path: Path, vocab_size: int) -> IdFile:
    """Return the ids of a file without a header, of two bytes each."""
    n_bytes, begin = _size_and_begin(path)
    if n_bytes == 0 or n_bytes % 2:
        problem = "is empty" if not n_bytes else "is truncated: nanoGPT's ids have two bytes each"
        raise UsageError(f"{path} ({n_bytes:,} bytes) {problem}; recreate it with its prepare.py")
    if begin[:4] == struct.pack("<i", LLMC_MAGIC):
        raise UsageError(f"{path} has a header of llm.c, but the other part has none")
    return IdFile(path, 0, n_bytes // 2, 2, vocab_size)


def _open_llmc(path: Path) -> IdFile:
    """Return the ids of a file with a header of llm.c, after checking the header and the size."""
    n_bytes, begin = _size_and_begin(path)
    if n_bytes < LLMC_HEADER_BYTES:
        raise UsageError(
            f"{path} has {n_bytes:,} bytes, but the header of llm.c's token files has "
            f"{LLMC_HEADER_BYTES:,}: it is truncated, or of another type"
        )
    magic, version, count = struct.unpack_from("<3i", begin)
    if magic in _OTHER_MAGICS:
        raise UsageError(f"{path} (magic {magic}) contains {_OTHER_MAGICS[magic]}")
    if magic != LLMC_MAGIC:
        raise UsageError(
            f"{path} begins with {magic} at offset 0, not with {LLMC_MAGIC} as llm.c's token files "
            "do: it is damaged, or of another type; recreate it with llm.c's dev/data scripts"
        )
    if version != LLMC_VERSION:
        raise UsageError(
            f"{path} is of version {version} (at offset 4) of llm.c's token files, not "
            f"{LLMC_VERSION}: recreate it with llm.c's dev/data scripts"
        )
    expected = LLMC_HEADER_BYTES + 2 * count
    if count < 1 or n_bytes != expected:
        raise UsageError(
            f"{path} has {n_bytes:,} bytes, but its header (at offset 8) says {count:,} ids, which "
            f"require {max(0, expected):,}: it was truncated or modified"
        )
    return IdFile(path, LLMC_HEADER_BYTES, count, 2, Tokenizer.gpt2().vocab_size)


def _has_header(path: Path) -> bool:
    """Return whether a file begins with a magic number of llm.c.

    A nanoGPT file with ids of GPT-2 is not mistaken for one: read as uint16, llm.c's magic numbers
    begin with ids such as 55432, and GPT-2's ids end at 50256.
    """
    magics = [LLMC_MAGIC, *_OTHER_MAGICS]
    return _size_and_begin(path)[1][:4] in [struct.pack("<i", magic) for magic in magics]


def _size_and_begin(path: Path) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(12)
    except OSError as error:
        raise UsageError(f"token file {path} cannot be read: {error.strerror}") from None
