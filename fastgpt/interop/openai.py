"""OpenAI's release of GPT-2: a folder with a TensorFlow checkpoint, and what others save like it.

    checkpoint       the name of the newest checkpoint in the folder
    hparams.json     n_vocab, n_ctx, n_embd, n_head, n_layer
    model.ckpt.*     the checkpoint (`tensor_bundle`); gpt-2-simple's are called model-1000.*
    encoder.json, vocab.bpe    the tokenizer

Names and shapes: https://github.com/openai/gpt-2/blob/master/src/model.py. Its layers are
convolutions of width 1, and their weights `[1, in, out]`.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from fastgpt.checkpoint.load import CheckpointError, read_json
from fastgpt.interop.foreign import Foreign, LazyTensor, tokenizer_beside
from fastgpt.interop.tensor_bundle import TensorBundle
from fastgpt.model import GPTConfig

HPARAMS, STATE = "hparams.json", "checkpoint"
LARGEST_STATE = 1 << 20  # bytes
_CONFIG = {  # our names of the settings
    "n_vocab": "vocab_size",
    "n_ctx": "block_size",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_LAYER = re.compile(
    r"model/(?:h(0|[1-9][0-9]*)/(attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj)/(w|b))", re.ASCII
)
_NORM = re.compile(r"model/(?:h(0|[1-9][0-9]*)/(ln_1|ln_2)|(ln_f))/(g|b)", re.ASCII)
_EMBEDDING = re.compile(r"model/(wte|wpe)")
# What a Saver of all variables, not of the model's alone, adds: of each trained variable what the
# optimizer keeps (Adam and Momentum of TensorFlow, Adam as in BERT's code, Adafactor), its own
# counters, and that of steps. The model does not depend on them.
_KEPT_OF_VARIABLE = re.compile(
    r"(.+)/(?:Adam|Adam_1|Momentum|adam_m|adam_v|adafactor_v|adafactor_vr|adafactor_vc)"
)
_COUNTERS = ("global_step", "beta1_power", "beta2_power")


def recognises(path: Path) -> bool:
    """Tell whether a path is such a folder."""
    return (path / HPARAMS).is_file() and any(path.glob("*.index"))


def read(path: Path) -> Foreign:
    """Open the checkpoint that the folder's `checkpoint` names, or its only one.

    Raises CheckpointError that names the file and what in it is damaged, missing or not supported.
    Tensors that are neither the model's nor an optimizer's keep their name.
    """
    bundle = TensorBundle(_find_checkpoint(path))
    config = _read_config(path / HPARAMS, bundle)
    tensors = {
        _our_name(name): _our_tensor(bundle, name)
        for name in bundle.entries
        if not _is_of_training(name, bundle)
    }
    return Foreign(path, config, tensors, partial(tokenizer_beside, path, config.vocab_size))


def _find_checkpoint(folder: Path) -> Path:
    """Return what the names of the checkpoint's files begin with."""
    there = sorted(index.name.removesuffix(".index") for index in folder.glob("*.index"))
    if (folder / STATE).is_file():
        name = _named_checkpoint(folder / STATE)
        if name not in there:
            raise CheckpointError(
                f"{folder / STATE} names {name!r:.80}, but {folder} has no {name!r:.80}.index; it "
                f"has {', '.join(there):.200}: copy the missing files, or name one of these"
            )
        return folder / name
    if len(there) != 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints ({', '.join(there):.200}): say which one in a "
            f'file {STATE!r} with the line: model_checkpoint_path: "{there[-1]}"'
        )
    return folder / there[0]


def _named_checkpoint(path: Path) -> str:
    """Return the name that a CheckpointState, a protocol buffer as text, gives the newest one.

    Where the folder was when it was saved does not matter: it may have been moved.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_STATE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    found = re.findall(rb'^\s*model_checkpoint_path\s*:\s*"((?:[^"\\\n]|\\.)*)"', text, re.M)
    if len(found) == 1:
        name = re.split(r"[/\\]", _unescaped(found[0]).decode(errors="replace"))[-1]
        if name not in ("", ".", ".."):
            return name
    raise CheckpointError(
        f"{path} does not name one checkpoint: it needs one line such as "
        'model_checkpoint_path: "model.ckpt"'
    )


def _unescaped(text: bytes) -> bytes:
    """Undo the escapes that paths have: of bytes beyond ASCII in octal, of quotes and the like."""

    def byte(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 8) & 0xFF]) if match[1] else match[2]

    return re.sub(rb"\\(?:([0-7]{1,3})|(.))", byte, text)


def _read_config(path: Path, bundle: TensorBundle) -> GPTConfig:
    """Return the model's shape, which the tensors must bear out.

    They are compared before anything is built: a damaged number could ask for any size.
    """
    hparams = read_json(path)
    settings: dict[str, Any] = {
        ours: _whole_number(path, hparams, theirs) for theirs, ours in _CONFIG.items()
    }
    layers = {match[1] for name in bundle.entries if (match := _LAYER.fullmatch(name))}
    expected = {
        "model/wte": (settings["vocab_size"], settings["n_embd"]),
        "model/wpe": (settings["block_size"], settings["n_embd"]),
    }
    for name, shape in expected.items():
        entry = bundle.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{bundle.index_path} has no {name}: it is of another model")
        if entry.shape != shape:
            raise CheckpointError(
                f"{path} says that {name} is {list(shape)}, but in {bundle.index_path} it is "
                f"{list(entry.shape)}: take both from one model"
            )
    if len(layers) != settings["n_layer"]:
        raise CheckpointError(
            f"{path} says n_layer {settings['n_layer']}, but {bundle.index_path} has the weights "
            f"of {len(layers)} layers: take both from one model"
        )
    try:
        return GPTConfig(**settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _whole_number(path: Path, hparams: dict[str, Any], name: str) -> int:
    value = hparams.get(name)
    if type(value) is not int:
        raise CheckpointError(f"{path}: {name} must be a whole number, not {value!r:.80}")
    return value


def _our_name(name: str) -> str:
    """Return what we call a tensor of theirs; what is none of the model's keeps its name."""
    if match := _EMBEDDING.fullmatch(name):
        return f"{match[1]}.weight"
    if match := _LAYER.fullmatch(name):
        kind = "weight" if match[3] == "w" else "bias"
        return f"h.{match[1]}.{match[2].replace('/', '.')}.{kind}"
    if match := _NORM.fullmatch(name):
        kind = "weight" if match[4] == "g" else "bias"
        return f"ln_f.{kind}" if match[3] else f"h.{match[1]}.{match[2]}.{kind}"
    return name


def _our_tensor(bundle: TensorBundle, name: str) -> LazyTensor:
    """Return a tensor as we orient it: a layer's weight [1, in, out] as [out, in]."""
    entry = bundle.entries[name]
    if _our_name(name) != name and not entry.dtype.is_floating_point:
        raise CheckpointError(
            f"{bundle.index_path}: {name!r:.80} is of {entry.dtype}, and weights are not"
        )
    layer = _LAYER.fullmatch(name)
    if layer and layer[3] == "w" and len(entry.shape) == 3 and entry.shape[0] == 1:
        return LazyTensor(entry.shape[1:], lambda: bundle.read(name)[0]).transposed()
    return LazyTensor(entry.shape, partial(bundle.read, name))


def _is_of_training(name: str, bundle: TensorBundle) -> bool:
    """Tell whether a variable served training alone."""
    match = _KEPT_OF_VARIABLE.fullmatch(name)
    return name in _COUNTERS or (match is not None and match[1] in bundle.entries)
