"""Import and export of GPT-2 models in the formats of other projects.

Import: `load` opens any source of a GPT-2 (a fastgpt run, another project's folder or file, or a
model name on the Hugging Face Hub) with its tokenizer; `GPT.from_pretrained` returns the model
alone. Export: `GPT.save_pretrained`, and `fastgpt.convert` for all export formats.

Each format has a module, whose docstring describes what it reads and writes, and any differences in
what the other project computes:

=================  ===  ===  ====================================================================
module             in   out
=================  ===  ===  ====================================================================
`run`              yes       a run folder of fastgpt
`hugging_face`     yes  yes  transformers: `config.json`, `model.safetensors`, `tokenizer.json`
`hub`              yes       the same, by a name on the Hugging Face Hub
`openai`           yes       OpenAI's release: a TensorFlow checkpoint, read without TensorFlow
`nanogpt`          yes  yes  nanoGPT: `ckpt.pt`, and `meta.pkl` for characters
`llmc`             yes       llm.c: `gpt2_124M.bin`, `model_00019560.bin`
`mingpt`           yes       minGPT: `model.pt` or `model.npz`, with `config.json`
`gguf`             yes  yes  llama.cpp: one file with model and tokenizer
=================  ===  ===  ====================================================================
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, get_args

import torch

from fastgpt.interop import gguf, hub, hugging_face, llmc, mingpt, nanogpt, openai, run
from fastgpt.interop.external import ExternalModel, LazyTensor
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils.errors import UsageError

Which: TypeAlias = Literal["best", "newest"]
Source: TypeAlias = run.Run | ExternalModel  # an opened model on disk


class Format(Protocol):
    """A module that reads one kind of source."""

    def recognizes(self, path: Path) -> bool:
        """Return whether a path has this format, judging by file names and first bytes."""

    def read(self, path: Path) -> Source:
        """Open a source; UsageError if it is invalid."""


# In the order in which the formats are tried on a path.
FORMATS: dict[str, Format] = {
    "a run folder of fastgpt": run,
    "a checkpoint of nanoGPT, or its folder (ckpt.pt)": nanogpt,
    "a file of llm.c (gpt2_124M.bin)": llmc,
    "a GGUF file of llama.cpp (model.gguf)": gguf,
    "a file of minGPT, or its folder (model.pt or model.npz)": mingpt,
    "a folder of Hugging Face's transformers (config.json, model.safetensors)": hugging_face,
    "OpenAI's release of GPT-2, or one like it (hparams.json, model.ckpt.index)": openai,
    "a name on the Hugging Face Hub (gpt2)": hub,
}


def open_source(source: str | Path, checkpoint: Which = "best") -> Source:
    """Open a model of any supported format.

    checkpoint: which checkpoint of a run to open.

    Raises: UsageError, with the list of supported formats, if the format is not recognized.
    """
    if checkpoint not in get_args(Which):
        raise UsageError(f"checkpoint must be best or newest, not {checkpoint!r}")
    path = Path(source)
    if run.recognizes(path):
        return run.read(path, checkpoint)
    for known in FORMATS.values():
        if known is hub and _is_a_path(str(source)):
            continue  # a mistyped local path must not be downloaded as a model of that name
        if known.recognizes(path):
            return known.read(path)
    what = "has no supported format" if path.exists() else "does not exist"
    raise UsageError(f"{path} {what}; give {'; or '.join(FORMATS)}")


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    ops: str = "auto",
    checkpoint: Which = "best",
) -> tuple[GPT, BaseTokenizer]:
    """Load a model in evaluation mode, and its tokenizer.

    Rows of the vocabulary beyond the tokenizer's (some projects pad to a round number) are removed,
    as the model could otherwise generate ids that cannot be decoded. checkpoint: which checkpoint
    of a run to load.

    Raises: UsageError if the source cannot be loaded, or if model and tokenizer do not match.
    """
    opened, tokenizer = _open_both(source, checkpoint)
    model = opened.load_model(device, ops)
    model.crop_vocabulary(tokenizer.vocab_size)
    return model, tokenizer


def open_weights(
    source: str | Path, checkpoint: Which = "best"
) -> tuple[GPTConfig, dict[str, LazyTensor], BaseTokenizer]:
    """Return the config, the lazily read weights, and the tokenizer of the model `load` returns."""
    opened, tokenizer = _open_both(source, checkpoint)
    size = tokenizer.vocab_size
    tensors = {
        name: tensor.first_rows(size) if name in ("wte.weight", "lm_head.weight") else tensor
        for name, tensor in opened.open_tensors().items()
    }
    return replace(opened.config, vocab_size=size), tensors, tokenizer


def _open_both(source: str | Path, checkpoint: Which) -> tuple[Source, BaseTokenizer]:
    """Open a source and its tokenizer; UsageError if they do not match."""
    opened = open_source(source, checkpoint)
    tokenizer = opened.read_tokenizer()
    if tokenizer.vocab_size > opened.config.vocab_size:
        raise UsageError(
            f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, but its model only "
            f"{opened.config.vocab_size:,}"
        )
    return opened, tokenizer


def _is_a_path(source: str) -> bool:
    """Return whether a name has the form of a local path, which no model name can have."""
    return source.startswith((".", "/", "~")) or source.endswith("/") or "\\" in source
