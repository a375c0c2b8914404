"""Byte-pair encoding in plain Python: what the C++ core computes, to be read.

A text becomes ids in three steps. It is **split** into pieces: words with the space before them,
numbers, punctuation, white space. Each piece is turned into bytes, and neighbouring bytes are
**merged** again and again, the pair learned first going first, until no pair is known. What is
left are tokens, and each has an id. To **train** is to find the merges: count all neighbouring
pairs in a text, make a token of the most frequent one, and start over (Gage 1994; Sennrich et al.
2016; with bytes instead of characters Radford et al. 2019).

>>> merges = train(["low lower lowest"], 3)
>>> merges
[(b'l', b'o'), (b'lo', b'w'), (b' ', b'low')]
>>> merge(b" lowly", ranks_of(merges))
[b' low', b'l', b'y']

The tests hold the C++ core against this file. The one difference: classes of characters are those
of Python's own Unicode version (``unicodedata.unidata_version``), while the core follows 16.0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from unicodedata import category

Pair = tuple[bytes, bytes]

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

# The 256 bytes in the order of GPT-2's ids: those that print as a character of Latin-1 come first.
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTES = [bytes([byte]) for byte in dict.fromkeys([*PRINTABLE, *range(256)])]


def split(text: str) -> list[str]:
    r"""Cut a text into pieces as GPT-2 does, by this pattern:

    ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``
    """
    pieces = []
    begin = 0
    while begin < len(text):
        end = _piece_end(text, begin)
        pieces.append(text[begin:end])
        begin = end
    return pieces


def merge(piece: bytes, ranks: Mapping[Pair, int]) -> list[bytes]:
    """Merge the bytes of one piece: the pair of the lowest rank first, and from the left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        parts = _replace(parts, best)
    return parts


def ranks_of(merges: Iterable[Pair]) -> dict[Pair, int]:
    """Number the merges, the one learned first being of the lowest rank."""
    return {pair: rank for rank, pair in enumerate(merges)}


def encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """Return the ids of a text, numbered as in GPT-2: the bytes, then what each merge makes."""
    ranks = ranks_of(merges)
    ids = {token: i for i, token in enumerate(vocabulary(merges))}
    return [ids[part] for piece in split(text) for part in merge(piece.encode(), ranks)]


def decode(ids: Iterable[int], merges: Sequence[Pair]) -> str:
    """Return the text of the ids; bytes that are no characters become U+FFFD."""
    tokens = vocabulary(merges)
    return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")


def vocabulary(merges: Sequence[Pair]) -> list[bytes]:
    """Return the bytes of each id. Two merges that make the same bytes make the same token."""
    return list(dict.fromkeys([*BYTES, *(left + right for left, right in merges)]))


def train(texts: Iterable[str], n_merges: int) -> list[Pair]:
    """Learn up to `n_merges` merges: each time of the pair that the texts hold most often.

    Of several such pairs it is the one of the smaller ids, as in Hugging Face's trainer. Pieces
    never merge with each other, so each different one needs to be looked at only once.
    """
    counts = Counter(piece for text in texts for piece in split(text))
    words = {piece: [bytes([byte]) for byte in piece.encode()] for piece in counts}
    ids = {token: i for i, token in enumerate(BYTES)}
    merges: list[Pair] = []
    while len(merges) < n_merges:
        pairs: Counter[Pair] = Counter()
        for piece, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault(b"".join(best), len(ids))
        words = {piece: _replace(parts, best) for piece, parts in words.items()}
    return merges


def _piece_end(text: str, begin: int) -> int:
    for contraction in CONTRACTIONS:
        if text.startswith(contraction, begin):
            return begin + len(contraction)
    # A space belongs to the word, number or marks that follow it.
    first = begin + 1 if text[begin] == " " and begin + 1 < len(text) else begin
    kind = _kind(text[first])
    end = first
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    if kind != "space":
        return end
    # White space leaves its last character to what follows, unless it has only that one.
    return end if end == len(text) or end == begin + 1 else end - 1


def _kind(char: str) -> str:
    if char in "\t\n\v\f\r\x85":
        return "space"
    return {"L": "letter", "N": "number", "Z": "space"}.get(category(char)[0], "mark")


def _replace(parts: list[bytes], pair: Pair) -> list[bytes]:
    """Join the pair wherever it stands, from left to right."""
    result: list[bytes] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result
