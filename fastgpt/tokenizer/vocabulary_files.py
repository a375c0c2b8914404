"""Read and write BPE vocabularies: Hugging Face's tokenizer.json and OpenAI's vocab.bpe.

(:mod:`fastgpt.tokenizer.tiktoken_ranks` handles tiktoken's files.)

Both formats represent each byte of a token by one character: a printable byte by the character with
that code point, other bytes by characters from U+0100 on (a space is "Ġ"). Token names therefore
contain neither white space nor invalid UTF-8.
"""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgpt.utils import checks
from fastgpt.utils.extension import _C

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenization pattern as published, and equivalent, faster versions from tiktoken. At
# each position, the first alternative that matches is the next piece: an English contraction, or a
# run of letters, of numbers or of other characters, each with one preceding space, or white space.
# White space before a word excludes its last character, `\s+(?!\S)`: if that is a space, it belongs
# to the word.
GPT2_PATTERNS = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
)
# The merges file and its file of ids in the same folder: OpenAI's names, and Hugging Face's names.
IDS_FILE = {"vocab.bpe": "encoder.json", "merges.txt": "vocab.json"}

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
_OTHER = [byte for byte in range(256) if byte not in _PRINTABLE]
# The character of each byte, and the table for the reverse mapping.
LETTER_OF_BYTE = "".join(
    chr(byte if byte in _PRINTABLE else 0x100 + _OTHER.index(byte)) for byte in range(256)
)
BYTE_OF_LETTER = codecs.charmap_build(LETTER_OF_BYTE)

# A pre-tokenizer of tokenizer.json that splits a text into characters.
_EACH_CHARACTER = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}


class Vocabulary(NamedTuple):
    """The arguments of a Tokenizer, as read from a file."""

    tokens: list[bytes]  # by id
    merges: NDArray[np.uint32]  # rows (left, right, merged), in order of decreasing priority
    special_tokens: dict[str, int]


def read_merges(path: Path) -> Vocabulary:
    """Read ``vocab.bpe``, and ``encoder.json`` with the ids of its tokens if the folder has it.

    Raises: ValueError that names the file and the problem.
    """
    with prefix_errors(path):
        tokens, merges = _C.parse_merges_file(path.read_bytes())
    if path.name not in IDS_FILE or not (ids_path := path.with_name(IDS_FILE[path.name])).exists():
        return Vocabulary([*tokens, END_OF_TEXT.encode()], merges, {END_OF_TEXT: len(tokens)})
    with prefix_errors(ids_path):
        ids = _check_ids(read_json(ids_path))
        names = list(map(_letters_of, tokens))
        if unknown := [name for name in names if name not in ids]:
            raise ValueError(f"token {unknown[0]!r} of {path.name} is missing")
        new_ids = np.array([ids[name] for name in names], np.uint32)
        return _build(ids, new_ids[merges], ids.keys() - set(names))


def read_hugging_face(data: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary of a parsed ``tokenizer.json``.

    Raises: ValueError that names the problem, for example if the tokenizer is not a byte-level BPE
        with GPT-2's pre-tokenization.
    """
    _check_supported({**data, "pre_tokenizer": _simplify_pre_tokenizer(data.get("pre_tokenizer"))})
    specials = _added_tokens(data)
    ids = _check_ids(_item(data, "model.vocab"), specials)
    return _build(ids, _merge_rows(_item(data, "model.merges"), ids), specials.keys())


def to_hugging_face(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the contents of ``tokenizer.json`` for a vocabulary."""
    tokens, merges, special_tokens = vocabulary
    names = list(map(_letters_of, tokens))
    for name, token_id in special_tokens.items():
        names[token_id] = name
    if len(set(names)) != len(names):
        raise ValueError("tokenizer.json cannot represent two tokens with the same name")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": name, **flags, "special": True}
            for name, token_id in sorted(special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(
                ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
            ),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {name: token_id for token_id, name in enumerate(names)},
            "merges": [f"{names[left]} {names[right]}" for left, right, _ in merges.tolist()],
        },
    }


def characters_to_hugging_face(characters: str) -> dict[str, Any]:
    """Return the contents of ``tokenizer.json`` for a character vocabulary."""
    return {
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": _EACH_CHARACTER,
        "decoder": {"type": "Fuse"},  # without it, decoding inserts spaces between characters
        "model": {
            "type": "WordLevel",
            "vocab": {character: token_id for token_id, character in enumerate(characters)},
            "unk_token": "<|unknown|>",  # not in the vocabulary, so unknown characters are errors
        },
    }


