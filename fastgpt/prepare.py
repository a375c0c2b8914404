"""`python -m fastgpt.prepare my.txt --out data/my`: tokenize texts into shards to train on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastgpt.utils import cli
from fastgpt.utils.progress import plural

if TYPE_CHECKING:
    from fastgpt.data.pipeline import Prepared

SKIPPED_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Tokenize texts into a folder of shards, to train on with --data FOLDER."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Text files, JSON (lines, or a list of texts), parquet, folders of such files (of which .json
    is skipped), and "-" for standard input. Compressed text and JSON are decompressed. A text file
    is one document, unless lines of <|endoftext|> separate documents."""
    out: Path
    """Folder to create, for example data/my."""
    tokenizer: str = "gpt2"
    """GPT-2's tokenizer ("gpt2"), or the file or folder of another one."""
    train_vocab: int | None = None
    """Instead, train a tokenizer with a vocabulary of this size on these texts."""
    field: str = "text"
    """Field of JSON objects and column of parquet tables that holds the text."""
    skip_invalid: bool = False
    """Skip and count rows and JSON objects without a text, which are an error otherwise."""
    val: tuple[Path, ...] = ()
    """Texts for validation; all inputs are then used for training."""
    val_fraction: float = 0.01
    """Without --val, the fraction of the documents used for validation; if there are few documents,
    the last part of the text."""
    tokens_per_shard: int = 100_000_000
    """Maximum number of tokens per shard."""
    threads: int | None = None
    """Number of tokenizer threads; by default one per CPU."""
    overwrite: bool = False
    """Replace the folder if it was prepared before."""


def main(args: Sequence[str]) -> None:
    """Prepare the texts; print a summary and the command that trains on them."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.prepare")
    from fastgpt.data.pipeline import prepare

    prepared = prepare(**vars(options))  # the fields are the arguments of this function
    for name, part in (("training", prepared.train), ("validation", prepared.val)):
        documents = plural(part.documents, "document")
        print(f"{name + ':':<12}{part.tokens:>16,} tokens, {documents}")
    vocab_size, asked = prepared.tokenizer.vocab_size, options.train_vocab
    print(f"{prepared.bytes_per_token:.2f} bytes of text per token, vocabulary of {vocab_size:,}")
    if asked is not None and vocab_size < asked:
        print(f"(fewer than the requested {asked:,}: the texts have no more pairs to merge)")
    _print_sources(prepared)
    print(f"train on it:  python -m fastgpt.train --data {shlex.quote(str(prepared.folder))}")


def _print_sources(prepared: Prepared) -> None:
    """Print the number of files, and which ones were skipped, if folders had to be searched."""
    n_files, skipped = len(prepared.sources), prepared.skipped
    if n_files > 1 or skipped:
        print(f"{plural(n_files, 'file')} read, {len(skipped):,} skipped")
    for path, reason in islice(skipped.items(), SKIPPED_SHOWN):
        print(f"  skipped {path}: {reason}")
    if len(skipped) > SKIPPED_SHOWN:
        print(f"  and {len(skipped) - SKIPPED_SHOWN:,} more, which meta.json lists")
    if prepared.invalid:
        print(f"{plural(prepared.invalid, 'row')} without a text skipped")


if __name__ == "__main__":
    cli.run(main)
