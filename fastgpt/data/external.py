"""Token files of nanoGPT and llm.c.

nanoGPT (github.com/karpathy/nanoGPT, ``data/*/prepare.py``) has a folder with ``train.bin`` and
``val.bin``: ids of two bytes, little-endian, and nothing else. A ``meta.pkl`` beside them holds the
characters that the ids stand for; without it they are GPT-2's.

llm.c (github.com/karpathy/llm.c, ``dev/data/data_common.py`` and ``llmc/dataloader.h``) has files
such as ``fineweb_train_000001.bin`` and ``fineweb_val_000000.bin``: a header of 256 numbers of four
bytes (magic, version, count of ids, zeros), then GPT-2's ids of two bytes.
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
    20240522: "questions with answers to choose from, not a text",
}
_LARGEST_META = 1 << 24  # bytes; every character there is takes half of that
_NAME = re.compile(r"(?:(.+)_)?(train|val)(?:_(\d+))?\.bin")


@dataclass(frozen=True)
class ForeignTokens:
    """What a folder of another project's token files holds."""

    train: list[IdFile]
    val: list[IdFile]
    tokenizer: BaseTokenizer


def is_foreign(folder: Path) -> bool:
    """Tell whether a folder holds token files of nanoGPT or llm.c, by their names."""
    return any(_NAME.fullmatch(path.name) for path in folder.glob("*.bin"))


def read_foreign(folder: Path) -> ForeignTokens:
    """Find the token files of a folder, and check their headers and sizes, but not their ids.

    Raises: UsageError that names the file, what is wrong with it, and what to do.
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
                f"{meta} has {size:,} characters, but the ids beside it take two bytes, which hold "
                f"{1 << 16:,}: they are of other characters than they seem; tokenize with GPT-2's "
                "instead: python -m fastgpt.prepare"
            )
        parts = {part: [_open_plain(path, size) for path in paths] for part, paths in files.items()}
    return ForeignTokens(parts["train"], parts["val"], tokenizer)


def read_meta(path: Path) -> CharTokenizer:
    """Return the tokenizer of a ``meta.pkl``, whose characters are in its `itos`.

    A pickle can name any function of Python, to be called when it is loaded. This reader knows
    none: what it reads are numbers, texts, lists and dicts, and anything else is refused.
    """
    try:
        if path.stat().st_size > _LARGEST_META:
            raise UsageError(f"{path} has more than {_LARGEST_META:,} bytes: no list of characters")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        meta = _NoCode(io.BytesIO(content)).load()
    except _RefusedError as error:
        raise UsageError(f"{path} is refused: {error}; none of it was run") from None
    except Exception as error:  # what a damaged pickle raises may be anything
        raise UsageError(f"{path} is damaged: {error!r:.100}") from None
    try:
        return CharTokenizer(_characters(meta))
    except ValueError as error:
        raise UsageError(
            f"{path} is no character vocabulary of nanoGPT's: {error}; prepare the text itself "
            "with: python -m fastgpt.prepare"
        ) from None


class _RefusedError(Exception):
    """A pickle that asks for a function or a class."""


class _NoCode(pickle.Unpickler):
    """Loads a pickle of plain values only."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise _RefusedError(f"it asks for {module_name}.{global_name}, and could run anything")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("it asks for an object from elsewhere")


def _characters(meta: Any) -> list[str]:
    """Return the characters by id; ValueError if that is not what is there."""
    if not isinstance(meta, dict) or not isinstance(meta.get("itos"), dict):
        raise ValueError("it has no dict 'itos' of the characters by id")
    itos, stoi = meta["itos"], meta.get("stoi")
    size = meta.get("vocab_size", len(itos))
    if size != len(itos) or set(itos) != set(range(len(itos))):
        raise ValueError(f"'itos' must have the ids 0 to {size} - 1, each once")
    characters = [itos[token_id] for token_id in range(len(itos))]
    for token_id, character in enumerate(characters):
        if not isinstance(character, str) or len(character) != 1:
            raise ValueError(f"id {token_id} stands for {character!r:.40}, which is no character")
    if stoi is not None and stoi != {character: i for i, character in enumerate(characters)}:
        raise ValueError("'stoi' and 'itos' contradict each other")
    return characters


