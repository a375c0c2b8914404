"""`python -m fastgpt.convert SOURCE --to hf --out FOLDER`: take a model to another tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastgpt import cli
from fastgpt.errors import UsageError

if TYPE_CHECKING:
    from fastgpt.interop.foreign import Foreign
    from fastgpt.model import GPT
    from fastgpt.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Options:
    """Write a model in another tool's format, and check what was written by reading it back."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder (runs/latest is the newest one), another project's model, or a name on the
    Hugging Face hub."""
    to: Literal["hf"]
    """hf: a folder for Hugging Face's transformers."""
    out: Path
    """What to make."""


def main(args: Sequence[str]) -> None:
    """Convert, and say what came of it and how to use it."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.convert")
    for line in convert(options.source, options.to, options.out):
        print(line)


def convert(source: str | Path, to: Literal["hf"], out: Path) -> list[str]:
    """Write the model of a source at `out`, in a format; return what there is to say of it.

    UsageError if the source cannot be read, if the format cannot hold it, if there is something at
    `out` already, or if what was written is not what was to be.
    """
    from fastgpt.interop import hugging_face, load, open_source
    from fastgpt.interop.foreign import NoTokenizerError

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} is there already; give another --out")
    notes: list[str] = []
    tokenizer: BaseTokenizer | None
    try:
        model, tokenizer = load(source)
    except NoTokenizerError as error:
        model, tokenizer = open_source(source).load_model(), None
        notes.append(f"without a tokenizer: {error}")
    hugging_face.write(model, out, tokenizer)
    refuse_unequal(out, hugging_face.read(out), model, tokenizer)
    return [
        *notes,
        f"wrote {out}; read back, it is equal",
        f"use it:  transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})",
    ]


def refuse_unequal(
    path: Path, written: Foreign, model: GPT, tokenizer: BaseTokenizer | None
) -> None:
    """Raise UsageError unless what was written is the model, to the bit, and the tokenizer.

    Biases that the model does not have must be zeros there.
    """
    import torch

    expected = model.state_dict()
    unequal = [f"{name} is missing" for name in expected if name not in written.tensors]
    for name, tensor in written.tensors.items():
        found = tensor.read()
        like = expected[name].cpu() if name in expected else torch.zeros_like(found)
        if not torch.equal(found, like):
            unequal.append(f"{name} differs")
    wanted = replace(model.config, bias=written.config.bias)
    unequal += [f"the settings are {written.config}"] if written.config != wanted else []
    if tokenizer is not None and written.read_tokenizer() != tokenizer:
        unequal.append("the tokenizer differs")
    if unequal:
        raise UsageError(f"{path} is not what was written: {'; '.join(unequal)}; is the disk good?")


if __name__ == "__main__":
    cli.run(main)
