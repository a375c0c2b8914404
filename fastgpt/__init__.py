"""fastgpt: fast GPT-2, with a plain-PyTorch reference implementation of every fast path.

Public names are imported lazily: ``import fastgpt`` alone loads neither torch nor Triton.
"""

import sys
from pkgutil import extend_path
from typing import TYPE_CHECKING

# In a checkout, `python -m fastgpt.train` finds this folder first, but the compiled module is
# installed in site-packages. Extending the package path over both makes `pip install .` work
# whether Python runs inside the checkout or outside.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

from fastgpt.utils.lazy import lazy_names

if sys.argv[:1] == ["-m"]:  # Python is about to run a command: python -m fastgpt.train
    from fastgpt.utils.cli import report_import_errors

    report_import_errors()

if TYPE_CHECKING:
    from fastgpt.inference.text import generate as generate
    from fastgpt.interop import load as load
    from fastgpt.interop.transformers_patch import patch as patch
    from fastgpt.interop.transformers_patch import unpatch as unpatch
    from fastgpt.model import GPT as GPT
    from fastgpt.model import GPTConfig as GPTConfig
    from fastgpt.tokenizer import CharTokenizer as CharTokenizer
    from fastgpt.tokenizer import StreamDecoder as StreamDecoder
    from fastgpt.tokenizer import Tokenizer as Tokenizer
    from fastgpt.tokenizer import load_tokenizer as load_tokenizer
    from fastgpt.training.fused_adamw import FusedAdamW as FusedAdamW
    from fastgpt.training.recipes import RECIPES as RECIPES
    from fastgpt.training.recipes import Recipe as Recipe
    from fastgpt.training.trainer import Trainer as Trainer

_HOMES = {
    "FusedAdamW": "training.fused_adamw",
    "GPT": "model",
    "GPTConfig": "model",
    "RECIPES": "training.recipes",
    "Recipe": "training.recipes",
    "CharTokenizer": "tokenizer",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "Trainer": "training.trainer",
    "load": "interop",
    "load_tokenizer": "tokenizer",
    "patch": "interop.transformers_patch",
    "unpatch": "interop.transformers_patch",
}
_MODULES = (
    *("checkpoint", "data", "evaluate", "evaluation", "generate", "inference", "interop", "model"),
    *("ops", "tokenizer", "training"),
)

__all__ = sorted([*_HOMES, "generate"])
__getattr__, __dir__ = lazy_names(__name__, _HOMES, _MODULES)