def _files_by_part(folder: Path) -> dict[str, list[Path]]:
    """Return the files of the training part and of the validation part, in order."""
    found: dict[str, list[tuple[int, Path]]] = {"train": [], "val": []}
    texts = set()
    for path in folder.glob("*.bin"):
        if match := _NAME.fullmatch(path.name):
            texts.add(match[1] or "train.bin and val.bin")
            found[match[2]].append((int(match[3] or 0), path))
    if len(texts) > 1:
        raise UsageError(
            f"{folder} holds the token files of several texts ({', '.join(sorted(texts))}): "
            "put those of one into a folder of their own"
        )
    for part, paths in found.items():
        if not paths:
            there = ", ".join(sorted(path.name for both in found.values() for _, path in both))
            raise UsageError(
                f"{folder} holds no file of token ids for {part} (such as {part}.bin or "
                f"text_{part}_000000.bin) beside {there:.200}; both parts must be there"
            )
    return {part: [path for _, path in sorted(paths)] for part, paths in found.items()}


def _open_plain(path: Path, vocab_size: int) -> IdFile:
    """Return the ids of a file that is nothing but ids, of two bytes each."""
    n_bytes, begin = _size_and_begin(path)
    if n_bytes == 0 or n_bytes % 2:
        problem = "is empty" if not n_bytes else "was cut off: nanoGPT's ids take two bytes each"
        raise UsageError(f"{path} ({n_bytes:,} bytes) {problem}; make it again with its prepare.py")
    if begin[:4] == struct.pack("<i", LLMC_MAGIC):
        raise UsageError(f"{path} has a header of llm.c, but the file beside it has none")
    return IdFile(path, 0, n_bytes // 2, 2, vocab_size)


def _open_llmc(path: Path) -> IdFile:
    """Return the ids of a file with llm.c's header."""
    n_bytes, begin = _size_and_begin(path)
    if n_bytes < LLMC_HEADER_BYTES:
        raise UsageError(
            f"{path} has {n_bytes:,} bytes, but the header of llm.c's token files takes "
            f"{LLMC_HEADER_BYTES:,}: it was cut off, or is of another kind"
        )
    magic, version, count = struct.unpack_from("<3i", begin)
    if magic in _OTHER_MAGICS:
        raise UsageError(f"{path} (magic {magic}) holds {_OTHER_MAGICS[magic]}")
    if magic != LLMC_MAGIC:
        raise UsageError(
            f"{path} begins with {magic} at offset 0, not with {LLMC_MAGIC} as llm.c's token files "
            "do: it is damaged, or of another kind; make it again with llm.c's dev/data scripts"
        )
    if version != LLMC_VERSION:
        raise UsageError(
            f"{path} is of version {version} (at offset 4) of llm.c's token files, not "
            f"{LLMC_VERSION}: make it again with llm.c's dev/data scripts"
        )
    expected = LLMC_HEADER_BYTES + 2 * count
    if count < 1 or n_bytes != expected:
        raise UsageError(
            f"{path} has {n_bytes:,} bytes, but its header (at offset 8) says {count:,} ids, which "
            f"take {max(0, expected):,}: it was cut off or changed"
        )
    return IdFile(path, LLMC_HEADER_BYTES, count, 2, Tokenizer.gpt2().vocab_size)


def _has_header(path: Path) -> bool:
    """Tell whether a file begins as llm.c's do; no ids of GPT-2 begin like that (55448, 308)."""
    magics = [LLMC_MAGIC, *_OTHER_MAGICS]
    return _size_and_begin(path)[1][:4] in [struct.pack("<i", magic) for magic in magics]


def _size_and_begin(path: Path) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(12)
    except OSError as error:
        raise UsageError(f"token file {path} cannot be read: {error.strerror}") from None