def read_characters(data: dict[str, Any]) -> str | None:
    """Return the characters of a character vocabulary, in the order of their ids.

    data: a parsed ``tokenizer.json``, of :meth:`CharTokenizer.save
    <fastgpt.tokenizer.CharTokenizer.save>` or :func:`characters_to_hugging_face`.

    Returns None for other types of tokenizers.

    Raises: ValueError that names the problem.
    """
    if "type" in data:
        if data["type"] != "fastgpt-char" or data.get("version") != 1:
            raise ValueError(
                f"type {data['type']!r}, version {data.get('version')!r} is not supported: this "
                "fastgpt reads type 'fastgpt-char', version 1"
            )
        if not isinstance(characters := data.get("characters"), str):
            raise ValueError('"characters" must be a string')
        return characters
    if _item(data, "model.type") != "WordLevel" or data.get("pre_tokenizer") != _EACH_CHARACTER:
        return None
    ids = _check_ids(_item(data, "model.vocab"))
    if long := [name for name in ids if len(name) != 1]:
        raise ValueError(f"token {long[0]!r} is not a single character")
    return "".join(sorted(ids, key=ids.__getitem__))


def to_merges(vocabulary: Vocabulary) -> tuple[str, dict[str, int]]:
    """Return the contents of ``vocab.bpe`` and ``encoder.json`` for a vocabulary.

    Raises: ValueError if the format cannot represent it.
    """
    tokens, merges, special_tokens = vocabulary
    names = list(map(_letters_of, tokens))
    # The ids that the bytes and the merges so far produce.
    made = {token_id for token_id, token in enumerate(tokens) if len(token) == 1}
    made -= set(special_tokens.values())
    lines = ["#version: 0.2"]
    for left, right, merged in merges.tolist():
        line = f"{names[left]} {names[right]}"
        if not {left, right} <= made or merged in made:
            raise ValueError(
                f"vocab.bpe cannot represent the merge {line!r}: each merge must join bytes or "
                "tokens of earlier merges into a new token; save it as tokenizer.json"
            )
        made.add(merged)
        lines.append(line)
    for name, token_id in special_tokens.items():
        names[token_id] = name
    others = set(range(len(tokens))) - made - set(special_tokens.values())
    if others or len(set(names)) != len(names):
        what = f"token {names[min(others)]!r} without a merge" if others else "a repeated name"
        raise ValueError(f"vocab.bpe cannot represent {what}; save it as tokenizer.json")
    return "\n".join(lines) + "\n", {name: token_id for token_id, name in enumerate(names)}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError if it is not valid JSON or not an object."""
    return checks.json_object(path.read_bytes())


@contextmanager
def prefix_errors(path: Path) -> Iterator[None]:
    """Prefix the message of every ValueError raised in the block with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_ids(ids: Any, added: Mapping[str, int] = {}) -> dict[str, int]:
    """Return the ids of all tokens by name, including the added ones; ValueError if invalid."""
    if not isinstance(ids, dict) or not all(type(token_id) is int for token_id in ids.values()):
        raise ValueError("the vocabulary must map each token to its id, an integer")
    by_name: dict[str, int] = {**added, **ids}
    for name, token_id in added.items():
        if by_name[name] != token_id:
            raise ValueError(f"added token {name!r} has two ids: {token_id} and {by_name[name]}")
    if missing := set(range(len(by_name))) - set(by_name.values()):
        raise ValueError(
            f"the ids must be 0 to {len(by_name) - 1}, each once: {min(missing)} is missing"
        )
    return by_name


def _added_tokens(data: dict[str, Any]) -> dict[str, int]:
    added: dict[str, int] = {}
    tokens = data.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise ValueError("added_tokens must be a list")
    for i, token in enumerate(tokens):
        name, token_id = _item(token, "content"), _item(token, "id")
        if not isinstance(name, str) or type(token_id) is not int:
            raise ValueError(f"added_tokens[{i}] must have a content and an id")
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if _item(token, flag)]
        if not _item(token, "special"):
            flags.append("special = false")
        if flags:
            raise ValueError(f"added_tokens[{i}], {name!r}: {', '.join(flags)} is not supported")
        added[name] = token_id
    return added


