"""Other projects' GPT-2 models, in and out.

In: `load` opens whatever holds a GPT-2 (a run of our own, a folder or a file of another project, a
name on the Hugging Face hub) with its tokenizer; `GPT.from_pretrained` gives the model alone. Out:
`GPT.save_pretrained`, and `fastgpt.convert` for every format.

Each format has a module, which says what it reads and writes, and what differs in what is computed:

=================  ===  ===  ====================================================================
module             in   out
=================  ===  ===  ====================================================================
`run`              yes       a run folder of fastgpt
`hugging_face`     yes  yes  transformers: `config.json`, `model.safetensors`, `tokenizer.json`
`hub`              yes       the same, by a name on the Hugging Face hub
`openai`           yes       OpenAI's release: a TensorFlow checkpoint, read without TensorFlow
`nanogpt`          yes  yes  nanoGPT: `ckpt.pt`, and `meta.pkl` for characters
`llmc`             yes       llm.c: `gpt2_124M.bin`, `model_00019560.bin`
`mingpt`           yes       minGPT: `model.pt` or `model.npz`, with `config.json`
`gguf`             yes  yes  llama.cpp: one file with model and tokenizer
=================  ===  ===  ====================================================================
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, get_args

import torch

from fastgpt.interop import gguf, hub, hugging_face, llmc, mingpt, nanogpt, openai, run
from fastgpt.interop.foreign import LazyTensor
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils.errors import UsageError

Which: TypeAlias = Literal["best", "newest"]


class Source(Protocol):
    """A model on disk, opened."""

    def load_model(self, device: torch.device | str = "cpu", ops: str = "auto") -> GPT:
        """Return the model, for evaluation."""

    def open_tensors(self) -> Mapping[str, LazyTensor]:
        """Return its weights by our names, read when they are asked for."""

    @property
    def config(self) -> GPTConfig:
        """Its shape."""

    @property
    def read_tokenizer(self) -> Callable[[], BaseTokenizer]:
        """Returns its tokenizer; UsageError if nobody knows what the ids stand for."""


class Format(Protocol):
    """A module that reads one kind of source."""

    def recognises(self, path: Path) -> bool:
        """Tell whether a path is of this kind, by names and first bytes."""

    def read(self, path: Path) -> Source:
        """Open it; UsageError if it is not what it looks like."""


# In the order in which they are asked whether they know a path.
FORMATS: dict[str, Format] = {
    "a run folder of fastgpt": run,
    "a checkpoint of nanoGPT, or its folder (ckpt.pt)": nanogpt,
    "a file of llm.c (gpt2_124M.bin)": llmc,
    "a GGUF file of llama.cpp (model.gguf)": gguf,
    "a file of minGPT, or its folder (model.pt or model.npz)": mingpt,
    "a folder of Hugging Face's transformers (config.json, model.safetensors)": hugging_face,
    "OpenAI's release of GPT-2, or one like it (hparams.json, model.ckpt.index)": openai,
    "a name on the Hugging Face hub (gpt2)": hub,
}


def open_source(source: str | Path, checkpoint: Which = "best") -> Source:
    """Open a model, whatever made it; UsageError says what is understood.

    checkpoint: which one of a run.
    """
    if checkpoint not in get_args(Which):
        raise UsageError(f"checkpoint must be best or newest, not {checkpoint!r}")
    path = Path(source)
    if run.recognises(path):
        return run.read(path, checkpoint)
    for known in FORMATS.values():
        if known is hub and _is_a_path(str(source)):
            continue  # what was meant for a folder here must not become a stranger's model
        if known.recognises(path):
            return known.read(path)
    what = "none of what can be read" if path.exists() else "not there"
    raise UsageError(f"{path} is {what}; give {'; or '.join(FORMATS)}")


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    ops: str = "auto",
    checkpoint: Which = "best",
) -> tuple[GPT, BaseTokenizer]:
    """Return the model of a source, for evaluation, and its tokenizer.

    Rows of the vocabulary that no token of the tokenizer has (some pad it to a round number) are
    left out: the model could only write what nobody can decode. checkpoint: which one of a run.
    UsageError if model and tokenizer do not belong together.
    """
    opened, tokenizer = _open_both(source, checkpoint)
    model = opened.load_model(device, ops)
    model.crop_vocabulary(tokenizer.vocab_size)
    return model, tokenizer


def open_weights(
    source: str | Path, checkpoint: Which = "best"
) -> tuple[GPTConfig, dict[str, LazyTensor], BaseTokenizer]:
    """Return what `load` makes the model of, read one by one when asked for; and the tokenizer."""
    opened, tokenizer = _open_both(source, checkpoint)
    size = tokenizer.vocab_size
    tensors = {
        name: tensor.first_rows(size) if name in ("wte.weight", "lm_head.weight") else tensor
        for name, tensor in opened.open_tensors().items()
    }
    return replace(opened.config, vocab_size=size), tensors, tokenizer


def _open_both(source: str | Path, checkpoint: Which) -> tuple[Source, BaseTokenizer]:
    """Open a source and its tokenizer; UsageError if they do not belong together."""
    opened = open_source(source, checkpoint)
    tokenizer = opened.read_tokenizer()
    if tokenizer.vocab_size > opened.config.vocab_size:
        raise UsageError(
            f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, and its model only "
            f"{opened.config.vocab_size:,}"
        )
    return opened, tokenizer


def _is_a_path(source: str) -> bool:
    """Tell whether a name can only be one of a file or folder, by its looks."""
    return source.startswith((".", "/", "~")) or source.endswith("/") or "\\" in source
