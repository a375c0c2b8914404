"""Text to token ids and back: byte-level BPE as in GPT-2, and single characters.

>>> tokenizer = Tokenizer.gpt2()
>>> tokenizer.encode("Hello world")
[15496, 995]
>>> tokenizer.decode([15496, 995])
'Hello world'

Both classes have the interface of :class:`BaseTokenizer`; :func:`load_tokenizer` reads either.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastgpt.compiled import _C
from fastgpt.vocabulary import (
    END_OF_TEXT,
    Vocabulary,
    naming,
    read_hugging_face,
    read_json,
    read_merges,
    to_hugging_face,
)

if TYPE_CHECKING:
    import torch

TokenIds: TypeAlias = "Iterable[int] | NDArray[np.integer[Any]] | torch.Tensor"
IdArray: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
Specials: TypeAlias = "Iterable[str] | Literal['all']"
PathLike: TypeAlias = str | Path

GPT2_MERGES = Path(__file__).with_name("assets") / "vocab.bpe"
FILE_NAME = "tokenizer.json"


class BaseTokenizer(ABC):
    """What every tokenizer does. Tokenizers never change once built; threads may share one."""

    @abstractmethod
    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
    ) -> IdArray:
        """Encode as :meth:`encode` does, into an array.

        Returns: ids ``[n]``, uint16 if ``vocab_size`` is at most 65,536, else uint32.
        """

    @abstractmethod
    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the bytes that the ids stand for; errors as in :meth:`decode`."""

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read a tokenizer of this class; see :func:`load_tokenizer`."""
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            found = type(tokenizer).__name__
            raise ValueError(f"{path} holds a {found}, not a {cls.__name__}: use load_tokenizer")
        return tokenizer

    @abstractmethod
    def save(self, path: PathLike) -> None:
        """Write the tokenizer to a file, or as ``tokenizer.json`` into an existing folder."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are: 0 to ``vocab_size - 1``."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all that determines the ids; equal for equal tokenizers."""

    @property
    def eot_token(self) -> int | None:
        """The id of ``<|endoftext|>``, which ends a document, or None if there is none."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def start_token(self) -> int:
        """What an empty prompt starts from: ``<|endoftext|>``, else a newline, else id 0."""
        if self.eot_token is not None:
            return self.eot_token
        return next(iter(self.encode("\n", errors="ignore")), 0)

    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
    ) -> list[int]:
        """Return the ids of the text.

        Args:
            text: a str, in which lone surrogates count as U+FFFD, or UTF-8 bytes.
            allowed_special: special tokens that become their id where they stand in the text.
                All others are ordinary text, so that no user's text can forge one.
            disallowed_special: special tokens whose presence in the text is an error.
            errors: "ignore" leaves out characters that the vocabulary does not have, "strict"
                raises; a byte-level vocabulary has all.

        Raises: ValueError for an unknown character or a disallowed special token.
        """
        ids: list[int] = self.encode_to_numpy(
            text,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            errors=errors,
        ).tolist()
        return ids

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
    ) -> list[list[int]]:
        """Return the ids of each text; see :meth:`encode`."""
        return [
            self.encode(
                text,
                allowed_special=allowed_special,
                disallowed_special=disallowed_special,
                errors=errors,
            )
            for text in texts
        ]

    def decode(self, ids: TokenIds, errors: str = "replace") -> str:
        """Return the text of one row of ids: a list, an array or a tensor.

        Bytes that are not UTF-8, as where the ids end inside a character, become U+FFFD, or are
        treated as another ``errors`` of :meth:`bytes.decode` says.

        Raises: IndexError for an id outside the vocabulary, TypeError for what is not an id,
            ValueError for more than one dimension.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_batch(self, rows: Iterable[TokenIds]) -> list[str]:
        """Return the text of each row of ids."""
        return [self.decode(row) for row in rows]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as ids arrive, holding back characters that are not complete yet.

        Joined, it is the text that :meth:`decode` gives for all the ids together.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in ids:
            if text := decoder.decode(self.token_bytes(token_id)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which need not be whole characters."""
        return self.decode_bytes([token_id])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BaseTokenizer):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class Tokenizer(BaseTokenizer):
    """Byte-level BPE as in GPT-2 (Radford et al., 2019), on the C++ core.

    Args:
        tokens: the bytes of each id; all 256 single bytes must be among them.
        merges: rows ``[n, 3]`` of ids (left, right, merged), the one to go first at the top.
        special_tokens: names and ids of tokens that stand for no text of their own.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: NDArray[np.integer[Any]] | Sequence[tuple[int, int, int]],
        special_tokens: Mapping[str, int],
    ) -> None:
        rows = np.asarray(merges, dtype=np.uint32).reshape(-1, 3)
        for name, token_id in special_tokens.items():
            if not 0 <= token_id < len(tokens) or tokens[token_id] != name.encode():
                raise ValueError(f"special token {name!r} is not the token of its id {token_id}")
        self._encoder = _C.BytePairEncoder(tokens, rows)
        self._special_tokens = dict(special_tokens)

    @staticmethod
    def gpt2() -> Tokenizer:
        """Return GPT-2's tokenizer, from the merges that ship with the package."""
        return _gpt2()

    @staticmethod
    def train(
        source: PathLike | Iterable[str | bytes | Path],
        vocab_size: int,
        *,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        min_frequency: int = 0,
        threads: int = 1,
        progress: bool = False,
    ) -> Tokenizer:
        """Learn a vocabulary from text, as in Sennrich et al. (2016) and GPT-2.

        Again and again, the most frequent pair of neighbouring tokens becomes a token, and of
        equally frequent ones that of the smallest ids; the merges are those of Hugging Face's
        ``BpeTrainer`` over ``ByteLevel``. Memory grows with the different words of the text, not
        with its length.

        Args:
            source: the path of a file; or texts (str or UTF-8 bytes) and files (Path objects, read
                in blocks) one after the other, so that a list with one str is one text. What
                stands in the text as a special token counts as ordinary text.
            vocab_size: how many ids: 256 bytes in GPT-2's order, then a token for each merge, then
                the special tokens. It is smaller where the text holds no more pairs to merge.
            special_tokens: names such as ``<|endoftext|>``, which no merge can make.
            min_frequency: pairs that occur less often are not merged.
            threads: how many count words; their number changes nothing in the vocabulary.
            progress: show a bar, if the output is a terminal.

        Raises: ValueError for a vocabulary too small, special tokens that are not, or no text.
        """
        from fastgpt.bpe_training import learn_vocabulary  # here, for it imports this module

        return Tokenizer(
            *learn_vocabulary(source, vocab_size, special_tokens, min_frequency, threads, progress)
        )

    def save(self, path: PathLike) -> None:
        """Write Hugging Face's ``tokenizer.json``, to a file or into a folder."""
        _write_json(path, to_hugging_face(self._vocabulary))

    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
    ) -> IdArray:
        """Encode as :meth:`encode` does, into an array of uint16 (65,536 ids or fewer) or uint32.

        A byte that is no part of valid UTF-8 counts as a punctuation mark, and decodes to itself.
        """
        data = text if isinstance(text, bytes) else _utf8(text)
        spans = self._special_spans(data, allowed_special, disallowed_special)
        ids = self._encoder.encode(data, spans)
        return ids.astype(np.uint16) if self.vocab_size <= 1 << 16 else ids

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the bytes that the ids stand for; errors as in :meth:`decode`."""
        return self._encoder.decode(_check_ids(ids, self.vocab_size))

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return len(self._encoder)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self._special_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the tokens, the merges and the special tokens."""
        tokens, merges, special_tokens = self._vocabulary
        digest = hashlib.sha256(b"fastgpt-bpe 1\n")
        for token in tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        digest.update(merges.astype("<u4").tobytes())
        digest.update(json.dumps(special_tokens, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._encoder.tokens(), self._encoder.merges(), self._special_tokens)

    def _special_spans(
        self, data: bytes, allowed: Specials, disallowed: Specials
    ) -> list[tuple[int, int, int]]:
        """Find the special tokens in the text: first byte, byte after the last, id."""
        if not allowed and not disallowed:
            return []
        names = _special_names(allowed, self._special_tokens)
        for name in sorted(_special_names(disallowed, self._special_tokens) - names):
            if (at := data.find(name.encode())) >= 0:
                raise ValueError(
                    f"the text holds the special token {name!r} at byte {at}: take it out, or "
                    "pass allowed_special to encode it as that token"
                )
        if not names:
            return []
        longest_first = sorted((name.encode() for name in names), key=len, reverse=True)
        pattern = re.compile(b"|".join(map(re.escape, longest_first)))
        ids = self._special_tokens
        return [(*match.span(), ids[match[0].decode()]) for match in pattern.finditer(data)]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self._special_tokens})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, tuple(self._vocabulary)


