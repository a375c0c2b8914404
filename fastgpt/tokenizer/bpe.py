"""Byte-level BPE tokenizers as in GPT-2.

>>> tokenizer = Tokenizer.gpt2()
>>> tokenizer.encode("Hello world")
[15496, 995]
>>> tokenizer.decode([15496, 995])
'Hello world'
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import permutations
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from fastgpt.tokenizer.tiktoken_ranks import to_rank_file, to_ranks
from fastgpt.tokenizer.training import Source, learn_vocabulary
from fastgpt.tokenizer.vocabulary_files import (
    END_OF_TEXT,
    GPT2_PATTERNS,
    IDS_FILE,
    Vocabulary,
    to_hugging_face,
    to_merges,
)
from fastgpt.utils.extension import _C
from fastgpt.utils.files import atomic_file

if TYPE_CHECKING:
    import tiktoken

GPT2_MERGES = Path(__file__).parents[1] / "assets" / "vocab.bpe"
MOST_THREADS = 1024  # for one text; more threads would only contend with each other


class Tokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer as in GPT-2 (Radford et al., 2019), implemented in C++.

    A text is split into pieces by GPT-2's pre-tokenization pattern. Each piece starts as its bytes.
    The adjacent pair whose merge has the highest priority is merged, the leftmost one if there are
    several, until no pair has a merge. :mod:`fastgpt.tokenizer.reference` is the algorithm in
    Python.

    Args:
        tokens: the bytes of each id; they must include all 256 single bytes.
        merges: rows ``[n, 3]`` of ids (left, right, merged), in order of decreasing priority.
        special_tokens: names and ids of the special tokens. Their bytes in `tokens` must be their
            names.
        added_tokens: names and ids of further tokens that are found in every text.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: NDArray[np.integer[Any]] | Sequence[tuple[int, int, int]],
        special_tokens: Mapping[str, int],
        added_tokens: Mapping[str, int] = {},
    ) -> None:
        rows = np.asarray(merges).reshape(-1, 3)
        if rows.size and (rows.dtype.kind not in "iu" or not 0 <= rows.min() <= rows.max() < 2**32):
            raise ValueError("merges must be rows of three ids: non-negative integers below 2**32")
        rows = rows.astype(np.uint32)
        for kind, named in (("special", special_tokens), ("added", added_tokens)):
            for name, token_id in named.items():
                if not 0 <= token_id < len(tokens) or tokens[token_id] != name.encode():
                    raise ValueError(f"{kind} token {name!r} is not the token of its id {token_id}")
        self._set_encoder(_C.BytePairEncoder(tokens, rows), special_tokens, added_tokens)

    def _set_encoder(
        self,
        encoder: _C.BytePairEncoder,
        special_tokens: Mapping[str, int],
        added_tokens: Mapping[str, int] = {},
    ) -> None:
        super().__init__(len(encoder), special_tokens, added_tokens)
        self._encoder = encoder

    @staticmethod
    @cache
    def gpt2() -> Tokenizer:
        """Return GPT-2's tokenizer, built from the merges included in the package."""
        # trusted: encoding the bytes of any token of this file gives that token (tested), so the
        # check of this at construction is skipped to save time.
        encoder = _C.BytePairEncoder.from_merges_file(
            GPT2_MERGES.read_bytes(), [END_OF_TEXT.encode()], trusted=True
        )
        tokenizer = Tokenizer.__new__(Tokenizer)
        tokenizer._set_encoder(encoder, {END_OF_TEXT: len(encoder) - 1})
        return tokenizer

    @staticmethod
    def train(
        source: Source,
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
                files (Path, since a str is a text). To train on one text, pass a list with one str.
                Files are UTF-8 text, are decompressed if necessary, and are read in blocks. JSON
                and special tokens are treated as ordinary text.
            vocab_size: size of the vocabulary: the 256 bytes in GPT-2's order, one token per merge,
                and the special tokens. The result is smaller if there are no more pairs to merge,
                with a warning if it is less than half as large.
            special_tokens: names such as ``<|endoftext|>``. They must not be a single piece of
                GPT-2's pre-tokenization pattern, so that merges cannot produce them.
            min_frequency: minimum number of occurrences of a pair that is merged.
            threads: number of threads that count words; it does not affect the vocabulary.
            progress: show a progress bar, if the output is a terminal.

        Raises: ValueError if `vocab_size` is too small, a special token is invalid, there is no
            text, or a str in an iterable is the name of an existing file; UsageError for a file
            that is not UTF-8 or cannot be read.
        """
        return Tokenizer(
            *learn_vocabulary(source, vocab_size, special_tokens, min_frequency, threads, progress)
        )

    def save(self, path: str | Path) -> None:
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
            self._check_no_added_tokens(path.name)
            content = to_rank_file(self.vocabulary)
            with atomic_file(path) as file:
                file.write_bytes(content)
        elif path.name in IDS_FILE:
            self._check_no_added_tokens(path.name)
            merges, ids = to_merges(self.vocabulary)
            ids_path = path.with_name(IDS_FILE[path.name])
            with atomic_file(path) as file, atomic_file(ids_path) as ids_file:  # both or none
                file.write_bytes(merges.encode())
                write_json(ids_file, ids)
        elif path.suffix == ".json" or path.is_dir():
            write_json(path, to_hugging_face(self.vocabulary, self._added_tokens))
        else:
            raise ValueError(
                f"{path}: name the file *.json, *.tiktoken, {' or '.join(IDS_FILE)}, or give a "
                "folder that exists"
            )

    def to_tiktoken(self, name: str = "fastgpt") -> tiktoken.Encoding:
        """Return an equivalent ``tiktoken.Encoding``.

        Raises: ImportError if tiktoken is not installed; ValueError if tiktoken cannot produce the
            same ids, because the order of the merges differs from that of their ids, or a special
            token is a prefix of another one, or there are added tokens.
        """
        self._check_no_added_tokens("tiktoken")
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

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens, merges and special tokens, the first arguments of an equal tokenizer."""
        return Vocabulary(self._encoder.tokens(), self._encoder.merges(), self._special_tokens)

    def crop(self, size: int) -> Tokenizer:
        """Return the tokenizer without the special and added tokens from id `size` on.

        Returns the same tokenizer if any other token, or ``<|endoftext|>``, has such an id.
        """
        tokens, merges, special_tokens = self.vocabulary
        removable = {*special_tokens.values(), *self._added_tokens.values()} - {self.eot_token}
        if size >= len(tokens) or not removable.issuperset(range(size, len(tokens))):
            return self
        special_tokens = {name: i for name, i in special_tokens.items() if i < size}
        added_tokens = {name: i for name, i in self._added_tokens.items() if i < size}
        return Tokenizer(tokens[:size], merges, special_tokens, added_tokens)

    def _check_no_added_tokens(self, form: str) -> None:
        for name in self._added_tokens:
            raise ValueError(
                f"{form} cannot represent the added token {name!r}; save it as tokenizer.json"
            )

    def _encode(self, text: str | bytes, spans: Spans, errors: Errors, threads: int) -> IdArray:
        if index(threads) < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        threads = min(threads, MOST_THREADS)
        try:
            return self._encoder.encode(text, spans, threads)
        except UnicodeEncodeError:  # lone surrogates
            return self._encoder.encode(to_utf8(text), spans, threads)

    def _decode(self, ids: TokenIds) -> bytes:
        data = self._encoder.decode(ids)
        if data is None:  # another type of sequence, or invalid ids
            data = self._encoder.decode(check_ids(ids, self.vocab_size))
            assert data is not None
        return data

    def _tokens(self) -> list[bytes]:
        return self._encoder.tokens()

    def _serialize(self) -> bytes:
        tokens, merges, special_tokens = self.vocabulary
        content = b"".join(len(token).to_bytes(4, "little") + token for token in tokens)
        content += merges.astype("<u4").tobytes()
        content += json.dumps(special_tokens, sort_keys=True).encode()
        if self._added_tokens:
            content += json.dumps(self._added_tokens, sort_keys=True).encode()
        return b"fastgpt-bpe 1\n" + content

    def _to_list(self, ids: IdArray) -> list[int]:
        return self._encoder.to_list(ids)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self._special_tokens})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (*self.vocabulary, self._added_tokens)
