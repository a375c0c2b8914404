"""A reference implementation of byte-level BPE in plain Python, for the C++ core.

A text is encoded in three steps. It is **split** into pieces: words with the preceding space,
numbers, punctuation and white space. Each piece is encoded as UTF-8 bytes, and adjacent tokens,
which are single bytes at first, are **merged** repeatedly, in the order in which the merges were
learned, until no known pair is left. The resulting tokens are mapped to ids. **Training** learns
the merges: it counts all adjacent pairs in a text, merges the most frequent one into a new token,
and repeats (Gage 1994; Sennrich et al. 2016; on bytes instead of characters, Radford et al. 2019).

>>> merges = train(["low lower lowest"], 3)
>>> merges
[(b'l', b'o'), (b'lo', b'w'), (b' ', b'low')]
>>> merge(b" lowly", ranks_of(merges))
[b' low', b'l', b'y']

The tests compare the C++ core with this module. The only difference is the Unicode version of the
character classes: this module uses Python's (``unicodedata.unidata_version``), and the core 16.0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from unicodedata import category

Pair = tuple[bytes, bytes]

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

# The 256 bytes in the order of GPT-2's ids: those that are printable Latin-1 characters come first.
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTES = [bytes([byte]) for byte in dict.fromkeys([*PRINTABLE, *range(256)])]


def split(text: str) -> list[str]:
    r"""Split a text into pieces with GPT-2's pre-tokenization pattern:

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
    """Merge the bytes of one piece: the pair with the lowest rank first, from left to right."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        parts = _replace(parts, best)
    return parts


def ranks_of(merges: Iterable[Pair]) -> dict[Pair, int]:
    """Return the rank of each merge; the one learned first has rank 0."""
    return {pair: rank for rank, pair in enumerate(merges)}


def encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """Return the ids of a text, numbered as in GPT-2: first the bytes, then the merged tokens."""
    ranks = ranks_of(merges)
    ids = {token: i for i, token in enumerate(vocabulary(merges))}
    return [ids[part] for piece in split(text) for part in merge(piece.encode(), ranks)]


def decode(ids: Iterable[int], merges: Sequence[Pair]) -> str:
    """Return the text of the ids; bytes that are not valid UTF-8 become U+FFFD."""
    tokens = vocabulary(merges)
    return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")


def vocabulary(merges: Sequence[Pair]) -> list[bytes]:
    """Return the bytes of each id. Merges that result in the same bytes share one token."""
    return list(dict.fromkeys([*BYTES, *(left + right for left, right in merges)]))


def train(texts: Iterable[str], n_merges: int) -> list[Pair]:
    """Learn up to `n_merges` merges, each of the most frequent pair in the texts.

    Of equally frequent pairs, the one with the smaller ids is merged, as in Hugging Face's trainer.
    Merges never cross piece boundaries, so each distinct piece is processed once, weighted by its
    count.
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
    # A space is part of the word, number or punctuation that follows it.
    first = begin + 1 if text[begin] == " " and begin + 1 < len(text) else begin
    kind = _kind(text[first])
    end = first
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    if kind != "space":
        return end
    # A run of white space excludes its last character, which starts the next piece, unless the run
    # has only one character or ends the text.
    return end if end == len(text) or end == begin + 1 else end - 1


def _kind(char: str) -> str:
    if char in "\t\n\v\f\r\x85":
        return "space"
    return {"L": "letter", "N": "number", "Z": "space"}.get(category(char)[0], "mark")


def _replace(parts: list[bytes], pair: Pair) -> list[bytes]:
    """Merge all occurrences of the pair, from left to right."""
    result: list[bytes] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result
