"""`python -m fastgpt.convert SOURCE --to hf --out FOLDER`: export a model to another tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.interop.external import ExternalModel
    from fastgpt.model import GPT
    from fastgpt.tokenizer import BaseTokenizer


Kind: TypeAlias = Literal["hf", "gguf", "nanogpt"]
Precision: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]

# Maximum rounding error of each precision, relative to the largest absolute value of the row.
ROUNDING = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 254 + 2.0**-11}
USE = {
    "hf": "transformers.AutoModelForCausalLM.from_pretrained({!r})",
    "gguf": "llama-cli -m {}",
    "nanogpt": "python sample.py --out_dir={}",
}


@dataclass(frozen=True)
class Options:
    """Export a model to another tool's format, and verify the result by reading it back."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder (runs/latest is the newest one), another project's model, or a model name on
    the Hugging Face Hub."""
    to: Kind
    """hf: a folder for Hugging Face transformers; gguf: a file for llama.cpp; nanogpt: a folder
    with a ckpt.pt."""
    out: Path
    """The folder or file to create."""
    precision: Precision = "f32"
    """Precision of the matrices in a GGUF file: f32 is exact, f16 and bf16 take half the space,
    q8_0 a quarter."""


def main(args: Sequence[str]) -> None:
    """Convert a model, and print the result and how to use it."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.convert")
    for line in convert(options.source, options.to, options.out, options.precision):
        print(line)


def convert(source: str | Path, to: Kind, out: Path, precision: Precision = "f32") -> list[str]:
    """Export the model of `source` to `out` in a format; return the messages for the user.

    Raises: UsageError if the source cannot be read, if the format does not support the model, if
        `out` already exists, or if the written model differs from the source.
    """
    from fastgpt.interop import load, open_source
    from fastgpt.interop.external import NoTokenizerError

    if precision != "f32" and to != "gguf":
        raise UsageError(f"precision is for GGUF files only: {to} stores float32")
    # hidden files do not count: a process that was killed may have left one (`atomic_files`)
    if out.is_file() or (out.is_dir() and any(file.name[0] != "." for file in out.iterdir())):
        raise UsageError(f"{out} already exists; give another --out")
    notes: list[str] = []
    tokenizer: BaseTokenizer | None
    try:
        model, tokenizer = load(source)
    except NoTokenizerError as error:
        model, tokenizer = open_source(source).load_model(), None
        notes.append(f"without a tokenizer: {error}")
    check_written(out, _write(model, tokenizer, to, out, precision), model, tokenizer, precision)
    found = (
        "identical" if precision == "f32" else f"identical up to the rounding error of {precision}"
    )
    return [*notes, f"wrote {out}; read back: {found}", f"use it:  {USE[to].format(str(out))}"]


def _write(
    model: GPT, tokenizer: BaseTokenizer | None, to: Kind, out: Path, precision: Precision
) -> ExternalModel:
    """Write a model in a format, and open the result."""
    from fastgpt.interop import gguf, hugging_face, nanogpt

    if to == "gguf":
        gguf.write(model, out, tokenizer, precision)
        return gguf.read(out)
    if to == "nanogpt":
        nanogpt.write(model, out, tokenizer)
        return nanogpt.read(out)
    hugging_face.write(model, out, tokenizer)
    return hugging_face.read(out)


def check_written(
    path: Path,
    written: ExternalModel,
    model: GPT,
    tokenizer: BaseTokenizer | None,
    precision: Precision = "f32",
) -> None:
    """Raise UsageError unless a written model equals the original model and tokenizer.

    Weights must be equal, except for the rounding error of `precision`. Biases that the model does
    not have must be zero in the written model.
    """
    import torch

    expected = model.state_dict()
    unequal = [f"{name} is missing" for name in expected if name not in written.tensors]
    for name, tensor in written.tensors.items():
        found = tensor.read()
        like = expected[name].cpu() if name in expected else torch.zeros_like(found)
        if not _close(found, like, ROUNDING[precision]):
            unequal.append(f"{name} differs")
    # The formats give every model biases, and some do not store dropout.
    wanted = replace(model.config, bias=written.config.bias, dropout=written.config.dropout)
    unequal += [f"the settings are {written.config}"] if written.config != wanted else []
    if tokenizer is not None and written.read_tokenizer() != tokenizer:
        unequal.append("the tokenizer differs")
    if unequal:
        raise UsageError(
            f"{path} differs from what was written: {'; '.join(unequal)}; delete it, and check the "
            "disk"
        )


def _close(found: Tensor, expected: Tensor, rounding: float) -> bool:
    """Return whether two tensors are equal within a rounding error (see `ROUNDING`)."""
    if found.shape != expected.shape:
        return False
    largest = expected.abs().amax(-1, keepdim=True)
    return bool(((found - expected).abs() <= rounding * largest).all())


if __name__ == "__main__":
    cli.run(main)
