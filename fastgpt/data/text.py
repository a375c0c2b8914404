"""Read a whole text into memory, split into a training part and a validation part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastgpt.data.documents import Piece, file_format, read_documents, split_documents
from fastgpt.utils.errors import UsageError
from fastgpt.utils.text_files import read_blocks, regular_file

PACKAGED = {"shakespeare": Path(__file__).parents[1] / "assets" / "tinyshakespeare.txt"}


@dataclass(frozen=True)
class Text:
    """The documents of a text, or of a part of it.

    Attributes:
        pieces: the documents, as of :func:`fastgpt.data.documents.read_documents`. A plain text is
            a single piece that does not end.
        plain: whether lines that hold only ``<|endoftext|>`` separate documents in it.
    """

    pieces: list[Piece]
    plain: bool

    def __str__(self) -> str:
        """Return the text for tokenizers without <|endoftext|>: documents end with a newline."""
        return "".join(text + "\n" if ends else text for text, ends in self.pieces)

    @property
    def documents(self) -> list[Piece]:
        """The documents for tokenizers with <|endoftext|>. The last one may not be ended."""
        if not self.plain:
            return self.pieces
        *ended, last = split_documents(str(self))
        return [*((text, True) for text in ended), (last, False)]

    @property
    def sha256(self) -> str:
        """The SHA-256 of a plain text, or of all documents, each followed by a zero byte."""
        marked = (text + "\0" if ends else text for text, ends in self.pieces)
        return hashlib.sha256("".join(marked).encode(errors="surrogatepass")).hexdigest()

    def split(self, val_fraction: float) -> tuple[Text, Text]:
        """Split the text by characters; the second part has `val_fraction` of them."""
        n_characters = sum(len(text) for text, _ in self.pieces)
        n_train = n_characters - int(n_characters * val_fraction)
        train: list[Piece] = []
        for index, (text, ends) in enumerate(self.pieces):
            if len(text) > n_train:
                rest = [(text[n_train:], ends), *self.pieces[index + 1 :]]
                return Text([*train, (text[:n_train], False)], self.plain), Text(rest, self.plain)
            train.append((text, ends))
            n_train -= len(text)
        return Text(train, self.plain), Text([], self.plain)


def read_text(data: str | Path) -> Text:
    """Read the name of a packaged text, or a file or a pipe in any format of `read_documents`.

    Plain text loses its byte order mark, and its line endings become those of Unix.

    Raises: UsageError if the file is missing, empty or invalid.
    """
    path = PACKAGED.get(str(data), Path(data))
    with regular_file(path) as file:
        if not file.exists():
            raise UsageError(
                f"data file {path} does not exist; pass a file of texts, or one of: "
                f"{', '.join(PACKAGED)}"
            )
        if plain := file_format(file) == "text":
            pieces = [("".join(map(bytes.decode, read_blocks(file))), False)]
        else:
            pieces = list(read_documents(file))
        if not any(text for text, _ in pieces):
            raise UsageError(f"data file {path} is empty ({file.stat().st_size:,} bytes)")
    return Text(pieces, plain)
