"""tiktoken's rank files: a line per token, its bytes in base64 and its id.

Such a file lists no merges. Its ids do their work: tiktoken joins whichever two neighbours make the
token of the lowest id, so the merges are found by encoding each token with those before it. It
says nothing of special tokens, nor of the pattern that splits a text into pieces: fastgpt splits
as GPT-2 does, which is right for ``r50k_base`` and its kind, but not for ``cl100k_base`` and later.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT, Vocabulary, naming


def read_rank_file(
    path: Path, special_tokens: Mapping[str, int] | Iterable[str] | None = None
) -> Vocabulary:
    """Read a ``*.tiktoken`` file.

    special_tokens: names, which get the ids after the file's, or names and ids; by default
    ``<|endoftext|>`` alone.
    """
    with naming(path):
        tokens = _parse(path.read_bytes())
        rows = _merges(tokens)
        specials = _number((END_OF_TEXT,) if special_tokens is None else special_tokens, tokens)
    names = [name.encode() for name in sorted(specials, key=specials.__getitem__)]
    return Vocabulary([*tokens, *names], rows, specials)


def to_ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Return the ids of all tokens but the special ones, if they say all about the merges."""
    tokens, merges, special_tokens = vocabulary
    special_ids = set(special_tokens.values())
    ids = [token_id for token_id in range(len(tokens)) if token_id not in special_ids]
    ordinary = [tokens[token_id] for token_id in ids]
    if len(set(ordinary)) != len(ordinary):
        raise ValueError("tiktoken cannot hold it: two tokens are of the same bytes")
    if (np.diff(merges[:, 2].astype(np.int64)) <= 0).any():
        raise ValueError(
            "tiktoken cannot hold it: its merges go by the order of ids, and here they do not"
        )
    new_ids = np.array(ids, np.uint32)
    try:
        same = np.array_equal(new_ids[_merges(ordinary)], merges)
    except ValueError as error:
        raise ValueError(f"tiktoken cannot hold it: {error}") from None
    if not same:
        raise ValueError("tiktoken cannot hold it: it would make some token of two other parts")
    return dict(zip(ordinary, ids, strict=True))


def to_rank_file(vocabulary: Vocabulary) -> bytes:
    """Return what a ``*.tiktoken`` file holds for a vocabulary."""
    for name, token_id in vocabulary.special_tokens.items():
        if token_id < len(vocabulary.tokens) - len(vocabulary.special_tokens):
            raise ValueError(
                f"a rank file cannot hold it: the special token {name!r} has id {token_id}, before "
                "ids of ordinary tokens; save it as tokenizer.json"
            )
    ranks = to_ranks(vocabulary)
    return b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items())


def _parse(content: bytes) -> list[bytes]:
    """Return the tokens by rank."""
    tokens: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        token, rank = _parse_line(line, number)
        if token in line_of:
            raise ValueError(f"line {number}: holds the token of line {line_of[token]} again")
        if rank in tokens:
            first = line_of[tokens[rank]]
            raise ValueError(f"line {number}: gives rank {rank} again, which is line {first}'s")
        tokens[rank], line_of[token] = token, number
    for rank in range(len(tokens)):
        if rank not in tokens:
            at = min((line_of[token], r) for r, token in tokens.items() if r > rank)
            raise ValueError(
                f"line {at[0]}: gives rank {at[1]}, but no line gives rank {rank}: they must be 0 "
                f"to {len(tokens) - 1}, each once"
            )
    for byte in range(256):
        if bytes([byte]) not in line_of:
            raise ValueError(f"line {len(line_of)} is the last one, and none holds byte {byte}")
    return [tokens[rank] for rank in range(len(tokens))]


def _parse_line(line: bytes, number: int) -> tuple[bytes, int]:
    token, space, rank = line.partition(b" ")
    if line.endswith(b"\r"):
        raise ValueError(f"line {number}: ends as in Windows (CRLF): the file was changed")
    if not (space and token and rank.isdigit() and len(rank) < 10):
        raise ValueError(f"line {number}: is not a token in base64, a space and its rank")
    try:
        return b64decode(token, validate=True), int(rank)
    except binascii.Error as error:
        raise ValueError(f"line {number}: is not base64: {error}") from None


def _merges(tokens: list[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """Return the merges, rows (left, right, merged), that the order of the tokens stands for."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    rows = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _encode(token, ranks, rank)
        if len(parts) != 2:
            raise ValueError(
                f"token {token!r} of rank {rank} cannot be made of two tokens of lower rank: "
                f"those before it make {len(parts)} of it"
            )
        rows.append((ranks[parts[0]], ranks[parts[1]], rank))
    return np.array(rows, np.uint32).reshape(-1, 3)


def _encode(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Merge the bytes of a token as far as tokens of a rank below the limit go."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(found)
        if best >= limit:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _number(
    special_tokens: Mapping[str, int] | Iterable[str], tokens: list[bytes]
) -> dict[str, int]:
    """Return the special tokens' ids, which must follow those of the file without a gap."""
    first = len(tokens)
    if isinstance(special_tokens, str):
        raise TypeError(f"special tokens are given as a list, not as the str {special_tokens!r}")
    if not isinstance(special_tokens, Mapping):
        special_tokens = {name: first + i for i, name in enumerate(special_tokens)}
    if sorted(special_tokens.values()) != [*range(first, first + len(special_tokens))]:
        raise ValueError(
            f"the special tokens must have the ids from {first} on, without a gap, not "
            f"{sorted(special_tokens.values())}"
        )
    return dict(special_tokens)
