"""nanoGPT's checkpoints, in and out: `ckpt.pt`, as its ``train.py`` saves it.

The layers are `nn.Linear`, the head is always the token embedding, and `bias` is one setting for
the whole model: https://github.com/karpathy/nanoGPT, ``model.py`` and ``train.py``.

Two things differ in what is computed. nanoGPT's GELU is exact (by the error function), that of
GPT-2 and of fastgpt is the approximation by tanh; they differ by up to 0.0005. And a vocabulary of
50,304 is GPT-2's 50,257 and rows of padding, which `fastgpt.interop.load` leaves out.
"""

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.data.external import read_meta
from fastgpt.interop.foreign import Foreign, LazyTensor, NoTokenizerError, make_config
from fastgpt.interop.pickled import lazy, mentions, named_tensors, unpickle
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.utils.errors import UsageError

CHECKPOINT, META = "ckpt.pt", "meta.pkl"
PADDED_GPT2 = 50304  # rows of GPT-2's vocabulary, up to a multiple of 64
_EPS = 1e-5
_WRAPPERS = ("_orig_mod.", "module.")  # of `torch.compile` and of DDP, before every name
_PREFIX, _HEAD = "transformer.", "lm_head.weight"
_MASK = ".attn.bias"  # a constant that is saved where PyTorch has no fused attention
# What train.py puts into its optimizer, which it takes from the checkpoint when it resumes.
_WEIGHT_DECAY, _BETAS, _LR = 0.1, (0.9, 0.95), 6e-4


def recognises(path: Path) -> bool:
    """Tell whether a path is such a checkpoint, or a folder that holds one."""
    if path.is_dir():
        return (path / CHECKPOINT).is_file() and not (path / "config.json").exists()
    if not path.is_file() or path.suffix != ".pt":
        return False
    return path.name == CHECKPOINT or mentions(path, "model_args")


def read(path: Path) -> Foreign:
    """Open such a checkpoint; UsageError says what is wrong with it. No code in it is run."""
    file = path / CHECKPOINT if path.is_dir() else path
    content = unpickle(file)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise UsageError(f"{file} is no checkpoint of nanoGPT: it has no 'model' and 'model_args'")
    config = _read_config(file, content["model_args"])
    tensors = _ours(file, named_tensors(file, content["model"]))
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    return Foreign(file, config, tensors, partial(_tokenizer, file, config.vocab_size, dataset))


def write(model: GPT, folder: Path, tokenizer: BaseTokenizer | None = None) -> None:
    """Write ``ckpt.pt`` into a folder, for nanoGPT's ``sample.py`` and ``train.py``.

    Both take it with ``--init_from=resume``; `train.py` starts at step 0, with the optimizer as new
    and in its default settings. Characters go into a ``meta.pkl`` beside it, which ``sample.py``
    finds if the folder lies in nanoGPT's own, as its ``out`` does: ``--out_dir=NAME``.

    Raises: UsageError for a model or a tokenizer that nanoGPT cannot hold, or if there is such a
        file already.
    """
    for name in (CHECKPOINT, META):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} is there already; give another folder")
    _refuse_config(model.config)
    has_characters = _has_characters(tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if has_characters:
            (folder / META).write_bytes(pickle.dumps(_meta(tokenizer)))
        # `data/../NAME`, where sample.py looks for the meta.pkl of the data set
        dataset = {"dataset": f"../{folder.resolve().name}"} if has_characters else {}
        _save(_checkpoint(model, dataset), folder / CHECKPOINT)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from None


# --- in --------------------------------------------------------------------------------------


def _read_config(file: Path, args: Any) -> GPTConfig:
    if not isinstance(args, dict):
        raise UsageError(f"{file}: 'model_args' is no dict of settings")
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    return make_config(
        file,
        **{name: args.get(name) for name in names},
        bias=bool(args.get("bias", True)),  # the first versions had no choice
        dropout=args.get("dropout", 0.0),
        layer_norm_eps=_EPS,
    )


def _ours(file: Path, tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    """Return the tensors by our names; UsageError for a head that is not the embedding."""
    named = {_our_name(name): tensor for name, tensor in tensors.items()}
    head, embedding = named.pop(_HEAD, None), named.get("wte.weight")
    if head is not None and embedding is not None and not _equal(head, embedding):
        raise UsageError(
            f"{file}: {_HEAD} is not {_PREFIX}wte.weight, but in nanoGPT they are one: this was "
            "made by a changed nanoGPT, and what it computes is not known"
        )
    return {name: lazy(tensor) for name, tensor in named.items() if not name.endswith(_MASK)}


def _our_name(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name.removeprefix(_PREFIX)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare without reading, if they are one tensor in the file, too."""
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _tokenizer(file: Path, vocab_size: int, dataset: Any) -> BaseTokenizer:
    """Return the tokenizer beside the file, GPT-2's if the size is its, or that of a meta.pkl."""
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
        f"{file} does not say what its {vocab_size:,} token ids stand for: put the {META} of its "
        f"data beside it (looked for: {', '.join(map(str, places))})"
    )


def _places_of_meta(file: Path, dataset: Any) -> list[Path]:
    """Return where the characters may be, for a checkpoint in a folder of nanoGPT's own."""
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


# --- out -------------------------------------------------------------------------------------


def _refuse_config(config: GPTConfig) -> None:
    if not config.tie_weights:
        raise UsageError("nanoGPT has no head of its own weights (tie_weights = False)")
    if config.layer_norm_eps != _EPS:
        raise UsageError(
            f"nanoGPT has layer_norm_eps = {_EPS}; this model's is {config.layer_norm_eps}"
        )


def _has_characters(tokenizer: BaseTokenizer | None) -> bool:
    """Tell whether a tokenizer needs a meta.pkl; UsageError if nanoGPT has no place for it."""
    if isinstance(tokenizer, CharTokenizer):
        return True
    if tokenizer is not None and tokenizer != Tokenizer.gpt2():
        raise UsageError(
            "nanoGPT has GPT-2's tokenizer and single characters, and none of "
            f"{tokenizer.vocab_size:,} tokens as here: it would show other words for the same ids"
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
    weights = {_PREFIX + name: p.detach().float().cpu() for name, p in model.state_dict().items()}
    weights[_HEAD] = weights[_PREFIX + "wte.weight"]  # one storage: saved once
    return {
        "model": weights,
        "optimizer": _new_optimizer(model),
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": 0,
        "best_val_loss": 1e9,  # as before the first evaluation
        "config": settings,
    }


def _new_optimizer(model: GPT) -> dict[str, Any]:
    """Return the state of AdamW before its first step, in train.py's two groups."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=_LR, betas=_BETAS).state_dict()


def _save(content: dict[str, Any], file: Path) -> None:
    """Save the whole file or, on failure, nothing of it."""
    beside = file.with_name(f".{file.name}.new")
    try:
        torch.save(content, beside)
        beside.replace(file)
    except RuntimeError as error:  # torch's for a full disk
        raise OSError(str(error).splitlines()[0]) from None
    finally:
        beside.unlink(missing_ok=True)
