"""The interface of all tokenizers, and what their implementations share."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex, TypeAlias, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT
from fastgpt.utils.files import atomic_file
from fastgpt.utils.threads import map_in_order

if TYPE_CHECKING:
    import torch

TokenIds: TypeAlias = "Iterable[int] | NDArray[np.integer[Any]] | torch.Tensor"
IdArray: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
Specials: TypeAlias = "Iterable[str] | Literal['all']"
Errors: TypeAlias = Literal["strict", "ignore"]
Spans: TypeAlias = list[tuple[int, int, int]]  # begin and end in the bytes of a text, and an id

FILE_NAME = "tokenizer.json"


class EncodeOptions(TypedDict, total=False):
    """The options of :meth:`BaseTokenizer.encode` that concern the ids."""

    allowed_special: Specials
    disallowed_special: Specials
    errors: Errors


class BaseTokenizer(ABC):
    """The interface of all tokenizers. They are immutable and can be shared between threads.

    A subclass implements :meth:`save`, and the methods `_encode`, `_decode`, `_tokens` and
    `_serialize`, which the public ones call with checked arguments.
    """

    def __init__(
        self,
        vocab_size: int,
        special_tokens: Mapping[str, int],
        added_tokens: Mapping[str, int] = {},
    ) -> None:
        self._vocab_size = vocab_size
        self._special_tokens = dict(special_tokens)
        self._added_tokens = dict(added_tokens)

    @classmethod
    def load(
        cls, path: str | Path, *, special_tokens: Mapping[str, int] | Iterable[str] | None = None
    ) -> Self:
        """Load a tokenizer of this class; see :func:`load_tokenizer`.

        Raises: the errors of :func:`load_tokenizer`, and ValueError for another class of tokenizer.
        """
        from fastgpt.tokenizer.load import load_tokenizer  # avoids a circular import

        tokenizer = load_tokenizer(path, special_tokens=special_tokens)
        if not isinstance(tokenizer, cls):
            found = type(tokenizer).__name__
            raise ValueError(f"{path} contains a {found}, not a {cls.__name__}: use load_tokenizer")
        return tokenizer

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Save the tokenizer to a file, or as ``tokenizer.json`` in an existing folder."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, including special tokens; the ids are 0 to ``vocab_size - 1``."""
        return self._vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, mapped to their ids; empty for a character vocabulary."""
        return dict(self._special_tokens)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that are encoded as their ids wherever a text contains them, mapped to these ids.

        Unlike special tokens, they are ordinary words, which a Hugging Face tokenizer was extended
        by (`add_tokens`).
        """
        return dict(self._added_tokens)

    @property
    def eot_token(self) -> int | None:
        """The id of ``<|endoftext|>``, which ends a document, or None without such a token."""
        return self._special_tokens.get(END_OF_TEXT)

    @property
    def start_token(self) -> int:
        """The id that replaces an empty prompt: ``<|endoftext|>``, else a newline, else id 0."""
        if self.eot_token is not None:
            return self.eot_token
        return next(iter(self.encode("\n", errors="ignore")), 0)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of everything that determines the ids; the same for equal ones."""
        return hashlib.sha256(self._serialize()).hexdigest()

    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Errors = "strict",
        threads: int = 1,
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: a str, in which lone surrogates are treated as U+FFFD, or UTF-8 bytes. With a
                byte-level vocabulary, a byte that is not part of valid UTF-8 is treated as a
                punctuation mark, and is preserved by decoding.
            allowed_special: special tokens, or ``"all"``, whose occurrences in the text are encoded
                as their ids. Other special tokens in the text are encoded as ordinary text, so that
                untrusted text cannot inject them.
            disallowed_special: special tokens, or ``"all"``, whose presence in the text is an
                error, unless they are in `allowed_special`.
            errors: how to handle characters that are not in the vocabulary: ``"strict"`` raises
                ValueError, ``"ignore"`` drops them. A byte-level vocabulary has all characters.
            threads: maximum number of threads for a long text; it does not affect the ids.

        Raises: ValueError for a disallowed special token, or for a character without an id, with
            its position; UnicodeDecodeError, with a character vocabulary, for bytes that are not
            UTF-8.
        """
        ids = self.encode_to_numpy(
            text,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            errors=errors,
            threads=threads,
        )
        return self._to_list(ids)

    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Errors = "strict",
        threads: int = 1,
    ) -> IdArray:
        """Encode a text like :meth:`encode`, but return a NumPy array.

        Returns: ids ``[n]``, uint16 if ``vocab_size`` is at most 65,536, otherwise uint32.
        """
        if not isinstance(text, str | bytes):
            raise TypeError(f"encode takes str or bytes, not {type(text).__name__}")
        spans: Spans = []
        if allowed_special or disallowed_special or self._added_tokens:
            text = to_utf8(text)
            spans = self._find_tokens(text, allowed_special, disallowed_special)
        return self._encode(text, spans, errors, threads)

    def encode_with_offsets(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
    ) -> tuple[IdArray, NDArray[np.int64]]:
        """Encode a text like :meth:`encode_to_numpy`, and return the position of each token in it.

        Returns: ids ``[n]``, and offsets ``[n, 2]`` with the start and the end (exclusive) of each
            token, in bytes if the text is bytes and in characters if it is a str. A character that
            is split into several tokens is within the offsets of each of them.
        """
        ids = self.encode_to_numpy(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        sizes = self._token_sizes[ids]  # [n], in bytes
        ends = np.cumsum(sizes)
        offsets = np.stack([ends - sizes, ends], axis=1)
        return ids, offsets if isinstance(text, bytes) else _in_characters(offsets, text)

    def count(self, text: str | bytes, **options: Unpack[EncodeOptions]) -> int:
        """Return the number of ids that :meth:`encode` returns for a text."""
        return len(self.encode_to_numpy(text, **options))

    def encode_batch(
        self, texts: Iterable[str | bytes], *, threads: int = 1, **options: Unpack[EncodeOptions]
    ) -> list[list[int]]:
        """Return the token ids of each text; see :meth:`encode`.

        threads: number of texts to encode in parallel.
        """
        if isinstance(texts, str | bytes):
            raise TypeError("encode_batch takes a list of texts: pass [text], or use encode")
        encode = partial(self.encode, **options)
        return list(map(encode, texts) if threads == 1 else map_in_order(encode, texts, threads))

    def decode(self, ids: TokenIds, errors: str = "replace") -> str:
        """Return the text of a sequence of ids.

        Args:
            ids: an iterable of integers, a one-dimensional array or a one-dimensional tensor.
            errors: how to handle bytes that are not valid UTF-8, for example if the ids end within
                a character; see :meth:`bytes.decode`. By default they become U+FFFD.

        Raises: IndexError for an id outside the vocabulary, TypeError for values that are not
            integers, ValueError for more than one dimension.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the concatenated bytes of the tokens; raises the errors of :meth:`decode`."""
        return self._decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which can be a part of a character."""
        return self.decode_bytes([token_id])

    def decode_batch(self, rows: Iterable[TokenIds]) -> list[str]:
        """Return the text of each sequence of ids."""
        return [self.decode(row) for row in rows]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids incrementally, yielding only complete characters.

        The joined pieces equal the result of :meth:`decode` for all ids.
        """
        decoder = StreamDecoder(self)
        for token_id in ids:
            if text := decoder.push([token_id]):
                yield text
        if text := decoder.finish():
            yield text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BaseTokenizer):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @abstractmethod
    def _encode(self, text: str | bytes, spans: Spans, errors: Errors, threads: int) -> IdArray:
        """Encode a text; `spans` are the special tokens in it, with positions in its bytes."""

    @abstractmethod
    def _decode(self, ids: TokenIds) -> bytes:
        """Return the concatenated bytes of the tokens."""

    @abstractmethod
    def _tokens(self) -> list[bytes]:
        """Return the bytes of each id."""

    @abstractmethod
    def _serialize(self) -> bytes:
        """Return bytes that determine the vocabulary; changing them changes all fingerprints."""

    @cached_property
    def _token_sizes(self) -> NDArray[np.int64]:
        """Number of bytes of each token: ``[vocab_size]``."""
        return np.array([len(token) for token in self._tokens()], np.int64)

    def _to_list(self, ids: IdArray) -> list[int]:
        numbers: list[int] = ids.tolist()
        return numbers

    def _find_tokens(self, data: bytes, allowed: Specials, disallowed: Specials) -> Spans:
        """Return the spans (begin, end, id) of added and allowed special tokens, as byte positions.

        Raises: ValueError if a disallowed special token is in the text.
        """
        names = _special_names(allowed, self._special_tokens)
        for name in sorted(_special_names(disallowed, self._special_tokens) - names):
            if (at := data.find(name.encode())) >= 0:
                raise ValueError(
                    f"the text contains the special token {name!r} at byte {at}: remove it, or "
                    "pass allowed_special to encode it as that token"
                )
        ids = {name: self._special_tokens[name] for name in names} | self._added_tokens
        if not ids:
            return []
        longest_first = sorted((name.encode() for name in ids), key=len, reverse=True)
        pattern = re.compile(b"|".join(map(re.escape, longest_first)))
        return [(*match.span(), ids[match[0].decode()]) for match in pattern.finditer(data)]


