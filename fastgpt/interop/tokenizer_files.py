"""Export of tokenizers to the files that transformers' `AutoTokenizer` reads."""

from pathlib import Path
from typing import Any

from fastgpt.tokenizer import BaseTokenizer, CharTokenizer
from fastgpt.tokenizer.vocabulary_files import END_OF_TEXT, characters_to_hugging_face
from fastgpt.utils.files import write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer(tokenizer: BaseTokenizer, folder: Path, block_size: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; block_size: the model's context."""
    if isinstance(tokenizer, CharTokenizer):
        write_json(folder / "tokenizer.json", characters_to_hugging_face(tokenizer.characters))
    else:
        tokenizer.save(folder / "tokenizer.json")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # True would remove spaces when decoding
    }
    if tokenizer.eot_token is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(folder / "tokenizer_config.json", settings)
