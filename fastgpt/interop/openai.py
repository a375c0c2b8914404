"""Import of OpenAI's release of GPT-2, a folder with a TensorFlow checkpoint, and similar folders.

    checkpoint       the name of the newest checkpoint in the folder
    hparams.json     n_vocab, n_ctx, n_embd, n_head, n_layer
    model.ckpt.*     the checkpoint (`tensor_bundle`); gpt-2-simple's are called model-1000.*
    encoder.json, vocab.bpe    the tokenizer

Names and shapes: https://github.com/openai/gpt-2/blob/master/src/model.py. Linear layers are
convolutions of width 1 with weights `[1, in, out]`.
"""

import re
from functools import partial
from pathlib import Path

from fastgpt.checkpoint.load import CheckpointError, read_json
from fastgpt.interop import external
from fastgpt.interop.external import ExternalModel, LazyTensor
from fastgpt.interop.tensor_bundle import TensorBundle

HPARAMS, STATE = "hparams.json", "checkpoint"
LARGEST_STATE = 1 << 20  # bytes
_CONFIG = {  # OpenAI's setting -> fastgpt's
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
# Variables of the training state, saved by a Saver of all variables: the optimizer's state for each
# trained variable (TensorFlow's Adam and Momentum, Adam of BERT's code, Adafactor), its counters,
# and the step counter. The model does not depend on them.
_KEPT_OF_VARIABLE = re.compile(
    r"(.+)/(?:Adam|Adam_1|Momentum|adam_m|adam_v|adafactor_v|adafactor_vr|adafactor_vc)"
)
_COUNTERS = ("global_step", "beta1_power", "beta2_power")


def recognizes(path: Path) -> bool:
    """Return whether a path is a folder of this format."""
    return (path / HPARAMS).is_file() and any(path.glob("*.index"))


def read(path: Path) -> ExternalModel:
    """Open the checkpoint named by the folder's `checkpoint` file, or its only checkpoint.

    Tensors that belong neither to the model nor to the training state keep their names.

    Raises: UsageError with the file and what in it is damaged, missing or not supported.
    """
    bundle = TensorBundle(_find_checkpoint(path))
    hparams = read_json(path / HPARAMS)
    settings = {ours: hparams.get(theirs) for theirs, ours in _CONFIG.items()}
    config = external.make_config(path / HPARAMS, **settings)
    tensors = {
        _fastgpt_name(name): _lazy_tensor(bundle, name)
        for name in bundle.entries
        if not _is_of_training(name, bundle)
    }
    return ExternalModel(
        path, config, tensors, partial(external.find_tokenizer, path, config.vocab_size)
    )


def _find_checkpoint(folder: Path) -> Path:
    """Return the path prefix of the checkpoint's files."""
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
            f"{folder} contains several checkpoints ({', '.join(there):.200}): choose one in a "
            f'file {STATE!r} with the line: model_checkpoint_path: "{there[-1]}"'
        )
    return folder / there[0]


def _named_checkpoint(path: Path) -> str:
    """Return the name of the newest checkpoint in a CheckpointState, a text protocol buffer.

    Folders in the name are ignored, because the folder may have been moved after saving.
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
    """Undo the escapes of a text protocol buffer: octal bytes and backslashed characters."""

    def byte(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 8) & 0xFF]) if match[1] else match[2]

    return re.sub(rb"\\(?:([0-7]{1,3})|(.))", byte, text)


def _fastgpt_name(name: str) -> str:
    """Return fastgpt's name of a tensor; tensors that are not the model's keep their name."""
    if match := _EMBEDDING.fullmatch(name):
        return f"{match[1]}.weight"
    if match := _LAYER.fullmatch(name):
        kind = "weight" if match[3] == "w" else "bias"
        return f"h.{match[1]}.{match[2].replace('/', '.')}.{kind}"
    if match := _NORM.fullmatch(name):
        kind = "weight" if match[4] == "g" else "bias"
        return f"ln_f.{kind}" if match[3] else f"h.{match[1]}.{match[2]}.{kind}"
    return name


def _lazy_tensor(bundle: TensorBundle, name: str) -> LazyTensor:
    """Return a tensor in fastgpt's orientation: a weight `[1, in, out]` as `[out, in]`."""
    entry = bundle.entries[name]
    if _fastgpt_name(name) != name and not entry.dtype.is_floating_point:
        raise CheckpointError(
            f"{bundle.index_path}: {name!r:.80} has dtype {entry.dtype}, but weights must be "
            "floating-point"
        )
    layer = _LAYER.fullmatch(name)
    if layer and layer[3] == "w" and len(entry.shape) == 3 and entry.shape[0] == 1:
        return LazyTensor(entry.shape[1:], lambda: bundle.read(name)[0]).transpose()
    return LazyTensor(entry.shape, partial(bundle.read, name))


def _is_of_training(name: str, bundle: TensorBundle) -> bool:
    """Return whether a variable is part of the training state only."""
    match = _KEPT_OF_VARIABLE.fullmatch(name)
    return name in _COUNTERS or (match is not None and match[1] in bundle.entries)
