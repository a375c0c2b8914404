"""Character-level tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt.tokenizer.base import (
    BaseTokenizer,
    Errors,
    IdArray,
    Spans,
    TokenIds,
    check_ids,
    to_utf8,
    write_json,
)
from fastgpt.utils.files import reject_file_name


class CharTokenizer(BaseTokenizer):
    """A tokenizer with one id for each of a fixed set of characters, in the given order.

    Raises: ValueError if there are no characters, or one is repeated or a lone surrogate.
    """

    def __init__(self, characters: str | Iterable[str]) -> None:
        self._characters = "".join(characters)
        if not self._characters:
            raise ValueError("a CharTokenizer needs at least one character")
        super().__init__(len(self._characters), {})
        self._code_points = _code_points(self._characters)  # [vocab_size], by id
        # Ids by code point; -1 for others, and for one extra entry at the end (see _encode).
        self._ids = np.full(int(self._code_points.max()) + 2, -1, np.int32)
        for token_id, char in enumerate(self._characters):
            if 0xD800 <= ord(char) <= 0xDFFF:
                raise ValueError(f"{char!r} is half a surrogate pair, not a character")
            if self._ids[ord(char)] >= 0:
                raise ValueError(f"character {char!r} occurs twice in the vocabulary")
            self._ids[ord(char)] = token_id

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer of the characters of a text, sorted by code point.

        Raises: ValueError if the text is empty, or is the name of an existing file.
        """
        reject_file_name(text, "Path({!r}).read_text()")
        return cls(sorted(set(to_utf8(text).decode())))

    def save(self, path: str | Path) -> None:
        """Save the characters as JSON, to a file or as ``tokenizer.json`` in an existing folder."""
        write_json(path, {"type": "fastgpt-char", "version": 1, "characters": self._characters})

    @property
    def characters(self) -> str:
        """The characters, in the order of their ids."""
        return self._characters

    def _encode(self, text: str | bytes, spans: Spans, errors: Errors, threads: int) -> IdArray:
        text = to_utf8(text).decode()
        points = _code_points(text)
        # The last entry of the table is -1; larger code points are clamped to it.
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = ids < 0
        if unknown.any():
            if errors != "ignore":
                raise self._unknown_character(text, int(unknown.argmax()))
            ids = ids[~unknown]
        return ids.astype(np.uint16) if self.vocab_size <= 1 << 16 else ids.astype(np.uint32)

    def _decode(self, ids: TokenIds) -> bytes:
        points = self._code_points[check_ids(ids, self.vocab_size)]
        return points.tobytes().decode("utf-32-le").encode()

    def _tokens(self) -> list[bytes]:
        return [character.encode() for character in self._characters]

    def _serialize(self) -> bytes:
        return b"fastgpt-char 1\n" + self._characters.encode()

    def _unknown_character(self, text: str, at: int) -> ValueError:
        return ValueError(
            f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not in this "
            f"model's vocabulary of {self.vocab_size} characters; remove it, or skip unknown "
            "characters (errors='ignore', or --skip-unknown on the command line)"
        )

    def __repr__(self) -> str:
        return f"CharTokenizer({self._characters!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return CharTokenizer, (self._characters,)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
