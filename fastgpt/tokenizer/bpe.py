"""Byte-level BPE tokenizers as in GPT-2, and character-level tokenizers.

>>> tokenizer = Tokenizer.gpt2()
>>> tokenizer.encode("Hello world")
[15496, 995]
>>> tokenizer.decode([15496, 995])
'Hello world'

Both classes implement the interface of :class:`BaseTokenizer`; :func:`load_tokenizer` reads either.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import permutations
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastgpt.tokenizer.tiktoken_ranks import read_rank_file, to_rank_file, to_ranks
from fastgpt.tokenizer.vocabulary_files import (
    END_OF_TEXT,
    GPT2_PATTERNS,
    IDS_FILE,
    Vocabulary,
    naming,
    read_characters,
    read_hugging_face,
    read_json,
    read_merges,
    to_hugging_face,
    to_merges,
)
from fastgpt.utils.extension import _C
from fastgpt.utils.threads import map_in_order

if TYPE_CHECKING:
    import tiktoken
    import torch

TokenIds: TypeAlias = "Iterable[int] | NDArray[np.integer[Any]] | torch.Tensor"
IdArray: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
Specials: TypeAlias = "Iterable[str] | Literal['all']"
PathLike: TypeAlias = str | Path

GPT2_MERGES = Path(__file__).parents[1] / "assets" / "vocab.bpe"
FILE_NAME = "tokenizer.json"
MOST_THREADS = 1024  # for one text; more threads would only contend with each other


class BaseTokenizer(ABC):
    """The interface of all tokenizers. They are immutable and can be shared between threads."""

    @abstractmethod
    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
        threads: int = 1,
    ) -> IdArray:
        """Encode a text like :meth:`encode`, but return a NumPy array.

        Returns: ids ``[n]``, uint16 if ``vocab_size`` is at most 65,536, otherwise uint32.
        """

    @abstractmethod
    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the concatenated bytes of the tokens; raises the errors of :meth:`decode`."""

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        special_tokens: Mapping[str, int] | Iterable[str] | None = None,
    ) -> Self:
        """Load a tokenizer of this class; see :func:`load_tokenizer`.

        Raises: the errors of :func:`load_tokenizer`, and ValueError for another class of tokenizer.
        """
        tokenizer = load_tokenizer(path, special_tokens=special_tokens)
        if not isinstance(tokenizer, cls):
            found = type(tokenizer).__name__
            raise ValueError(f"{path} contains a {found}, not a {cls.__name__}: use load_tokenizer")
        return tokenizer

    @abstractmethod
    def save(self, path: PathLike) -> None:
        """Save the tokenizer to a file, or as ``tokenizer.json`` in an existing folder."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size of the vocabulary; the ids are 0 to ``vocab_size - 1``."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, mapped to their ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of everything that determines the ids; the same for equal ones."""

    @property
    @abstractmethod
    def _token_sizes(self) -> NDArray[np.int64]:
        """Number of bytes of each token: ``[vocab_size]``."""

    @property
    def eot_token(self) -> int | None:
        """The id of ``<|endoftext|>``, which ends a document, or None without such a token."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def start_token(self) -> int:
        """The id that replaces an empty prompt: ``<|endoftext|>``, else a newline, else id 0."""
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
        threads: int = 1,
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: a str, in which lone surrogates are treated as U+FFFD, or UTF-8 bytes.
            allowed_special: special tokens, or ``"all"``, whose occurrences in the text are
                encoded as their ids. Other special tokens in the text are encoded as ordinary
                text, so that untrusted text cannot inject them.
            disallowed_special: special tokens, or ``"all"``, whose presence in the text is an
                error, unless they are in `allowed_special`.
            errors: how to handle characters that are not in the vocabulary: ``"strict"`` raises
                ValueError, ``"ignore"`` drops them. A byte-level vocabulary has all characters.
            threads: maximum number of threads for a long text; it does not affect the ids.

        Raises: ValueError for an unknown character or a disallowed special token.
        """
        return self._to_list(
            self.encode_to_numpy(
                text,
                allowed_special=allowed_special,
                disallowed_special=disallowed_special,
                errors=errors,
                threads=threads,
            )
        )

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

    def count(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
    ) -> int:
        """Return the number of ids that :meth:`encode` returns for a text."""
        return len(
            self.encode_to_numpy(
                text, allowed_special=allowed_special, disallowed_special=disallowed_special
            )
        )

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
        threads: int = 1,
    ) -> list[list[int]]:
        """Return the token ids of each text; see :meth:`encode`.

        threads: number of texts to encode in parallel.
        """
        encode = partial(
            self.encode,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            errors=errors,
        )
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

    def _to_list(self, ids: IdArray) -> list[int]:
        numbers: list[int] = ids.tolist()
        return numbers

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which can be a part of a character."""
        return self.decode_bytes([token_id])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BaseTokenizer):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class Tokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer as in GPT-2 (Radford et al., 2019), implemented in C++.

    Args:
        tokens: the bytes of each id; they must include all 256 single bytes.
        merges: rows ``[n, 3]`` of ids (left, right, merged), in order of decreasing priority.
        special_tokens: names and ids of the special tokens. Their bytes in `tokens` must be their
            names.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: NDArray[np.integer[Any]] | Sequence[tuple[int, int, int]],
        special_tokens: Mapping[str, int],
    ) -> None:
        rows = np.asarray(merges).reshape(-1, 3)
        if rows.size and (rows.dtype.kind not in "iu" or not 0 <= rows.min() <= rows.max() < 2**32):
            raise ValueError("merges must be rows of three ids: non-negative integers below 2**32")
        rows = rows.astype(np.uint32)
        for name, token_id in special_tokens.items():
            if not 0 <= token_id < len(tokens) or tokens[token_id] != name.encode():
                raise ValueError(f"special token {name!r} is not the token of its id {token_id}")
        self._encoder = _C.BytePairEncoder(tokens, rows)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def _of(cls, encoder: _C.BytePairEncoder, special_tokens: dict[str, int]) -> Self:
        tokenizer = cls.__new__(cls)
        tokenizer._encoder = encoder
        tokenizer._special_tokens = special_tokens
        return tokenizer

    @staticmethod
    def gpt2() -> Tokenizer:
        """Return GPT-2's tokenizer, built from the merges included in the package."""
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
        """Train a tokenizer on text, as in Sennrich et al. (2016) and GPT-2.

        The most frequent pair of adjacent tokens is merged into a new token, repeatedly. Of equally
        frequent pairs, the one with the smallest ids is merged. The merges are those of Hugging
        Face's ``BpeTrainer`` with ``ByteLevel`` pre-tokenization. Memory use grows with the number
        of distinct words of the text, not with its length.

        Args:
            source: the path of a file (str or Path), or an iterable of texts (str or bytes) and
                files (Path). To train on one text, pass a list with one str. Files are UTF-8, are
                decompressed if their name ends with ``.gz``, and are read in blocks. Special tokens
                in the text are treated as ordinary text.
            vocab_size: size of the vocabulary: the 256 bytes in GPT-2's order, one token per merge,
                and the special tokens. The result is smaller if there are no more pairs to merge.
            special_tokens: names such as ``<|endoftext|>``. They must not be a single piece of
                GPT-2's pre-tokenization pattern, so that merges cannot produce them.
            min_frequency: minimum number of occurrences of a pair that is merged.
            threads: number of threads that count words; it does not affect the vocabulary.
            progress: show a progress bar, if the output is a terminal.

        Raises: ValueError if `vocab_size` is too small, a special token is invalid, or there is no
            text; UsageError for a file that is not UTF-8 or cannot be read.
        """
        from fastgpt.tokenizer.training import learn_vocabulary  # avoids a circular import

        return Tokenizer(
            *learn_vocabulary(source, vocab_size, special_tokens, min_frequency, threads, progress)
        )

    def save(self, path: PathLike) -> None:
        """Save the tokenizer. The file name determines the format.

        - a name ending with ``.json``, or a folder: Hugging Face's ``tokenizer.json``, which can
          represent any tokenizer whose tokens have distinct names;
        - ``vocab.bpe`` or ``merges.txt``: OpenAI's merges, and a second file with the ids in the
          same folder, ``encoder.json`` or ``vocab.json``;
        - a name ending with ``.tiktoken``: tiktoken's ranks, without the special tokens.

        :func:`load_tokenizer` reads all of these formats.

        Raises: ValueError for other names, or if the format cannot represent this tokenizer.
        """
        path = Path(path)
        if path.suffix == ".tiktoken":
            path.write_bytes(to_rank_file(self.vocabulary))
        elif path.name in IDS_FILE:
            merges, ids = to_merges(self.vocabulary)
            path.write_bytes(merges.encode())
            _write_json(path.with_name(IDS_FILE[path.name]), ids)
        elif path.suffix == ".json" or path.is_dir():
            _write_json(path, to_hugging_face(self.vocabulary))
        else:
            raise ValueError(
                f"{path}: name the file *.json, *.tiktoken, {' or '.join(IDS_FILE)}, or give a "
                "folder that exists"
            )

    def to_tiktoken(self, name: str = "fastgpt") -> tiktoken.Encoding:
        """Return an equivalent ``tiktoken.Encoding``.

        Raises: ImportError if tiktoken is not installed; ValueError if tiktoken cannot produce the
            same ids, because the order of the merges differs from that of their ids, or a special
            token is a prefix of another one.
        """
        for short, long in permutations(self._special_tokens, 2):
            if long.startswith(short):
                raise ValueError(f"tiktoken would match {short!r} where a text contains {long!r}")
        try:
            import tiktoken
        except ImportError:
            raise ImportError("tiktoken is not installed: pip install tiktoken") from None
        return tiktoken.Encoding(
            name,
            pat_str=GPT2_PATTERNS[-1],
            mergeable_ranks=to_ranks(self.vocabulary),
            special_tokens=self._special_tokens,
        )

    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
        threads: int = 1,
    ) -> IdArray:
        """Encode a text like :meth:`encode`, but return a NumPy array.

        A byte that is not part of valid UTF-8 is treated as a punctuation mark, and is preserved by
        decoding.

        Returns: ids ``[n]``, uint16 if ``vocab_size`` is at most 65,536, otherwise uint32.
        """
        if not isinstance(text, str | bytes):
            raise TypeError(f"encode takes str or bytes, not {type(text).__name__}")
        threads = index(threads)
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        threads = min(threads, MOST_THREADS)
        spans: list[tuple[int, int, int]] = []
        if allowed_special or disallowed_special:
            text = _utf8(text)
            spans = self._special_spans(text, allowed_special, disallowed_special)
        try:
            return self._encoder.encode(text, spans, threads)
        except UnicodeEncodeError:  # lone surrogates
            return self._encoder.encode(_utf8(text), spans, threads)

    def _to_list(self, ids: IdArray) -> list[int]:
        return self._encoder.to_list(ids)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the concatenated bytes of the tokens; raises the errors of :meth:`decode`."""
        data = self._encoder.decode(ids)
        if data is None:  # another type of sequence, or invalid ids
            data = self._encoder.decode(_check_ids(ids, self.vocab_size))
            assert data is not None
        return data

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, including special tokens."""
        return len(self._encoder)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, mapped to their ids."""
        return dict(self._special_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the tokens, the merges and the special tokens."""
        tokens, merges, special_tokens = self.vocabulary
        digest = hashlib.sha256(b"fastgpt-bpe 1\n")
        digest.update(b"".join(len(token).to_bytes(4, "little") + token for token in tokens))
        digest.update(merges.astype("<u4").tobytes())
        digest.update(json.dumps(special_tokens, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def _token_sizes(self) -> NDArray[np.int64]:
        """Number of bytes of each token: ``[vocab_size]``."""
        return np.array([len(token) for token in self._encoder.tokens()], np.int64)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens, merges and special tokens, which are the arguments of an equal tokenizer."""
        return Vocabulary(self._encoder.tokens(), self._encoder.merges(), self._special_tokens)

    def _special_spans(
        self, data: bytes, allowed: Specials, disallowed: Specials
    ) -> list[tuple[int, int, int]]:
        """Return the spans (begin, end, id) of the allowed special tokens, as byte positions.

        Raises: ValueError if a disallowed special token is in the text.
        """
        names = _special_names(allowed, self._special_tokens)
        for name in sorted(_special_names(disallowed, self._special_tokens) - names):
            if (at := data.find(name.encode())) >= 0:
                raise ValueError(
                    f"the text contains the special token {name!r} at byte {at}: remove it, or "
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
        return Tokenizer, tuple(self.vocabulary)


class CharTokenizer(BaseTokenizer):
    """A tokenizer with one id for each of a fixed set of characters, in the given order.

    Raises: ValueError if there are no characters, or one is repeated or a lone surrogate.
    """

    def __init__(self, characters: str | Iterable[str]) -> None:
        self._characters = "".join(characters)
        if not self._characters:
            raise ValueError("a CharTokenizer needs at least one character")
        self._code_points = _code_points(self._characters)  # [vocab_size], by id
        # Ids by code point; -1 for others, and for one extra entry at the end (encode_to_numpy).
        self._ids = np.full(int(self._code_points.max()) + 2, -1, np.int32)
        for token_id, (char, point) in enumerate(
            zip(self._characters, self._code_points, strict=True)
        ):
            if 0xD800 <= point <= 0xDFFF:
                raise ValueError(f"{char!r} is half a surrogate pair, not a character")
            if self._ids[point] >= 0:
                raise ValueError(f"character {char!r} occurs twice in the vocabulary")
            self._ids[point] = token_id

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer of the characters of a text, sorted by code point."""
        return cls(sorted(set(_utf8(text).decode())))

    def save(self, path: PathLike) -> None:
        """Save the characters as JSON, to a file or as ``tokenizer.json`` in an existing folder."""
        _write_json(path, {"type": "fastgpt-char", "version": 1, "characters": self._characters})

    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Specials = frozenset(),
        disallowed_special: Specials = frozenset(),
        errors: Literal["strict", "ignore"] = "strict",
        threads: int = 1,
    ) -> IdArray:
        """Encode a text like :meth:`encode`, but return a NumPy array.

        Returns: ids ``[n]``, uint16 if ``vocab_size`` is at most 65,536, otherwise uint32.

        Raises: ValueError that names the first character without an id and its position, unless
            ``errors`` is "ignore"; UnicodeDecodeError for bytes that are not UTF-8.
        """
        for names in (allowed_special, disallowed_special):
            _special_names(names, {})
        text = _utf8(text).decode()
        points = _code_points(text)
        # The last entry of the table is -1; larger code points are clamped to it.
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = ids < 0
        if unknown.any():
            if errors != "ignore":
                raise self._unknown_character(text, int(unknown.argmax()))
            ids = ids[~unknown]
        return ids.astype(np.uint16) if self.vocab_size <= 1 << 16 else ids.astype(np.uint32)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the UTF-8 bytes of the characters; raises the errors of :meth:`decode`."""
        points = self._code_points[_check_ids(ids, self.vocab_size)]
        return points.tobytes().decode("utf-32-le").encode()

    @property
    def characters(self) -> str:
        """The characters, in the order of their ids."""
        return self._characters

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self._characters)

    @property
    def special_tokens(self) -> dict[str, int]:
        """An empty dict: a character vocabulary has no special tokens."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the characters."""
        return hashlib.sha256(b"fastgpt-char 1\n" + self._characters.encode()).hexdigest()

    @cached_property
    def _token_sizes(self) -> NDArray[np.int64]:
        """Number of UTF-8 bytes of each character: ``[vocab_size]``."""
        limits = np.array([0x80, 0x800, 0x10000], np.uint32)  # first code points of 2, 3, 4 bytes
        return 1 + np.searchsorted(limits, self._code_points, side="right")

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


def load_tokenizer(
    path: PathLike, *, special_tokens: Mapping[str, int] | Iterable[str] | None = None
) -> BaseTokenizer:
    """Load a tokenizer of either class from a file, or from a folder that contains such files.

    The supported formats are:

    - ``tokenizer.json``, or any name ending with ``.json``: written by :meth:`BaseTokenizer.save`,
      :meth:`GPT.save_pretrained <fastgpt.GPT.save_pretrained>`, or Hugging Face's tokenizers for a
      byte-level BPE with GPT-2's pre-tokenization;
    - ``vocab.bpe`` (``merges.txt`` in Hugging Face): OpenAI's format. The ids are read from
      ``encoder.json`` (``vocab.json``) in the same folder. Without this file, the ids are those of
      the 256 bytes in GPT-2's order, the merges in their order, and ``<|endoftext|>``;
    - ``*.tiktoken``: tiktoken's ranks, without special tokens and without a pre-tokenization
      pattern. fastgpt uses GPT-2's pattern, which is correct for r50k_base, but not for cl100k_base
      and later encodings.

    Args:
        path: the file or folder.
        special_tokens: for ``*.tiktoken`` only: the names of the special tokens, in the order of
            their ids, which follow those of the file, or a mapping of names to these ids. By
            default only ``<|endoftext|>``.

    Raises: ValueError that names the position of an error in the file, or an unsupported setting;
        FileNotFoundError.
    """
    path = Path(path)
    if path.suffix == ".tiktoken":
        return _from_vocabulary(path, read_rank_file(path, special_tokens))
    if special_tokens is not None:
        raise ValueError(
            f"{path}: special_tokens can only be given for *.tiktoken; other files have their own"
        )
    if path.is_dir():
        return _load_folder(path)
    if path.suffix != ".json":
        return _from_merges(path)
    data = read_json(path)
    if "type" in data:
        return _from_char_json(path, data)
    if (characters := read_characters(path, data)) is not None:
        return CharTokenizer(characters)
    return _from_vocabulary(path, read_hugging_face(path, data))


def _load_folder(folder: Path) -> BaseTokenizer:
    if (folder / FILE_NAME).exists():
        return load_tokenizer(folder / FILE_NAME)
    for merges in IDS_FILE:
        if (folder / merges).exists():
            return _from_merges(folder / merges)
    raise FileNotFoundError(f"{folder} contains no tokenizer: neither {FILE_NAME} nor vocab.bpe")


def _from_merges(path: Path) -> Tokenizer:
    ids_path = path.with_name(IDS_FILE.get(path.name, path.name))
    given = ids_path != path and ids_path.exists()
    return _from_vocabulary(path, read_merges(path, ids_path if given else None))


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
    # trusted: encoding the bytes of any token of this file gives that token (tested), so the check
    # of this at construction is skipped to save time.
    encoder = _C.BytePairEncoder.from_merges_file(
        GPT2_MERGES.read_bytes(), [END_OF_TEXT.encode()], trusted=True
    )
    return Tokenizer._of(encoder, {END_OF_TEXT: len(encoder) - 1})


def _write_json(path: PathLike, data: dict[str, Any]) -> None:
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    file.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _check_ids(ids: TokenIds, vocab_size: int) -> NDArray[np.uint32]:
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


def _utf8(text: str | bytes) -> bytes:
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


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _in_characters(offsets: NDArray[np.int64], text: str) -> NDArray[np.int64]:
    """Convert offsets in the UTF-8 bytes of a text into offsets in its characters."""
    data = np.frombuffer(_utf8(text), np.uint8)
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
    # _utf8 joined surrogate pairs into one character, but the str has two: count in the str.
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
