"""The named recipes: everything that decides a training run, one typed dataclass each.

Each field is an option of `python -m fastgpt.train` by the same name; its docstring is the help.
This module imports nothing heavy, so that help and mistakes are answered at once.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from fastgpt.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """A training run. The defaults are those of `shakespeare-char`."""

    data: str = "shakespeare"
    """Text to train on: the path of a UTF-8 text file, a folder that fastgpt.prepare made (which
    brings its own tokenizer and validation part), or "shakespeare", the packaged text."""
    tokenizer: Literal["char", "gpt2"] = "char"
    """One token per character of the text ("char"), or GPT-2's byte-pair encoding ("gpt2")."""
    val_fraction: float = 0.1
    """The last part of the text, kept for validation."""
    out: str | None = None
    """Run folder to create; by default runs/RECIPE-DATE-TIME."""

    n_layer: int = 3
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads; divides n_embd."""
    n_embd: int = 128
    """Width of the model."""
    block_size: int = 64
    """Context: how many tokens the model sees at once."""
    dropout: float = 0.0
    """Share of activations dropped while training."""
    bias: bool = False
    """Biases in the linear layers and norms (GPT-2 has them)."""

    batch_size: int = 12
    """Sequences per micro-batch."""
    grad_accum: int = 1
    """Micro-batches per step."""
    max_steps: int = 4500
    """Optimizer steps."""
    lr: float = 6e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; by default a tenth of lr."""
    warmup_steps: int = 180
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices and embeddings only."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.99
    """AdamW's decay of the squared gradient's mean."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 for no clipping."""

    eval_interval: int = 500
    """Steps between evaluations; each saves a checkpoint (the best and the newest are kept)."""
    eval_tokens: int = 1_000_000
    """Validation tokens per evaluation at most, the same ones each time."""
    sample_tokens: int = 500
    """Length of the text sample at the end."""
    seed: int = 1337
    """Fixes weights, data order and dropout."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the products: auto is bfloat16 autocast on CUDA, float32 elsewhere."""
    ops: Literal["auto", "triton", "native", "reference"] = "auto"
    """Implementation of the operations (see fastgpt.ops)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            choices = get_args(field.type) if get_origin(field.type) is Literal else ()
            if choices and getattr(self, field.name) not in choices:
                listed = ", ".join(choices)
                value = getattr(self, field.name)
                raise UsageError(f"{field.name} must be one of {listed}, not {value!r}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "weight_decay", "grad_clip", "warmup_steps", "sample_tokens"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UsageError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.min_lr is not None and not 0.0 <= self.min_lr <= self.lr:
            raise UsageError(f"min_lr must be from 0 to lr ({self.lr}), not {self.min_lr}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if not 0.0 < self.val_fraction < 1.0:
            raise UsageError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")


_AT_LEAST_ONE = (
    *("n_layer", "n_head", "n_embd", "block_size"),
    *("batch_size", "grad_accum", "max_steps", "eval_interval", "eval_tokens"),
)


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> Recipe:
    """GPT-2 at a released size, with the settings of nanoGPT's configuration for it."""
    return Recipe(
        data="",
        tokenizer="gpt2",
        val_fraction=0.01,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=1024,
        bias=True,
        batch_size=12,
        grad_accum=40,
        max_steps=600_000,
        lr=6e-4,
        warmup_steps=2000,
        beta2=0.95,
        eval_interval=1000,
    )


RECIPES: dict[str, Recipe] = {
    "shakespeare-char": Recipe(),
    "gpt2": _gpt2(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": _gpt2(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": _gpt2(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": _gpt2(n_layer=48, n_head=25, n_embd=1600),
}

DESCRIPTIONS: dict[str, str] = {
    "shakespeare-char": "a small character-level model of Shakespeare's plays; minutes on a CPU",
    "gpt2": "GPT-2 with 124M parameters on your own text (--data); needs a GPU",
    "gpt2-medium": "GPT-2 with 355M parameters",
    "gpt2-large": "GPT-2 with 774M parameters",
    "gpt2-xl": "GPT-2 with 1.6B parameters",
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`; UsageError with the nearest names if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(RECIPES)}"
    raise UsageError(f"unknown recipe {name!r}: {hint}")


def recipe_from_dict(values: dict[str, Any], source: str) -> Recipe:
    """Rebuild a recipe from a saved one; UsageError naming `source` if the fields are not ours."""
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(set(values) - known):
        raise UsageError(
            f"{source}: unknown settings {', '.join(unknown)}; made by a newer fastgpt?"
        )
    try:
        return Recipe(**values)
    except TypeError as error:
        raise UsageError(f"{source}: a setting has a value of the wrong kind: {error}") from None
