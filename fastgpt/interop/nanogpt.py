"""Import and export of nanoGPT checkpoints: `ckpt.pt`, as saved by its ``train.py``.

Linear layers are `nn.Linear`, the head is always tied to the token embedding, and `bias` is one
setting for the whole model: https://github.com/karpathy/nanoGPT, ``model.py`` and ``train.py``.

There are two differences in the computation. nanoGPT's GELU is exact (with the error function),
that of GPT-2 and fastgpt is the tanh approximation; they differ by up to 0.0005. And a vocabulary
of 50,304 consists of GPT-2's 50,257 tokens and padding, which `fastgpt.interop.load` removes.
"""

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.data.external import read_meta
from fastgpt.interop import external
from fastgpt.interop.external import PREFIX, ExternalModel, LazyTensor, NoTokenizerError
from fastgpt.interop.pickled import lazy, named_tensors, pickle_contains, unpickle
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_files

CHECKPOINT, META = "ckpt.pt", "meta.pkl"
PADDED_GPT2 = 50304  # GPT-2's vocabulary size, padded to a multiple of 64
_EPS = 1e-5
_WRAPPERS = ("_orig_mod.", "module.")  # name prefixes added by `torch.compile` and DDP
_HEAD = "lm_head.weight"
# Default optimizer settings of train.py, which restores them from the checkpoint when it resumes.
_WEIGHT_DECAY, _BETAS, _LR = 0.1, (0.9, 0.95), 6e-4


def recognizes(path: Path) -> bool:
    """Return whether a path is a nanoGPT checkpoint, or a folder that contains one."""
    if path.is_dir():
        return (path / CHECKPOINT).is_file() and not (path / "config.json").exists()
    if not path.is_file() or path.suffix != ".pt":
        return False
    return path.name == CHECKPOINT or pickle_contains(path, "model_args")


def read(path: Path) -> ExternalModel:
    """Open a nanoGPT checkpoint without executing code in it; UsageError if it is invalid."""
    file = path / CHECKPOINT if path.is_dir() else path
    content = unpickle(file)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise UsageError(f"{file} is not a nanoGPT checkpoint: it has no 'model' and 'model_args'")
    config = _read_config(file, content["model_args"])
    tensors = _to_fastgpt(file, named_tensors(file, content["model"]))
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    return ExternalModel(
        file, config, tensors, partial(_tokenizer, file, config.vocab_size, dataset)
    )


def write(model: GPT, folder: Path, tokenizer: BaseTokenizer | None = None) -> None:
    """Write ``ckpt.pt`` to a folder, for nanoGPT's ``sample.py`` and ``train.py``.

    Both load it with ``--init_from=resume``; ``train.py`` starts at step 0 with a new optimizer in
    its default settings. A character vocabulary is written to ``meta.pkl`` next to it, which
    ``sample.py`` finds if the folder is inside nanoGPT's own, like its ``out``: ``--out_dir=NAME``.

    Raises: UsageError for a model or tokenizer that nanoGPT does not support, or if the file
        already exists.
    """
    for name in (CHECKPOINT, META):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} already exists; give another folder")
    _check_config(model.config)
    has_characters = _has_characters(tokenizer)
    try:
        # sample.py looks for meta.pkl in data/DATASET, which becomes data/../NAME
        dataset = {"dataset": f"../{folder.resolve().name}"} if has_characters else {}
        with atomic_files(folder) as temporary:
            if has_characters:
                (temporary / META).write_bytes(pickle.dumps(_meta(tokenizer)))
            _save(_checkpoint(model, dataset), temporary / CHECKPOINT)
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"
        raise UsageError(f"{folder} cannot be written: {reason}") from None


# --- import ----------------------------------------------------------------------------------


def _read_config(file: Path, args: Any) -> GPTConfig:
    if not isinstance(args, dict):
        raise UsageError(f"{file}: 'model_args' is not a dict of settings")
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    return external.make_config(
        file,
        **{name: args.get(name) for name in names},
        bias=bool(args.get("bias", True)),  # the first versions always had biases
        dropout=args.get("dropout", 0.0),
        layer_norm_eps=_EPS,
    )


