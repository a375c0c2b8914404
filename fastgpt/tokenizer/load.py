"""Load tokenizers from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fastgpt.tokenizer.base import FILE_NAME, BaseTokenizer
from fastgpt.tokenizer.bpe import Tokenizer
from fastgpt.tokenizer.characters import CharTokenizer
from fastgpt.tokenizer.tiktoken_ranks import read_rank_file
from fastgpt.tokenizer.vocabulary_files import (
    IDS_FILE,
    prefix_errors,
    read_characters,
    read_hugging_face,
    read_json,
    read_merges,
)


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
    if path.is_dir():
        path = _find_file(path)
    with prefix_errors(path):
        if path.suffix == ".json":
            data = read_json(path)
            if (characters := read_characters(data)) is not None:
                return CharTokenizer(characters)
            return Tokenizer(*read_hugging_face(data))
        if path.suffix == ".tiktoken":
            return Tokenizer(*read_rank_file(path, special_tokens))
    vocabulary = read_merges(path)  # reads two files, and names the one with an error
    with prefix_errors(path):
        return Tokenizer(*vocabulary)


def _find_file(folder: Path) -> Path:
    for name in (FILE_NAME, *IDS_FILE):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} contains no tokenizer: neither {FILE_NAME} nor vocab.bpe")
