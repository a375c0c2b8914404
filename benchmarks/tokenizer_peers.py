"""Texts for the tokenizer benchmarks, and the tokenizers that fastgpt is compared with.

All tokenizers use GPT-2's vocabulary, created from the packaged merges: nothing is downloaded.
"""

import os
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read by `tokenizers` at import

import numpy as np
from numpy.typing import NDArray

from fastgpt import tokenizer as fastgpt_tokenizer
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.bpe import GPT2_MERGES

MANY_SCRIPTS = Path(__file__).parents[1] / "tests" / "assets" / "multilingual.txt"
CODE_CHARACTERS = 10_000_000


@dataclass(frozen=True)
class Peer:
    """The functions of a newly created tokenizer."""

    encode: Callable[[str], "NDArray[np.integer] | Sequence[int]"]  # to an array, if supported
    decode: Callable[[Sequence[int]], str | bytes]  # from a list
    decode_array: Callable[[NDArray[np.integer]], str | bytes] | None = None


def ours() -> Peer:
    """Return a new instance of fastgpt's tokenizer with an empty cache."""
    new = fastgpt_tokenizer._gpt2.__wrapped__()
    return Peer(new.encode_to_numpy, new.decode, new.decode_bytes)


def ours_in_two_threads() -> Peer:
    """Return a new instance of fastgpt's tokenizer that encodes in two threads."""
    new = fastgpt_tokenizer._gpt2.__wrapped__()
    return Peer(lambda text: new.encode_to_numpy(text, threads=2), new.decode, new.decode_bytes)


def tiktoken() -> Peer:
    """Return tiktoken's tokenizer, created from ranks in memory."""
    import tiktoken

    new = tiktoken.Encoding(**_tiktoken_arguments())
    return Peer(new.encode_to_numpy, new.decode)


def hugging_face() -> Peer:
    """Return the tokenizer of Hugging Face tokenizers, single-threaded."""
    import tokenizers

    new = tokenizers.Tokenizer.from_file(str(_tokenizer_json()))
    return Peer(lambda text: new.encode(text).ids, new.decode)


def gigatoken() -> Peer:
    """Return gigatoken's tokenizer, which encodes a single text in one thread."""
    import gigatoken

    new = gigatoken.Tokenizer(str(_tokenizer_json()))
    return Peer(new.encode, new.decode, new.decode)


def texts() -> dict[str, Callable[[], str]]:
    """Return a function that reads each text, by name: prose, code and many scripts.

    If the environment variable FASTGPT_BENCH_TEXT is set, the only text is the file that it names.
    """
    if path := os.environ.get("FASTGPT_BENCH_TEXT"):
        return {Path(path).stem: lambda: Path(path).read_text("utf-8")}
    return {"prose": _prose, "code": _code, "many_scripts": lambda: MANY_SCRIPTS.read_text("utf-8")}


def _prose() -> str:
    return GPT2_MERGES.with_name("tinyshakespeare.txt").read_text("utf-8")


def _code() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    own = (file for file in files if "site-packages" not in file.parts)
    return "\n".join(file.read_text("utf-8", "replace") for file in own)[:CODE_CHARACTERS]


@cache
def _tiktoken_arguments() -> dict:
    encoding = Tokenizer.gpt2().to_tiktoken()
    return {
        "name": encoding.name,
        "pat_str": encoding._pat_str,
        "mergeable_ranks": encoding._mergeable_ranks,
        "special_tokens": encoding._special_tokens,
    }


def _tokenizer_json() -> Path:
    path = Path(tempfile.gettempdir()) / f"fastgpt-bench-{Tokenizer.gpt2().fingerprint[:16]}.json"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.json")
        Tokenizer.gpt2().save(part)
        part.rename(path)
    return path
