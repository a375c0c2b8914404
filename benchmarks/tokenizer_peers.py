"""Texts for the tokenizer benchmarks, and the tokenizers that fastgpt is compared with.

All tokenizers use GPT-2's vocabulary, created from the packaged merges: nothing is downloaded.
"""

import os
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read by `tokenizers` at import

import numpy as np
from numpy.typing import NDArray

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


def ours(threads: int = 1) -> Peer:
    """Return a new instance of fastgpt's tokenizer with an empty cache."""
    new = Tokenizer.gpt2.__wrapped__()  # without functools.cache, which returns one instance to all
    return Peer(partial(new.encode_to_numpy, threads=threads), new.decode, new.decode_bytes)


def ours_in_two_threads() -> Peer:
    """Return a new instance of fastgpt's tokenizer that encodes in two threads."""
    return ours(threads=2)


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


def tasks(peer: Peer, text: str, ids: NDArray[np.integer]) -> dict[str, Callable[[], Any]]:
    """Return the measured tasks, to be run in this order with a new tokenizer.

    "cold" encodes the first text of a tokenizer, "warm" the same text again.
    """
    as_list, as_array, decode_array = ids.tolist(), ids.astype(np.uint32), peer.decode_array
    found: dict[str, Callable[[], Any]] = {
        "cold": lambda: peer.encode(text),
        "warm": lambda: peer.encode(text),
        "decode a list": lambda: peer.decode(as_list),
    }
    if decode_array is not None:
        found["decode an array"] = lambda: decode_array(as_array)
    return found


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