def _to_fastgpt(file: Path, tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    """Return the tensors by fastgpt's names; UsageError for a head that is not tied."""
    named = external.strip_names({_unwrap(name): tensor for name, tensor in tensors.items()})
    head, embedding = named.pop(_HEAD, None), named.get("wte.weight")
    if head is not None and embedding is not None and not _equal(head, embedding):
        raise UsageError(
            f"{file}: {_HEAD} differs from {PREFIX}wte.weight, but nanoGPT ties them: this file "
            "was made by a modified nanoGPT, whose computation is unknown"
        )
    return {name: lazy(tensor) for name, tensor in named.items()}


def _unwrap(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, without reading them if they share their memory."""
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _tokenizer(file: Path, vocab_size: int, dataset: Any) -> BaseTokenizer:
    """Return the tokenizer in the file's folder, GPT-2's if the size matches, or a meta.pkl's.

    Raises: NoTokenizerError if there is none of them.
    """
    try:
        return load_tokenizer(file.parent)
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise NoTokenizerError(str(error)) from None
    gpt2 = Tokenizer.gpt2()
    if vocab_size in (gpt2.vocab_size, PADDED_GPT2):
        return gpt2
    places = _places_of_meta(file, dataset)
    for meta in places:
        if meta.is_file():
            return _characters(meta, vocab_size)
    raise NoTokenizerError(
        f"{file} has no tokenizer for its {vocab_size:,} token ids: put the {META} of its data "
        f"next to it (looked for: {', '.join(map(str, places))})"
    )


def _places_of_meta(file: Path, dataset: Any) -> list[Path]:
    """Return the paths where meta.pkl may be, for a checkpoint in a folder inside nanoGPT's."""
    places = [file.parent / META]
    if isinstance(dataset, str):
        places.append(Path(os.path.normpath(file.parent / ".." / "data" / dataset / META)))
        places.append(Path("data") / dataset / META)
    return places


def _characters(meta: Path, vocab_size: int) -> CharTokenizer:
    tokenizer = read_meta(meta)
    if tokenizer.vocab_size != vocab_size:
        raise NoTokenizerError(
            f"{meta} has {tokenizer.vocab_size:,} characters, but the model {vocab_size:,} ids: it "
            "belongs to other data"
        )
    return tokenizer


# --- export ----------------------------------------------------------------------------------


def _check_config(config: GPTConfig) -> None:
    if not config.tie_weights:
        raise UsageError("nanoGPT does not support an untied head (tie_weights = False)")
    if config.layer_norm_eps != _EPS:
        raise UsageError(
            f"nanoGPT requires layer_norm_eps = {_EPS}; this model has {config.layer_norm_eps}"
        )


def _has_characters(tokenizer: BaseTokenizer | None) -> bool:
    """Return whether a tokenizer needs a meta.pkl; UsageError if nanoGPT does not support it."""
    if isinstance(tokenizer, CharTokenizer):
        return True
    if tokenizer is not None and tokenizer != Tokenizer.gpt2():
        raise UsageError(
            "nanoGPT supports GPT-2's tokenizer and single characters, but not this tokenizer of "
            f"{tokenizer.vocab_size:,} tokens: it would decode the same ids to other text"
        )
    return False


def _meta(tokenizer: BaseTokenizer | None) -> dict[str, Any]:
    assert isinstance(tokenizer, CharTokenizer)
    itos = dict(enumerate(tokenizer.characters))
    stoi = {character: token_id for token_id, character in itos.items()}
    return {"vocab_size": len(itos), "itos": itos, "stoi": stoi}


def _checkpoint(model: GPT, settings: dict[str, Any]) -> dict[str, Any]:
    config = model.config
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    weights = {PREFIX + name: p.detach().float().cpu() for name, p in model.state_dict().items()}
    weights[_HEAD] = weights[PREFIX + "wte.weight"]  # one storage: saved once
    return {
        "model": weights,
        "optimizer": _new_optimizer(model),
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": 0,
        "best_val_loss": 1e9,  # as before the first evaluation
        "config": settings,
    }


def _new_optimizer(model: GPT) -> dict[str, Any]:
    """Return the state of AdamW before its first step, with train.py's two parameter groups."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=_LR, betas=_BETAS).state_dict()


def _save(content: dict[str, Any], file: Path) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # raised by torch if the disk is full
        raise OSError(str(error).splitlines()[0]) from None
