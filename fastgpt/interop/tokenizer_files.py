"""A tokenizer as transformers' `AutoTokenizer` finds it beside a model."""

from pathlib import Path

from fastgpt.checkpoint import write_json
from fastgpt.tokenizer import BaseTokenizer


def write_tokenizer(tokenizer: BaseTokenizer, folder: Path, block_size: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; block_size: the model's context."""
    tokenizer.save(folder / "tokenizer.json")
    names = [name for name in tokenizer.special_tokens if tokenizer.eot_token is not None]
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, "x": names},
    )