class StreamDecoder:
    """Decodes ids incrementally, buffering the bytes of incomplete characters.

    >>> decoder = StreamDecoder(Tokenizer.gpt2())
    >>> [decoder.push(i) for i in (15496, 10263, 248, 115)], decoder.finish()
    (['Hello', ' ', '', '嚷'], '')
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | TokenIds) -> str:
        """Add one id or several, and return the characters that are now complete.

        Raises: the errors of :meth:`BaseTokenizer.decode`; the state is unchanged in this case.
        """
        row = [int(ids)] if isinstance(ids, (int, np.integer)) else ids
        return self._decoder.decode(self._tokenizer.decode_bytes(row))

    def finish(self) -> str:
        """Return U+FFFD for buffered bytes, or an empty string if there are none, and reset."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write a JSON file, or ``tokenizer.json`` in an existing folder, atomically."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_ids(ids: TokenIds, vocab_size: int) -> NDArray[np.uint32]:
    """Return the ids ``[n]`` as an array, or raise an error that names the first invalid one."""
    if hasattr(ids, "detach"):  # a tensor, perhaps on a GPU
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1:
            raise ValueError(
                f"decode takes one sequence of ids, not an array of shape {ids.shape}: pass one "
                "row, for example ids[0], or use decode_batch"
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
            return TypeError(f"token ids must be integers, not {token_id!r} (at position {at})")
        if not 0 <= index(token_id) < vocab_size:
            return IndexError(
                f"token id {token_id} at position {at} is out of range: this vocabulary has the "
                f"ids 0 to {vocab_size - 1}"
            )
    raise AssertionError("all ids are valid")


def to_utf8(text: str | bytes) -> bytes:
    """Encode a str as UTF-8, replacing lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise TypeError(f"encode takes str or bytes, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Via UTF-16, which also joins surrogate pairs into one character.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _in_characters(offsets: NDArray[np.int64], text: str) -> NDArray[np.int64]:
    """Convert offsets in the UTF-8 bytes of a text into offsets in its characters."""
    data = np.frombuffer(to_utf8(text), np.uint8)
    if len(data) == len(text):
        return offsets
    # UTF-8 continuation bytes are 0b10xxxxxx; every other byte begins a character.
    continues = np.append(data & 0xC0 == 0x80, False)
    begun = np.append(0, np.cumsum(~continues))  # number of characters that begin before each byte
    starts, ends = offsets.T
    # A start within a character is moved back to its beginning; an end, forward to its end.
    result: NDArray[np.int64] = np.stack([begun[starts] - continues[starts], begun[ends]], axis=1)
    if begun[-2] == len(text):
        return result
    # to_utf8 joined surrogate pairs into one character, but the str has two: count in the str.
    pairs = re.compile("[\ud800-\udbff][\udc00-\udfff]|.", re.DOTALL)
    begins = np.array([*(match.start() for match in pairs.finditer(text)), len(text)], np.int64)
    return np.take(begins, result)


def _special_names(names: Specials, known: Mapping[str, int]) -> set[str]:
    if names == "all":
        return set(known)
    if isinstance(names, str):
        raise TypeError(f"special tokens must be a set of names or 'all', not the str {names!r}")
    if unknown := sorted(set(names) - set(known)):
        has = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"{unknown[0]!r} is not a special token of this tokenizer; it has: {has}")
    return set(names)
