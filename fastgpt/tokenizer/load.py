"""Load tokenizers from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fastgpt.tokenizer.added_tokens import Additions, read_additions
from fastgpt.tokenizer.base import FILE_NAME, BaseTokenizer
from fastgpt.tokenizer.bpe import Tokenizer
from fastgpt.tokenizer.characters import CharTokenizer
from fastgpt.tokenizer.tiktoken_ranks import read_rank_file
from fastgpt.tokenizer.vocabulary_files import (
    IDS_FILE,
    read_characters,
    read_hugging_face,
    read_json,
    read_merges,
)
from fastgpt.utils import checks


def load_tokenizer(
    path: str | Path, *, special_tokens: Mapping[str, int] | Iterable[str] | None = None
) -> BaseTokenizer:
    """Load a tokenizer of either class from a file, or from a folder that contains such files.

    The supported formats are:

    - ``tokenizer.json``, or any name ending with ``.json``: written by :meth:`BaseTokenizer.save`,
      :meth:`GPT.save_pretrained <fastgpt.GPT.save_pretrained>`, or Hugging Face's tokenizers for a
      byte-level BPE with GPT-2's pre-tokenization;
    - ``vocab.bpe`` (``merges.txt`` in Hugging Face): OpenAI's format. The ids are read from
      ``encoder.json`` (``vocab.json``) in the same folder. Without this file, the ids are those of
      the 256 bytes in GPT-2's order, the merges in their order, and ``<|endoftext|>``;
    - of a folder with one of these, also the tokens that transformers' ``tokenizer_config.json``,
      ``special_tokens_map.json`` and ``added_tokens.json`` add to it
      (:mod:`fastgpt.tokenizer.added_tokens`);
    - ``*.tiktoken``: tiktoken's ranks, without special tokens and without a pre-tokenization
      pattern. fastgpt uses GPT-2's pattern, which is correct for r50k_base, but not for cl100k_base
      and later encodings.

    Args:
        path: the file or folder.
        special_tokens: for ``*.tiktoken`` only: the names of the special tokens, in the order of
            their ids, which follow those of the file, or a mapping of names to these ids. By
            default only ``<|endoftext|>``.

    Raises: ValueError that names the position of an error in the file, or an unsupported setting;
        FileNotFoundError.
    """
    path = Path(path)
    if special_tokens is not None and path.suffix != ".tiktoken":
        raise ValueError(
            f"{path}: special_tokens can only be given for *.tiktoken; other files have their own"
        )
    additions = Additions([])
    if path.is_dir():
        folder, path = path, _find_file(path)
        additions = read_additions(folder, path.name == FILE_NAME)
    with checks.of_file(path):
        if path.suffix == ".json":
            return _from_json(path, additions)
        if path.suffix == ".tiktoken":
            return Tokenizer(*read_rank_file(path, special_tokens))
    # reads two files, and names the one with an error
    vocabulary, added_tokens = read_merges(path, additions)
    with checks.of_file(path):
        return Tokenizer(*vocabulary, added_tokens)


def _from_json(path: Path, additions: Additions) -> BaseTokenizer:
    data = read_json(path)
    if (characters := read_characters(data)) is None:
        vocabulary, added_tokens = read_hugging_face(data, additions)
        return Tokenizer(*vocabulary, added_tokens)
    if additions.tokens:
        name = additions.tokens[0].name
        raise ValueError(f"a vocabulary of single characters cannot have the added token {name!r}")
    return CharTokenizer(characters)


def _find_file(folder: Path) -> Path:
    for name in (FILE_NAME, *IDS_FILE):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} contains no tokenizer: neither {FILE_NAME} nor vocab.bpe")
