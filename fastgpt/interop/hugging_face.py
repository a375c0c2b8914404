"""Import and export of Hugging Face transformers folders: `config.json`, weights and tokenizer.

Weights are in `model.safetensors`, a single file or shards with an index, or in
`pytorch_model.bin`. Linear layers are `Conv1D`, which stores weights as `[in, out]`. The settings
are documented in https://huggingface.co/docs/transformers/model_doc/gpt2, "GPT2Config".
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.load import read_json
from fastgpt.checkpoint.tensor_file import StoredTensor, stored_tensors, write_tensors
from fastgpt.interop import external
from fastgpt.interop.external import PREFIX, ExternalModel, LazyTensor
from fastgpt.interop.pickled import open_tensors
from fastgpt.interop.tokenizer_files import TOKENIZER_FILES, write_tokenizer
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_files, write_json

CONFIG, WEIGHTS, PICKLED, INDEX = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    ".index.json",
)
_EMBEDDING, _HEAD = "wte.weight", "lm_head.weight"
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_NAMES = {  # transformers' names of settings
    "block_size": "n_positions",
    "dropout": "resid_pdrop",
    "tie_weights": "tie_word_embeddings",
    "layer_norm_eps": "layer_norm_epsilon",
}
# Settings that change the computation, with their supported values, the default first.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def recognizes(path: Path) -> bool:
    """Return whether a path is a transformers folder."""
    return (path / CONFIG).is_file()


def read(path: Path) -> ExternalModel:
    """Open a transformers folder; UsageError names an invalid file or unsupported setting."""
    config = _read_config(path / CONFIG)
    tensors = _to_fastgpt(_open_weights(path))
    if config.tie_weights:
        config, tensors = _tie_head(config, tensors)
    return ExternalModel(
        path, config, tensors, partial(external.find_tokenizer, path, config.vocab_size)
    )


def write(model: GPT, folder: Path, tokenizer: BaseTokenizer | None = None) -> None:
    """Save a model to a folder as transformers' `GPT2LMHeadModel`; the folder is created if needed.

    A model without biases gets zero biases. If a tokenizer is given, its files are saved too, for
    `AutoTokenizer`.

    Raises: UsageError if the folder already holds such files or cannot be written.
    """
    for name in (CONFIG, WEIGHTS, *TOKENIZER_FILES):
        if (folder / name).exists():
            raise UsageError(f"{folder} already contains {name}; give another folder")
    try:
        with atomic_files(folder) as temporary:
            write_tensors(temporary / WEIGHTS, _from_fastgpt(model), metadata={"format": "pt"})
            if tokenizer is not None:
                write_tokenizer(tokenizer, temporary, model.config.block_size)
            write_json(temporary / CONFIG, _config(model.config, tokenizer))
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"
        raise UsageError(f"{folder} cannot be written: {reason}") from None


# --- import ----------------------------------------------------------------------------------


def _read_config(path: Path) -> GPTConfig:
    settings = read_json(path)
    if (kind := settings.get("model_type")) != "gpt2":
        raise UsageError(f"{path}: model_type is {kind!r}; only 'gpt2' is supported")
    for name, values in _COMPUTED.items():
        if (value := settings.get(name, values[0])) not in values:
            raise UsageError(f"{path}: {name} = {value!r} is not supported, only {values[0]!r}")
    size = partial(_size, path, settings)
    config = external.make_config(
        path,
        _NAMES,
        vocab_size=settings.get("vocab_size", 50257),
        block_size=size(settings.get("n_ctx", 1024), "n_positions", "max_position_embeddings"),
        n_layer=size(12, "n_layer", "num_hidden_layers"),
        n_head=size(12, "n_head", "num_attention_heads"),
        n_embd=size(768, "n_embd", "hidden_size"),
        dropout=settings.get("resid_pdrop", 0.1),
        tie_weights=settings.get("tie_word_embeddings", True),
        layer_norm_eps=settings.get("layer_norm_epsilon", 1e-5),
    )
    if (inner := settings.get("n_inner")) not in (None, 4 * config.n_embd):
        raise UsageError(f"{path}: n_inner = {inner!r} is not supported, only 4 * n_embd")
    return config


def _size(path: Path, settings: dict[str, Any], default: Any, *names: str) -> Any:
    """Return a size that has several names; UsageError if two of them disagree."""
    found = {name: settings[name] for name in names if name in settings} or {"default": default}
    size, *others = found.values()
    if any(other != size for other in others):
        raise UsageError(f"{path}: {names} are names of one setting, but differ: {found!r:.200}")
    return size


def _open_weights(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the first weight file found in a folder, by their names in it."""
    for name, open_file in ((WEIGHTS, _open_safetensors), (PICKLED, open_tensors)):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / (name + INDEX)).is_file():
            return _open_parts(folder / (name + INDEX), open_file)
    raise UsageError(f"{folder} contains no weights: neither {WEIGHTS} nor {PICKLED}")


def _open_parts(
    index: Path, open_file: Callable[[Path], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """Return the tensors of a sharded checkpoint, each from the file given by the index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UsageError(f"{index}: weight_map must map each tensor to the name of its file")
    for file in set(places.values()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise UsageError(f"{index} names {file!r}, which is not a file in the same folder")
    parts = {file: open_file(index.parent / file) for file in sorted(set(places.values()))}
    if lost := [f"{name} ({file})" for name, file in places.items() if name not in parts[file]]:
        raise UsageError(f"{index}: tensors missing in the files given for them: {', '.join(lost)}")
    return {name: parts[file][name] for name, file in places.items()}


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(tensor.shape, partial(_read_weight, name, tensor))
        for name, tensor in stored_tensors(path).items()
    }


def _read_weight(name: str, tensor: StoredTensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        raise UsageError(f"{tensor.path}: {name} has dtype {tensor.dtype}: it is not a weight")
    return tensor.read()


def _to_fastgpt(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors by fastgpt's names and in its orientation."""
    return {
        name: tensor.transpose() if name.endswith(_CONV1D) else tensor
        for name, tensor in external.strip_names(tensors).items()
    }


def _tie_head(
    config: GPTConfig, tensors: dict[str, LazyTensor]
) -> tuple[GPTConfig, dict[str, LazyTensor]]:
    """Return a config that says whether the head is tied, and the tensors without a tied head.

    The stored tensors decide, as in transformers: if only the head is stored, it is the embedding,
    too (`safetensors.torch.save_model` keeps one name of two). If both are stored and differ, the
    head is not tied, whatever the config says.
    """
    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    if head is None:
        return config, tensors
    if embedding is not None and not _equal(embedding, head):
        return replace(config, tie_weights=False), tensors
    others = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    return config, {**others, _EMBEDDING: head}


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and torch.equal(a.read().float(), b.read().float())


# --- export ----------------------------------------------------------------------------------


def _from_fastgpt(model: GPT) -> dict[str, Tensor]:
    """Return the weights by transformers' names; those of `Conv1D` are transposed views."""
    tensors = {}
    for name, tensor in (model.state_dict() | external.zero_biases(model.config)).items():
        prefix = "" if name == _HEAD else PREFIX
        tensors[prefix + name] = (tensor.T if name.endswith(_CONV1D) else tensor).cpu()
    return tensors


def _config(config: GPTConfig, tokenizer: BaseTokenizer | None) -> dict[str, Any]:
    end = tokenizer.eot_token if tokenizer is not None else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