class CharTokenizer(BaseTokenizer):
    """One id for each of a fixed set of characters, in the order given."""

    def __init__(self, characters: str | Iterable[str]) -> None:
        self._characters = "".join(characters)
        if not self._characters:
            raise ValueError("a CharTokenizer needs at least one character")
        self._code_points = _code_points(self._characters)  # [vocab_size], by id
        self._ids = np.full(int(self._code_points.max()) + 2, -1, np.int32)  # by code point
        for token_id, (char, point) in enumerate(
            zip(self._characters, self._code_points, strict=True)
        ):
            if 0xD800 <= point <= 0xDFFF:
                raise ValueError(f"{char!r} is half a surrogate pair, not a character")
            if self._ids[point] >= 0:
                raise ValueError(f"character {char!r} stands twice in the vocabulary")
            self._ids[point] = token_id

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer for the characters of a text, sorted by code point."""
        return cls(sorted(set(_utf8(text).decode())))

    def save(self, path: PathLike) -> None:
        """Write the characters as JSON, to a file or into a folder."""
        _write_json(path, {"type": "fastgpt-char", "version": 1, "characters": self._characters})

    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
    ) -> IdArray:
        """Encode as :meth:`encode` does, into an array of uint16 (65,536 ids or fewer) or uint32.

        Raises: ValueError that names the first character without an id and its position, unless
            ``errors`` is "ignore"; UnicodeDecodeError for bytes that are not UTF-8.
        """
        for names in (allowed_special, disallowed_special):
            _special_names(names, {})
        text = (text if isinstance(text, bytes) else _utf8(text)).decode()
        points = _code_points(text)
        # The table's last entry is -1, and stands for every code point beyond its end.
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = ids < 0
        if unknown.any():
            if errors != "ignore":
                raise self._unknown_character(text, int(unknown.argmax()))
            ids = ids[~unknown]
        return ids.astype(np.uint16) if self.vocab_size <= 1 << 16 else ids.astype(np.uint32)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the UTF-8 bytes of the characters; errors as in :meth:`decode`."""
        points = self._code_points[_check_ids(ids, self.vocab_size)]
        return points.tobytes().decode("utf-32-le").encode()

    @property
    def vocab_size(self) -> int:
        """How many characters there are."""
        return len(self._characters)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Empty: a character vocabulary has no special tokens."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the characters."""
        return hashlib.sha256(b"fastgpt-char 1\n" + self._characters.encode()).hexdigest()

    def _unknown_character(self, text: str, at: int) -> ValueError:
        return ValueError(
            f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not in this "
            f"model's vocabulary of {self.vocab_size} characters; remove it or leave it out "
            "(errors='ignore', or --skip-unknown on the command line)"
        )

    def __repr__(self) -> str:
        return f"CharTokenizer({self._characters!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return CharTokenizer, (self._characters,)


