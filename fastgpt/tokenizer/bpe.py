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
MOST_THREADS = 1024  # for one text: more would only wait for each other


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
        threads: int = 1,
    ) -> IdArray:
        """Encode as :meth:`encode` does, into an array.

        Returns: ids ``[n]``, uint16 if ``vocab_size`` is at most 65,536, else uint32.
        """

    @abstractmethod
    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the bytes that the ids stand for; errors as in :meth:`decode`."""

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        special_tokens: Mapping[str, int] | Iterable[str] | None = None,
    ) -> Self:
        """Read a tokenizer of this class; see :func:`load_tokenizer`."""
        tokenizer = load_tokenizer(path, special_tokens=special_tokens)
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
    @abstractmethod
    def _token_sizes(self) -> NDArray[np.int64]:
        """How many bytes each id stands for: ``[vocab_size]``."""

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
        threads: int = 1,
    ) -> list[int]:
        """Return the ids of the text.

        Args:
            text: a str, in which lone surrogates count as U+FFFD, or UTF-8 bytes.
            allowed_special: special tokens that become their id where they stand in the text.
                All others are ordinary text, so that no user's text can forge one.
            disallowed_special: special tokens whose presence in the text is an error.
            errors: "ignore" leaves out characters that the vocabulary does not have, "strict"
                raises; a byte-level vocabulary has all.
            threads: how many may work at a long text; the ids are the same.

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
        """Encode as :meth:`encode_to_numpy` does, and say where in the text each id stands.

        Returns: ids ``[n]`` and offsets ``[n, 2]``, the start of each and the end (the start of
            what follows): in bytes if the text is bytes, in characters if it is a str. A character
            that several ids share lies within the offsets of each.
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
        """Return how many ids :meth:`encode` makes of the text."""
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
        """Return the ids of each text; see :meth:`encode`. `threads`: how many texts at once."""
        encode = partial(
            self.encode,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            errors=errors,
        )
        return list(map(encode, texts) if threads == 1 else map_in_order(encode, texts, threads))

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
        rows = np.asarray(merges).reshape(-1, 3)
        if rows.size and (rows.dtype.kind not in "iu" or not 0 <= rows.min() <= rows.max() < 2**32):
            raise ValueError("merges must be rows of three ids: whole numbers, none negative")
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
            source: the path of a file; or texts (str or bytes) and files (Path objects) one after
                the other, so that a list with one str is one text. Files are UTF-8, compressed
                if they end in ``.gz``, and read in blocks. What stands in the
                text as a special token counts as ordinary text.
            vocab_size: how many ids: 256 bytes in GPT-2's order, then a token for each merge, then
                the special tokens. It is smaller where the text holds no more pairs to merge.
            special_tokens: names such as ``<|endoftext|>``, which no merge can make.
            min_frequency: pairs that occur less often are not merged.
            threads: how many count words; their number changes nothing in the vocabulary.
            progress: show a bar, if the output is a terminal.

        Raises: ValueError for a vocabulary too small, special tokens that are not, or no text;
            UsageError for a file that is not UTF-8 or cannot be read.
        """
        from fastgpt.tokenizer.training import learn_vocabulary  # here, for it imports this module

        return Tokenizer(
            *learn_vocabulary(source, vocab_size, special_tokens, min_frequency, threads, progress)
        )

    def save(self, path: PathLike) -> None:
        """Write the tokenizer, in the format that the name says.

        - a name ending in ``.json``, or a folder: Hugging Face's ``tokenizer.json``, which holds
          any tokenizer;
        - ``vocab.bpe`` or ``merges.txt``: OpenAI's merges, and beside them the ids, in
          ``encoder.json`` or ``vocab.json``;
        - a name ending in ``.tiktoken``: tiktoken's ranks, without the special tokens.

        :func:`load_tokenizer` reads them all. Raises: ValueError for another name, or if the format
        cannot hold this tokenizer.
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
        """Return a ``tiktoken.Encoding`` that makes the same ids.

        Raises: ImportError without tiktoken; ValueError if it cannot make the same ids: because
            the order of merges is not that of ids, or a special token begins with another one.
        """
        for short, long in permutations(self._special_tokens, 2):
            if long.startswith(short):
                raise ValueError(f"tiktoken would find {short!r} where {long!r} stands in a text")
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
        """Encode as :meth:`encode` does, into an array of uint16 (65,536 ids or fewer) or uint32.

        A byte that is no part of valid UTF-8 counts as a punctuation mark, and decodes to itself.
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
        """Return the bytes that the ids stand for; errors as in :meth:`decode`."""
        data = self._encoder.decode(ids)
        if data is None:  # another kind of sequence, or wrong
            data = self._encoder.decode(_check_ids(ids, self.vocab_size))
            assert data is not None
        return data

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
        tokens, merges, special_tokens = self.vocabulary
        digest = hashlib.sha256(b"fastgpt-bpe 1\n")
        digest.update(b"".join(len(token).to_bytes(4, "little") + token for token in tokens))
        digest.update(merges.astype("<u4").tobytes())
        digest.update(json.dumps(special_tokens, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def _token_sizes(self) -> NDArray[np.int64]:
        """How many bytes each id stands for: ``[vocab_size]``."""
        return np.array([len(token) for token in self._encoder.tokens()], np.int64)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens, the merges and the special tokens: what makes an equal tokenizer."""
        return Vocabulary(self._encoder.tokens(), self._encoder.merges(), self._special_tokens)

    def _special_spans(
        self, data: bytes, allowed: Specials, disallowed: Specials
    ) -> list[tuple[int, int, int]]:
        """Find the special tokens in the text: first byte, byte after the last, id."""
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
        return Tokenizer, tuple(self.vocabulary)


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
        threads: int = 1,
    ) -> IdArray:
        """Encode as :meth:`encode` does, into an array of uint16 (65,536 ids or fewer) or uint32.

        Raises: ValueError that names the first character without an id and its position, unless
            ``errors`` is "ignore"; UnicodeDecodeError for bytes that are not UTF-8.
        """
        for names in (allowed_special, disallowed_special):
            _special_names(names, {})
        text = _utf8(text).decode()
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
    def characters(self) -> str:
        """The characters, by id."""
        return self._characters

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

    @cached_property
    def _token_sizes(self) -> NDArray[np.int64]:
        """How many bytes each character has in UTF-8: ``[vocab_size]``."""
        limits = np.array([0x80, 0x800, 0x10000], np.uint32)
        return 1 + np.searchsorted(limits, self._code_points, side="right")

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


class StreamDecoder:
    """Turns ids into text as they come, holding back characters that are not complete yet.

    >>> decoder = StreamDecoder(Tokenizer.gpt2())
    >>> [decoder.push(i) for i in (15496, 10263, 248, 115)], decoder.finish()
    (['Hello', ' ', '', '嚷'], '')
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | TokenIds) -> str:
        """Take one id, or several, and return the text that is complete now.

        Raises as :meth:`BaseTokenizer.decode` does; then nothing was taken.
        """
        row = [int(ids)] if isinstance(ids, (int, np.integer)) else ids
        return self._decoder.decode(self._tokenizer.decode_bytes(row))

    def finish(self) -> str:
        """Return U+FFFD for what is held back, if anything is, and begin anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def load_tokenizer(
    path: PathLike, *, special_tokens: Mapping[str, int] | Iterable[str] | None = None
) -> BaseTokenizer:
    """Read a tokenizer of either class from a file, or from a folder that holds such files.

    - ``tokenizer.json`` (or any name ending in ``.json``), as :meth:`BaseTokenizer.save` and
      :meth:`GPT.save_pretrained <fastgpt.GPT.save_pretrained>` write it, or Hugging Face's
      tokenizers do for a byte-level BPE that splits words as GPT-2 does;
    - ``vocab.bpe`` (Hugging Face: ``merges.txt``), OpenAI's format. Ids come from ``encoder.json``
      (``vocab.json``) in the same folder; without one they are the 256 bytes in GPT-2's order, the
      merges in theirs, and ``<|endoftext|>``;
    - ``*.tiktoken``, tiktoken's ranks. Such a file has no special tokens: `special_tokens` names
      them, in the order of their ids, which follow the file's (or maps names to those ids); by
      default it is ``<|endoftext|>`` alone. It says nothing of how to split words either, and
      fastgpt does as GPT-2 does: right for r50k_base, wrong for cl100k_base and later.

    Raises: ValueError that names the place in a malformed file, or what in it is not supported;
        FileNotFoundError.
    """
    path = Path(path)
    if path.suffix == ".tiktoken":
        return _from_vocabulary(path, read_rank_file(path, special_tokens))
    if special_tokens is not None:
        raise ValueError(f"{path}: special_tokens are for *.tiktoken; other files hold their own")
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
    raise FileNotFoundError(f"{folder} holds no tokenizer: neither {FILE_NAME} nor vocab.bpe")


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
    # Every token of this file is what its own bytes are encoded to (the tests hold it to that), so
    # that nobody need wait for it to be found out.
    encoder = _C.BytePairEncoder.from_merges_file(
        GPT2_MERGES.read_bytes(), [END_OF_TEXT.encode()], trusted=True
    )
    return Tokenizer._of(encoder, {END_OF_TEXT: len(encoder) - 1})


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


def _utf8(text: str | bytes) -> bytes:
    """Encode a str, with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise TypeError(f"encode takes str or bytes, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        # By way of UTF-16, which also joins two surrogates that make one character.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _in_characters(offsets: NDArray[np.int64], text: str) -> NDArray[np.int64]:
    """Turn offsets in the text's UTF-8 bytes into offsets in its characters."""
    data = np.frombuffer(_utf8(text), np.uint8)
    if len(data) == len(text):
        return offsets
    continues = np.append(data & 0xC0 == 0x80, False)  # whether a byte is not a character's first
    begun = np.append(0, np.cumsum(~continues))  # how many characters began before a byte
    starts, ends = offsets.T
    result: NDArray[np.int64] = np.stack([begun[starts] - continues[starts], begun[ends]], axis=1)
    if begun[-2] == len(text):
        return result
    # Two surrogates that stood for one character became that one.
    pairs = re.compile("[\ud800-\udbff][\udc00-\udfff]|.", re.DOTALL)
    begins = np.array([*(match.start() for match in pairs.finditer(text)), len(text)], np.int64)
    return np.take(begins, result)


def _special_names(names: Specials, known: Mapping[str, int]) -> set[str]:
    if names == "all":
        return set(known)
    if isinstance(names, str):
        raise TypeError(f"special tokens are given as a set or 'all', not as the str {names!r}")
    if unknown := sorted(set(names) - set(known)):
        has = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"{unknown[0]!r} is not a special token of this tokenizer; it has: {has}")
    return set(names)
