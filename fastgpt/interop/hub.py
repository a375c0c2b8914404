"""Models of the Hugging Face Hub by name (`gpt2`, `owner/name`), through `huggingface_hub`.

Downloaded files are reused from the library's cache, with or without a network.
"""

import re
from pathlib import Path

from fastgpt.interop import hugging_face
from fastgpt.interop.external import ExternalModel
from fastgpt.utils.errors import UsageError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_OTHERS = (
    *("config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


def recognizes(path: Path) -> bool:
    """Return whether a path does not exist locally but could be the name of a model on the Hub."""
    return not path.exists() and _NAME.fullmatch(path.as_posix()) is not None


def read(path: Path) -> ExternalModel:
    """Open the model of that name, downloading it if it is not cached.

    Raises: UsageError, with instructions, if that is not possible.
    """
    return hugging_face.read(_download(path.as_posix()))


def _download(name: str) -> Path:
    """Return the folder of a model's files; pickled weights are used only without safetensors."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise _missing(name, "and downloading it requires: pip install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_OTHERS, *_WEIGHTS]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_OTHERS, *_PICKLED]))
    except RepositoryNotFoundError:
        raise _missing(name, "and the Hub has no model of that name") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise _missing(name, f"and it could not be downloaded ({reason})") from None
    return folder


def _missing(name: str, reason: str) -> UsageError:
    return UsageError(
        f"{name} is not a local file or folder, {reason}; alternatively, on a machine with network "
        f"access, save config.json, model.safetensors and tokenizer.json from "
        f"https://huggingface.co/{name} in a folder, and give that folder"
    )