def load_tokenizer(path: PathLike) -> BaseTokenizer:
    """Read a tokenizer of either class from a file, or from a folder that holds such files.

    - ``tokenizer.json`` (or any name ending in ``.json``), as :meth:`BaseTokenizer.save` writes it
      or Hugging Face's tokenizers do for a byte-level BPE;
    - ``vocab.bpe`` (Hugging Face: ``merges.txt``), OpenAI's format. Ids come from ``encoder.json``
      (``vocab.json``) in the same folder where ``path`` is the folder; without one they are the
      256 bytes in GPT-2's order, the merges in theirs, and ``<|endoftext|>``.

    Raises: ValueError that names the place in a malformed file, or what in it is not supported;
        FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if path.suffix != ".json":
        return _from_vocabulary(path, read_merges(path))
    data = read_json(path)
    if "type" in data:
        return _from_char_json(path, data)
    return _from_vocabulary(path, read_hugging_face(path, data))


def _load_folder(folder: Path) -> BaseTokenizer:
    if (folder / FILE_NAME).exists():
        return load_tokenizer(folder / FILE_NAME)
    for merges, ids in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")):
        path, ids_path = folder / merges, folder / ids
        if path.exists():
            vocabulary = read_merges(path, ids_path if ids_path.exists() else None)
            return _from_vocabulary(path, vocabulary)
    raise FileNotFoundError(f"{folder} holds no tokenizer: neither {FILE_NAME} nor vocab.bpe")


def _from_vocabulary(path: Path, vocabulary: Vocabulary) -> Tokenizer:
    with naming(path):
        return Tokenizer(*vocabulary)


def _from_char_json(path: Path, data: dict[str, Any]) -> CharTokenizer:
    with naming(path):
        if data["type"] != "fastgpt-char" or data.get("version") != 1:
            raise ValueError(
                f"type {data['type']!r}, version {data.get('version')!r} is not supported: this "
                "fastgpt reads type 'fastgpt-char', version 1"
            )
        if not isinstance(data.get("characters"), str):
            raise ValueError('"characters" must be a string')
        return CharTokenizer(data["characters"])


@cache
def _gpt2() -> Tokenizer:
    return _from_vocabulary(GPT2_MERGES, read_merges(GPT2_MERGES))


def _write_json(path: PathLike, data: dict[str, Any]) -> None:
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    file.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _check_ids(ids: TokenIds, vocab_size: int) -> NDArray[np.uint32]:
    """Return the ids ``[n]`` as an array, or raise an error that names the first bad one."""
    if hasattr(ids, "detach"):  # a tensor, perhaps on a GPU
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1:
            raise ValueError(
                f"decode takes one row of ids, not an array of shape {ids.shape}: pass one row, "
                "as in ids[0], or use decode_batch"
            )
        if ids.dtype.kind not in "iu" and ids.size:
            raise TypeError(f"token ids must be integers, not {ids.dtype}")
        row = ids
    elif isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Iterable):
        raise TypeError(f"decode takes a sequence of token ids, not {type(ids).__name__}")
    else:
        ids = list(ids)
        try:
            row = np.frombuffer(array("q", ids), np.int64)
        except (TypeError, OverflowError):
            raise _bad_id(ids, vocab_size) from None
    if row.size and not 0 <= row.min() <= row.max() < vocab_size:
        raise _bad_id(row.tolist(), vocab_size)
    return row.astype(np.uint32)


def _bad_id(ids: list[Any], vocab_size: int) -> Exception:
    for at, token_id in enumerate(ids):
        if not isinstance(token_id, SupportsIndex):
            return TypeError(f"token ids must be integers, not {token_id!r}, as at position {at}")
        if not 0 <= index(token_id) < vocab_size:
            return IndexError(
                f"token id {token_id} at position {at} is out of range: this vocabulary has the "
                f"ids 0 to {vocab_size - 1}"
            )
    raise AssertionError("none of the ids is bad")


def _utf8(text: str) -> bytes:
    """Encode a str, with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"encode takes str or bytes, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        # By way of UTF-16, which also joins two surrogates that make one character.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _special_names(names: Specials, known: Mapping[str, int]) -> set[str]:
    if names == "all":
        return set(known)
    if isinstance(names, str):
        raise TypeError(f"special tokens are given as a set or 'all', not as the str {names!r}")
    if unknown := sorted(set(names) - set(known)):
        has = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"{unknown[0]!r} is not a special token of this tokenizer; it has: {has}")
    return set(names)