def _simplify_pre_tokenizer(pre_tokenizer: Any) -> Any:
    """Return the single ByteLevel pre-tokenizer that is equivalent to a Sequence, if there is one.

    That is the case for a Sequence of one ByteLevel, and for a Split with GPT-2's pattern followed
    by a ByteLevel that does not split. Otherwise return the pre-tokenizer unchanged.
    """
    steps = _item(pre_tokenizer, "pretokenizers")
    if _item(pre_tokenizer, "type") != "Sequence" or not isinstance(steps, list):
        return pre_tokenizer
    if len(steps) == 1:
        return steps[0]
    if len(steps) == 2 and _splits_as_gpt2(steps[0]) and _item(steps[1], "use_regex") is False:
        return {**steps[1], "use_regex": True}
    return pre_tokenizer


def _splits_as_gpt2(step: Any) -> bool:
    """Return whether a Split pre-tokenizer splits a text into the matches of GPT-2's pattern.

    The matches cover the whole text, so it does not matter how text between them is handled.
    """
    kept = (_item(step, "behavior"), _item(step, "invert"))
    return (
        _item(step, "type") == "Split"
        and _item(step, "pattern.Regex") in GPT2_PATTERNS
        and kept in (("Isolated", False), ("Isolated", True), ("Removed", True))
    )


def _check_supported(data: dict[str, Any]) -> None:
    """Raise ValueError for settings with which the ids would differ from fastgpt's."""
    supported: dict[str, tuple[Any, ...]] = {
        "truncation": (None,),
        "padding": (None,),
        "normalizer": (None,),
        "pre_tokenizer.type": ("ByteLevel",),
        "pre_tokenizer.add_prefix_space": (False,),
        "pre_tokenizer.use_regex": (True, None),
        "post_processor.type": ("ByteLevel", None),
        "decoder.type": ("ByteLevel",),
        "model.type": ("BPE", None),
        "model.dropout": (None, 0),
        "model.continuing_subword_prefix": (None, ""),
        "model.end_of_word_suffix": (None, ""),
        "model.ignore_merges": (False, None),
        "model.byte_fallback": (False, None),
    }
    for name, values in supported.items():
        if (value := _item(data, name)) not in values:
            raise ValueError(
                f"{name} = {reprlib.repr(value)} is not supported: fastgpt reads byte-level BPE "
                f"with GPT-2's pre-tokenization ({name} = {values[0]!r})"
            )


def _item(data: Any, name: str) -> Any:
    """Return the value at a dotted name, or None if there is none."""
    for key in name.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _merge_rows(merges: Any, ids: dict[str, int]) -> NDArray[np.uint32]:
    """Return the ids of merges in the form "left right" or, in newer files, [left, right]."""
    if not isinstance(merges, list):
        raise ValueError("model.merges must be a list")
    rows: dict[tuple[int, int], tuple[int, int, int]] = {}
    for i, entry in enumerate(merges):
        try:
            left, right = entry.split(" ") if isinstance(entry, str) else entry
            row = ids[left], ids[right], ids[left + right]
        except (TypeError, ValueError, KeyError):
            raise ValueError(
                f"model.merges[{i}]: {reprlib.repr(entry)} is not a pair of tokens whose "
                "concatenation is in the vocabulary, too"
            ) from None
        if rows.setdefault(row[:2], row) is not row:
            raise ValueError(f"model.merges[{i}]: {entry!r} is repeated")
    return np.array(list(rows.values()), np.uint32).reshape(-1, 3)


def _build(ids: dict[str, int], merges: NDArray[np.uint32], specials: Set[str]) -> Vocabulary:
    names = sorted(ids, key=ids.__getitem__)
    tokens = [name.encode() if name in specials else _bytes_of(name) for name in names]
    return Vocabulary(tokens, merges, {name: ids[name] for name in names if name in specials})


def _bytes_of(name: str) -> bytes:
    try:
        return codecs.charmap_encode(name, "strict", BYTE_OF_LETTER)[0]
    except UnicodeEncodeError as error:
        raise ValueError(
            f"token {name!r} contains {name[error.start]!r}, which does not represent a byte"
        ) from None


def _letters_of(token: bytes) -> str:
    return codecs.charmap_decode(token, "strict", LETTER_OF_BYTE)[0]
