"""Tokens that the files of Hugging Face add to a vocabulary.

`tokenizer.json` has a list of them. The files beside it can add more, as transformers 5 reads them:
`tokenizer_config.json`, and `special_tokens_map.json` and `added_tokens.json`, which versions
before 5 wrote.

Added tokens are found in a text before it is split into pieces: those with ``"normalized": false``
first, and the others in the text between them. At each position, the longest one is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.utils import checks

CONFIG, SPECIALS_MAP, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DECODER = "added_tokens_decoder"
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Classes that take only the vocabulary and the merges from tokenizer.json. None is the default.
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


class AddedToken(NamedTuple):
    """A token that is added to a vocabulary."""

    name: str
    token_id: int | None  # None: its id in the vocabulary, or the next one that is free
    special: bool
    normalized: bool


class Additions(NamedTuple):
    """The tokens that the files beside a vocabulary add to it, in the order of transformers."""

    tokens: list[AddedToken]
    complete: bool = False  # transformers ignores the list in tokenizer.json


def read_additions(folder: Path, has_tokenizer_json: bool) -> Additions:
    """Return the tokens that the files in a folder add to the vocabulary in it.

    Raises: ValueError that names the file, for invalid values and for settings with which the ids
        would differ from fastgpt's.
    """
    config = _read(folder / CONFIG)
    of_gpt2 = config.get("tokenizer_class") in _GPT2_CLASSES
    with checks.of_file(folder / CONFIG):
        if of_gpt2 and config.get("add_prefix_space", False) is not False:
            raise ValueError("add_prefix_space = true is not supported, only false")
        for name in ("add_bos_token", "add_eos_token"):
            if not has_tokenizer_json and config.get(name, False) is not False:
                raise ValueError(f"{name} = true is not supported, only false")
    if DECODER in config:
        with checks.of_file(folder / CONFIG):
            return Additions([*_listed(config), *_named(config)], complete=of_gpt2)
    specials = _read(folder / SPECIALS_MAP)
    with checks.of_file(folder / SPECIALS_MAP if specials else folder / CONFIG):
        named = [*_named({**config, **specials})]
    ids = _read(folder / ADDED)
    known = {token.name for token in named}
    with checks.of_file(folder / ADDED):
        added = [
            AddedToken(name, _id(name, token_id), name in known, name not in known)
            for name, token_id in ids.items()
        ]
    return Additions([*added, *named])


def parse_added_token(where: str, value: Any, token_id: Any = None) -> AddedToken:
    """Return an added token in its JSON form; ValueError if it is invalid or not supported.

    where: its place in the file, for messages. token_id: used if the form has no id.
    """
    token = checks.mapping(where, value)
    name = checks.text(f"{where}.content", token.get("content"))
    token_id = token.get("id", token_id)
    flags = {
        flag: checks.flag(f"{where}.{flag}", token.get(flag, False))
        for flag in ("special", "single_word", "lstrip", "rstrip")
    }
    special = flags.pop("special")
    if unsupported := [flag for flag, is_set in flags.items() if is_set]:
        raise ValueError(f"{where}, {name!r}: {', '.join(unsupported)} is not supported")
    normalized = checks.flag(f"{where}.normalized", token.get("normalized", not special))
    return AddedToken(name, None if token_id is None else _id(where, token_id), special, normalized)


def number(tokens: Iterable[AddedToken], vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of added tokens; ValueError if one of them has two."""
    ids: dict[str, int] = {}
    for name, token_id, _, _ in tokens:
        if token_id is None and name not in ids:
            token_id = vocabulary.get(name, len(vocabulary.keys() | ids.keys()))
        if token_id is not None and ids.setdefault(name, token_id) != token_id:
            raise ValueError(f"added token {name!r} has two ids: {ids[name]} and {token_id}")
    return ids


def check_order(tokens: Iterable[AddedToken]) -> None:
    """Raise ValueError if it matters which tokens are found in a text first.

    fastgpt finds all of them at once, and those that are not special also in texts that it cuts
    before white space.
    """
    groups: dict[bool, set[str]] = {False: set(), True: set()}
    for token in tokens:
        groups[token.normalized].add(token.name)
        if not token.name:
            raise ValueError("an added token must not be empty")
        if not token.special and re.search(r"\S\s", token.name):
            raise ValueError(f"added token {token.name!r} is not supported: white space within it")
    for first in groups[False]:
        for second in groups[True] - groups[False]:
            if _starts_within(first, second):
                raise ValueError(
                    f"added tokens {first!r} and {second!r} are not supported: they overlap, and "
                    "only one of them is normalized"
                )


def _starts_within(first: str, second: str) -> bool:
    """Return whether the first token can start in a text where the second one is, or after that.

    transformers then finds the first one, but the second one starts earlier or is longer.
    """
    within = (first.startswith(second[at:]) for at in range(1, len(second)))
    return first in second or any(within)


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no file."""
    if not path.exists():
        return {}
    with checks.of_file(path):
        return checks.json_object(path.read_bytes())


def _listed(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the tokens of `added_tokens_decoder`, which maps ids to tokens."""
    for token_id, token in checks.mapping(DECODER, config[DECODER]).items():
        if not token_id.isdecimal():
            raise ValueError(f"{DECODER}: {token_id!r:.40} is not an id")
        yield parse_added_token(f"{DECODER}.{token_id}", token, int(token_id))


def _named(settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the tokens that have a role, such as `pad_token`, and further special tokens."""
    others = [key for key in settings if key.endswith("_token") and key not in _NAMED]
    for key in (*_NAMED, *others):
        value = settings.get(key)
        if isinstance(value, str | dict) or (key in _NAMED and value is not None):
            yield _special(key, value)
    key = _EXTRA if settings.get(_EXTRA) else _OLD_EXTRA
    extra = settings.get(key) or []
    if not isinstance(extra, list | dict):
        raise ValueError(f"{key} must be a list, not {extra!r:.40}")
    for value in extra.values() if isinstance(extra, dict) else extra:
        yield _special(key, value)


def _special(key: str, value: Any) -> AddedToken:
    """Return a special token given by its name, or in full."""
    if isinstance(value, str):
        return AddedToken(value, None, special=True, normalized=False)
    return parse_added_token(key, value)._replace(special=True, token_id=None)


def _id(where: str, token_id: Any) -> int:
    return checks.integer(f"{where}: id", token_id, least=0, most=1 << 31)
