"""Read and write BPE vocabularies: Hugging Face's tokenizer.json and OpenAI's vocab.bpe.

(:mod:`fastgpt.tokenizer.tiktoken_ranks` handles tiktoken's files.)

Both formats represent each byte of a token by one character: a printable byte by the character with
that code point, other bytes by characters from U+0100 on (a space is "Ġ"). Token names therefore
contain neither white space nor invalid UTF-8.
"""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgpt.tokenizer.added_tokens import (
    CONFIG,
    DECODER,
    AddedToken,
    Additions,
    check_order,
    number,
    parse_added_token,
)
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

_USE_JSON = "save it as tokenizer.json"
# A pre-tokenizer of tokenizer.json that splits a text into characters.
_EACH_CHARACTER = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}
_NONE = Additions([])


class Vocabulary(NamedTuple):
    """The arguments of a Tokenizer, as read from a file."""

    tokens: list[bytes]  # by id
    merges: NDArray[np.uint32]  # rows (left, right, merged), in order of decreasing priority
    special_tokens: dict[str, int]


def read_merges(path: Path, additions: Additions = _NONE) -> tuple[Vocabulary, dict[str, int]]:
    """Read ``vocab.bpe``, and ``encoder.json`` with the ids of its tokens if the folder has it.

    Returns the vocabulary, and the added tokens that are not special.

    additions: further tokens.

    Raises: ValueError that names the file and the problem.
    """
    with checks.of_file(path):
        tokens, merges = _C.parse_merges_file(path.read_bytes())
    names = list(map(_letters_of, tokens))
    ids_path = path.with_name(IDS_FILE.get(path.name, path.name))
    if ids_path == path or not ids_path.exists():
        vocabulary = {name: token_id for token_id, name in enumerate([*names, END_OF_TEXT])}
        with checks.of_file(path):
            ids = _add(additions.tokens, vocabulary)
            return _build(ids, merges, additions.tokens, {END_OF_TEXT})
    with checks.of_file(ids_path):
        vocabulary = _check_vocabulary(read_json(ids_path))
        ids = _add(additions.tokens, vocabulary)
        if unknown := [name for name in names if name not in vocabulary]:
            raise ValueError(f"token {unknown[0]!r} of {path.name} is missing")
        new_ids = np.array([ids[name] for name in names], np.uint32)
        return _build(ids, new_ids[merges], additions.tokens, vocabulary.keys() - set(names))


def read_hugging_face(
    data: dict[str, Any], additions: Additions = _NONE
) -> tuple[Vocabulary, dict[str, int]]:
    """Return the vocabulary and the added tokens of a parsed ``tokenizer.json``.

    additions: further tokens.

    Raises: ValueError that names the problem, for example if the tokenizer is not a byte-level BPE
        with GPT-2's pre-tokenization.
    """
    _check_supported({**data, "pre_tokenizer": _simplify_pre_tokenizer(data.get("pre_tokenizer"))})
    added = _added_tokens(data)
    if additions.complete:
        kept = {END_OF_TEXT, *(token.name for token in additions.tokens)}
        if lost := [token.name for token in added if token.name not in kept]:
            raise ValueError(
                f"added token {lost[0]!r} is not in {DECODER} of {CONFIG}, which replaces this list"
            )
    added += additions.tokens
    ids = _add(added, _check_vocabulary(_item(data, "model.vocab")))
    return _build(ids, _merge_rows(_item(data, "model.merges"), ids), added)


