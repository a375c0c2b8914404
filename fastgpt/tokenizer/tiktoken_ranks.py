"""Read and write tiktoken's rank files, which have one line per token: base64 bytes and the id.

Such a file does not list merges. tiktoken repeatedly merges the two adjacent tokens whose
concatenation has the lowest id, so the merge of each token is recovered by encoding it with the
tokens of lower ids. The file has neither special tokens nor a pre-tokenization pattern. fastgpt
uses GPT-2's pattern, which is correct for ``r50k_base`` and similar encodings, but not for
``cl100k_base`` and later ones.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT, Vocabulary


def read_rank_file(
    path: Path, special_tokens: Mapping[str, int] | Iterable[str] | None = None
) -> Vocabulary:
    """Read a ``*.tiktoken`` file.

    special_tokens: names, which get the ids after those of the file, or a mapping of names to ids;
    by default only ``<|endoftext|>``.

    Raises: ValueError that names the line with an error, or for invalid ids of special tokens.
    """
    tokens = _parse(path.read_bytes())
    rows = _merges(tokens)
    specials = _number((END_OF_TEXT,) if special_tokens is None else special_tokens, tokens)
    names = [name.encode() for name in sorted(specials, key=specials.__getitem__)]
    return Vocabulary([*tokens, *names], rows, specials)


def to_ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Return the ids of all tokens except the special ones, by their bytes.

    Raises: ValueError if tiktoken would derive other merges from these ids.
    """
    tokens, merges, special_tokens = vocabulary
    special_ids = set(special_tokens.values())
    ids = [token_id for token_id in range(len(tokens)) if token_id not in special_ids]
    ordinary = [tokens[token_id] for token_id in ids]
    if len(set(ordinary)) != len(ordinary):
        raise ValueError("not representable in tiktoken: two tokens have the same bytes")
    if (np.diff(merges[:, 2].astype(np.int64)) <= 0).any():
        raise ValueError(
            "not representable in tiktoken: it merges in the order of ids, and these merges are in "
            "another order"
        )
    new_ids = np.array(ids, np.uint32)
    try:
        same = np.array_equal(new_ids[_merges(ordinary)], merges)
    except ValueError as error:
        raise ValueError(f"not representable in tiktoken: {error}") from None
    if not same:
        raise ValueError(
            "not representable in tiktoken: it would merge a token from two other parts"
        )
    return dict(zip(ordinary, ids, strict=True))


def to_rank_file(vocabulary: Vocabulary) -> bytes:
    """Return the contents of a ``*.tiktoken`` file for a vocabulary.

    Raises: ValueError if the format cannot represent it.
    """
    for name, token_id in vocabulary.special_tokens.items():
        if token_id < len(vocabulary.tokens) - len(vocabulary.special_tokens):
            raise ValueError(
                f"not representable in a rank file: the special token {name!r} has id {token_id}, "
                "before ids of ordinary tokens; save it as tokenizer.json"
            )
    ranks = to_ranks(vocabulary)
    return b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items())


def _parse(content: bytes) -> list[bytes]:
    """Return the tokens in the order of their ranks."""
    tokens: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        token, rank = _parse_line(line, number)
        if token in line_of:
            raise ValueError(f"line {number}: repeats the token of line {line_of[token]}")
        if rank in tokens:
            first = line_of[tokens[rank]]
            raise ValueError(f"line {number}: repeats rank {rank} of line {first}")
        tokens[rank], line_of[token] = token, number
    for rank in range(len(tokens)):
        if rank not in tokens:
            at = min((line_of[token], r) for r, token in tokens.items() if r > rank)
            raise ValueError(
                f"line {at[0]}: has rank {at[1]}, but no line has rank {rank}: the ranks must be 0 "
                f"to {len(tokens) - 1}, each once"
            )
    for byte in range(256):
        if bytes([byte]) not in line_of:
            raise ValueError(f"no line up to the last one ({len(line_of)}) contains byte {byte}")
    return [tokens[rank] for rank in range(len(tokens))]


def _parse_line(line: bytes, number: int) -> tuple[bytes, int]:
    token, space, rank = line.partition(b" ")
    if line.endswith(b"\r"):
        raise ValueError(f"line {number}: has a Windows line ending (CRLF): the file was modified")
    if not (space and token and rank.isdigit() and len(rank) < 10):
        raise ValueError(f"line {number}: must be a token in base64, a space and a rank")
    try:
        return b64decode(token, validate=True), int(rank)
    except binascii.Error as error:
        raise ValueError(f"line {number}: is not base64: {error}") from None


def _merges(tokens: list[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """Return the merges, rows (left, right, merged), implied by the order of the tokens."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    rows = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _encode(token, ranks, rank)
        if len(parts) != 2:
            raise ValueError(
                f"token {token!r} of rank {rank} cannot be merged from two tokens of lower rank: "
                f"with those, it is encoded as {len(parts)} tokens"
            )
        rows.append((ranks[parts[0]], ranks[parts[1]], rank))
    return np.array(rows, np.uint32).reshape(-1, 3)


def _encode(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Encode the bytes of a token with the tokens of a rank below the limit.

    As in tiktoken, the adjacent pair whose concatenation has the lowest rank is merged first, the
    leftmost one if there are several. Merging stops at two parts, which the token is merged from.
    """
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
    """Return the ids of the special tokens, which must follow those of the file without a gap."""
    first = len(tokens)
    if isinstance(special_tokens, str):
        raise TypeError(f"special tokens must be a list of names, not the str {special_tokens!r}")
    if not isinstance(special_tokens, Mapping):
        special_tokens = {name: first + i for i, name in enumerate(special_tokens)}
    if sorted(special_tokens.values()) != [*range(first, first + len(special_tokens))]:
        raise ValueError(
            f"the ids of the special tokens must start at {first} and have no gap, but are "
            f"{sorted(special_tokens.values())}"
        )
    return dict(special_tokens)