def to_hugging_face(vocabulary: Vocabulary, added_tokens: Mapping[str, int] = {}) -> dict[str, Any]:
    """Return the contents of ``tokenizer.json`` for a vocabulary with added tokens."""
    tokens, merges, special_tokens = vocabulary
    names = list(map(_letters_of, tokens))
    added = sorted({**special_tokens, **added_tokens}.items(), key=lambda item: item[1])
    for name, token_id in added:
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
            {"id": token_id, "content": name, **flags, "special": name in special_tokens}
            for name, token_id in added
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
    if data.get("added_tokens"):
        raise ValueError("added_tokens are not supported for a vocabulary of single characters")
    ids = _add([], _check_vocabulary(_item(data, "model.vocab")))
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
                f"tokens of earlier merges into a new token; {_USE_JSON}"
            )
        made.add(merged)
        lines.append(line)
    for name, token_id in special_tokens.items():
        names[token_id] = name
    others = set(range(len(tokens))) - made - set(special_tokens.values())
    if others or len(set(names)) != len(names):
        what = f"token {names[min(others)]!r} without a merge" if others else "a repeated name"
        raise ValueError(f"vocab.bpe cannot represent {what}; {_USE_JSON}")
    return "\n".join(lines) + "\n", {name: token_id for token_id, name in enumerate(names)}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError if it is not valid JSON or not an object."""
    return checks.json_object(path.read_bytes())


def _check_vocabulary(ids: Any) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(token_id) is int for token_id in ids.values()):
        raise ValueError("the vocabulary must map each token to its id, an integer")
    return ids


def _add(tokens: Sequence[AddedToken], vocabulary: dict[str, int]) -> dict[str, int]:
    """Return the ids of a vocabulary and of added tokens by name; ValueError if invalid."""
    check_order(tokens)
    added = number(tokens, vocabulary)
    ids = {**added, **vocabulary}
    for name, token_id in added.items():
        if ids[name] != token_id:
            raise ValueError(f"added token {name!r} has two ids: {token_id} and {ids[name]}")
    if missing := set(range(len(ids))) - set(ids.values()):
        raise ValueError(
            f"the ids must be 0 to {len(ids) - 1}, each once: {min(missing)} is missing"
        )
    return ids


def _added_tokens(data: dict[str, Any]) -> list[AddedToken]:
    tokens = data.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise ValueError("added_tokens must be a list")
    added = [parse_added_token(f"added_tokens[{i}]", token) for i, token in enumerate(tokens)]
    if without := [name for name, token_id, *_ in added if token_id is None]:
        raise ValueError(f"added token {without[0]!r} must have an id")
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
    """Raise ValueError for settings with which the ids would differ from fastgpt's.

    Truncation and padding are those of the last call before saving; transformers does not use them.
    """
    supported: dict[str, tuple[Any, ...]] = {
        "normalizer": (None,),
        "pre_tokenizer.type": ("ByteLevel",),
        "pre_tokenizer.add_prefix_space": (False,),
        "pre_tokenizer.use_regex": (True, None),
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
    if not _adds_nothing(data.get("post_processor")):
        raise ValueError(
            "post_processor = "
            f"{reprlib.repr(data['post_processor'])} is not supported: it adds tokens to a text"
        )


def _adds_nothing(post_processor: Any) -> bool:
    """Return whether the ids of a single text remain as they are."""
    kind = _item(post_processor, "type")
    if kind == "Sequence" and isinstance(steps := _item(post_processor, "processors"), list):
        return all(map(_adds_nothing, steps))
    if kind == "TemplateProcessing" and isinstance(parts := _item(post_processor, "single"), list):
        return [list(part) for part in parts if isinstance(part, dict)] == [["Sequence"]]
    return post_processor is None or kind == "ByteLevel"


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


def _build(
    ids: dict[str, int],
    merges: NDArray[np.uint32],
    added: Sequence[AddedToken],
    unmerged: Set[str] = frozenset(),
) -> tuple[Vocabulary, dict[str, int]]:
    """Return the vocabulary, and the added tokens that are not special.

    unmerged: names of tokens that are special unless they are added tokens.
    """
    words = {token.name for token in added}
    specials = {token.name for token in added if token.special} | (unmerged - words)
    words -= specials
    names = sorted(ids, key=ids.__getitem__)
    whole = specials | words
    tokens = [name.encode() if name in whole else _bytes_of(name) for name in names]
    special_tokens = {name: ids[name] for name in names if name in specials}
    return Vocabulary(tokens, merges, special_tokens), {
        name: ids[name] for name in names if name in words
    }


def _bytes_of(name: str) -> bytes:
    try:
        return codecs.charmap_encode(name, "strict", BYTE_OF_LETTER)[0]
    except UnicodeEncodeError as error:
        raise ValueError(
            f"token {name!r} contains {name[error.start]!r}, which does not represent a byte"
        ) from None


def _letters_of(token: bytes) -> str:
    return codecs.charmap_decode(token, "strict", LETTER_OF_BYTE)[0]
