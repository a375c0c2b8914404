"""Recipes: the settings of a training run as a typed dataclass, and the predefined ones.

Each field is an option of `python -m fastgpt.train` with the same name; its docstring is the help
text. This module has no heavy imports, so that help and error messages appear immediately.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from fastgpt.utils import checks
from fastgpt.utils.errors import UsageError

TOKENIZERS = ("char", "gpt2", "bpe")  # built-in names; other tokenizers are loaded from files


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run. The defaults are those of `shakespeare-char`."""

    data: str = "shakespeare"
    """Training data: the path of a file of text, JSON or parquet, also compressed, a folder created
    by fastgpt.prepare or with token files of nanoGPT or llm.c (these have their own tokenizer and
    validation part), or "shakespeare", the packaged text."""
    val_data: str | None = None
    """Separate text file for validation; all of `data` is then used for training."""
    tokenizer: str = "char"
    """One token per character of the text ("char"), GPT-2's byte-pair encoding ("gpt2"), byte-pair
    encoding trained on the text ("bpe"), or the path of a tokenizer file or folder (./mine)."""
    vocab_size: int = 10_000
    """Vocabulary size of "bpe"."""
    val_fraction: float = 0.1
    """Fraction of the text, at its end, used for validation if there is no `val_data`."""
    init: str | None = None
    """Initialize with the weights and tokenizer of a pretrained model: a run folder, a folder or
    file of another project (see fastgpt.interop), or a name on the Hugging Face hub such as gpt2.
    The model determines the shape; only block_size may be reduced."""
    out: str | None = None
    """Run folder to create; by default runs/RECIPE-DATE-TIME, or with --data and no recipe
    runs/DATA-DATE-TIME."""

    n_layer: int = 3
    """Number of transformer blocks."""
    n_head: int = 4
    """Number of attention heads; must divide n_embd."""
    n_embd: int = 128
    """Embedding dimension (width) of the model."""
    block_size: int = 64
    """Context length in tokens."""
    dropout: float = 0.0
    """Dropout probability during training."""
    bias: bool = False
    """Use biases in the linear layers and norms, as GPT-2 does."""

    lora_rank: int = 0
    """Rank of the LoRA adapters (Hu et al. 2021), which are trained while the weights of `init`
    are frozen; 0 to train all weights."""
    lora_alpha: float = 16.0
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapters' inputs during training."""
    lora_targets: Literal["all", "attention", "mlp"] = "all"
    """Linear layers with adapters: those of attention, those of the MLPs, or all."""

    batch_size: int = 12
    """Sequences per micro-batch: what a process computes at once."""
    grad_accum: int = 1
    """Gradient accumulation: micro-batches per step. A step has batch_size * grad_accum sequences
    in total, divided between the processes: the run is the same on any number of processes, except
    for rounding and dropout masks."""
    find_batch: bool = False
    """Use the largest micro-batch that fits into memory; the sequences per step stay the same."""
    max_steps: int = 4500
    """Number of optimizer steps."""
    epochs: float | None = None
    """Length of the run in epochs, instead of max_steps; limits the warm-up to a tenth of the
    steps."""
    lr: float = 6e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule; by default a tenth of lr."""
    warmup_steps: int = 180
    """Number of linear warm-up steps."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay of the learning rate to min_lr after the warm-up: cosine, linear, linear in the last
    part of the run only (wsd: warm-up, stable, decay), or none (constant)."""
    decay_fraction: float = 0.2
    """Fraction of the steps, at the end, in which "wsd" decays the learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms are not decayed."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment (mean of the gradient)."""
    beta2: float = 0.99
    """AdamW's decay rate of the second moment (mean of the squared gradient)."""
    grad_clip: float = 1.0
    """Maximum gradient norm; 0 for no clipping."""
    max_skipped: int = 5
    """End the run after this many updates in a row were skipped due to non-finite gradients."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, for example 0.999. The
    average is then used for evaluation, samples and loading; 0 for no average."""

    eval_interval: int = 500
    """Steps between evaluations; each saves a checkpoint (the best and the newest are kept). 0 for
    about 20 per run and at least one per epoch, but at most 100."""
    eval_tokens: int = 1_000_000
    """Maximum number of validation tokens per evaluation; the same ones each time."""
    patience: int = 0
    """Early stopping: end after this many evaluations without a lower loss; 0 for never."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    sample_tokens: int = 500
    """Length in tokens of the samples during training and at its end."""
    sample_interval: int = 0
    """Steps between samples during training; 0 for a sample at the end only."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers in addition to metrics.jsonl: tensorboard, wandb."""
    seed: int = 1337
    """Random seed of weights, data order and dropout."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products: auto is bfloat16 if the processor has units for it (float16
    on older GPUs), else float32. Weights are always float32."""
    ops: Literal["auto", "triton", "native", "reference"] = "auto"
    """Backend that implements the operations (see fastgpt.ops)."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Use torch.compile; auto: on CUDA. If it fails, training continues without it, with a
    warning."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass instead of storing them: less memory,
    a third more computation."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes (torchrun): each holds the full model (ddp), or a shard of it and of
    the optimizer state (fsdp)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise UsageError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
        for wanted, is_valid, names in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not is_valid(value):
                    raise UsageError(f"{name} must be {wanted}, not {value}")
        if not (self.tokenizer in TOKENIZERS or is_path(self.tokenizer)):
            raise UsageError(
                f"tokenizer must be one of {', '.join(TOKENIZERS)} or the path of a file or folder "
                f"(./{self.tokenizer}), not {self.tokenizer!r}"
            )
        if self.lora_rank and not self.init:
            raise UsageError("lora_rank needs a pretrained model: add --init MODEL")
        if self.min_lr is not None and not 0.0 <= self.min_lr <= self.lr:
            raise UsageError(f"min_lr must be from 0 to lr ({self.lr}), not {self.min_lr}")
        if unknown := set(self.log) - {"tensorboard", "wandb"}:
            raise UsageError(f"log must be tensorboard or wandb, not {', '.join(unknown)}")


# The permitted values of settings; those that are None are not checked.
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("at least 1", lambda x: x >= 1, "n_layer n_head n_embd block_size batch_size grad_accum"),
    ("at least 1", lambda x: x >= 1, "max_steps max_skipped eval_tokens keep vocab_size"),
    ("0 or more", lambda x: x >= 0, "lr weight_decay grad_clip warmup_steps patience lora_rank"),
    ("0 or more", lambda x: x >= 0, "sample_tokens sample_interval eval_interval"),
    ("more than 0", lambda x: 0.0 < x < float("inf"), "epochs lora_alpha"),
    ("in [0, 1)", lambda x: 0.0 <= x < 1.0, "beta1 beta2 ema lora_dropout"),
    ("in (0, 1]", lambda x: 0.0 < x <= 1.0, "decay_fraction"),
    ("between 0 and 1", lambda x: 0.0 < x < 1.0, "val_fraction"),
    ("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63, "seed"),
)


def is_path(name: str) -> bool:
    """Whether a name looks like a path.

    The file system is not consulted, because the file may have been deleted when a run is resumed.
    """
    return any(sign in name for sign in "./\\")


# The settings that all recipes for GPT-2's architecture and a text of the user share.
_GPT2 = Recipe(data="", tokenizer="gpt2", bias=True, beta2=0.95)
_SMALL = replace(_GPT2, block_size=256, dropout=0.1, eval_interval=0, sample_tokens=200)


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> Recipe:
    """Return a recipe for a released size of GPT-2, with the settings of nanoGPT."""
    return replace(
        _GPT2,
        val_fraction=0.01,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=1024,
        grad_accum=40,
        max_steps=600_000,
        lr=6e-4,
        warmup_steps=2000,
        eval_interval=1000,
    )


# For a text of any size and any tokenizer, on a laptop.
_USER_TEXT = replace(
    _SMALL,
    tokenizer="char",
    bias=False,
    n_layer=4,
    n_head=4,
    n_embd=192,
    block_size=128,
    batch_size=16,
    max_steps=2000,
    lr=2e-3,
    warmup_steps=100,
    patience=5,
)
_TINYSTORIES = replace(
    _SMALL,
    tokenizer="bpe",
    val_fraction=0.01,
    n_layer=6,
    n_head=8,
    n_embd=512,
    batch_size=64,
    epochs=1.0,
    lr=6e-4,
    warmup_steps=1000,
)
_STORY_300K = replace(
    _SMALL,
    n_layer=12,
    n_head=12,
    n_embd=768,
    batch_size=8,
    epochs=10.0,
    lr=5e-4,
    warmup_steps=100,
    patience=5,
)
# With the learning rate of story-300k it ends at twice the perplexity: it has 10 times fewer steps.
_BEDTIME_512 = replace(_STORY_300K, block_size=512, batch_size=2, lr=2e-4)
_FINETUNE = replace(_STORY_300K, init="gpt2", epochs=5.0, lr=3e-5, beta2=0.999, patience=4)

RECIPES: dict[str, Recipe] = {
    "shakespeare-char": Recipe(),
    "small": _USER_TEXT,
    "tinystories": _TINYSTORIES,
    "story-300k": _STORY_300K,
    "bedtime-512": _BEDTIME_512,
    "finetune": _FINETUNE,
    "finetune-lora": replace(_FINETUNE, lora_rank=8, lr=3e-4),
    "gpt2": _gpt2(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": _gpt2(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": _gpt2(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": _gpt2(n_layer=48, n_head=25, n_embd=1600),
}

# Short descriptions with expected times. Numbers with "about" are estimates from the time per step.
DESCRIPTIONS: dict[str, str] = {
    "shakespeare-char": "character-level Shakespeare; 2 cores: loss 1.66 in 2 minutes",
    "small": "2M parameters, on your text (--data); the default with --data",
    "tinystories": "25M parameters, TinyStories (--data), own vocabulary; 2 cores: about 2 days",
    "story-300k": "124M parameters on 300,000 tokens (--data); 2 cores: about 2 hours",
    "bedtime-512": "the same on 30,000 tokens, context 512; 2 busy cores: 23 minutes",
    "finetune": "fine-tune GPT-2, or --init MODEL, on your text (--data)",
    "finetune-lora": "the same with LoRA adapters on frozen weights",
    "gpt2": "GPT-2, 124M parameters, on your text (--data); H200: 535,000 tokens/s",
    "gpt2-medium": "GPT-2, 355M parameters; needs a GPU, like the following ones",
    "gpt2-large": "GPT-2, 774M parameters",
    "gpt2-xl": "GPT-2, 1.6B parameters",
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`; raise UsageError with similar names if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"available: {', '.join(RECIPES)}"
    raise UsageError(f"unknown recipe {name!r}: {hint}")


def recipe_from_dict(values: dict[str, Any], source: str) -> Recipe:
    """Return the recipe with the given field values, as saved in a run's `config.json`.

    source: name of the file, for error messages.

    Raises:
        UsageError: If a field is unknown, or a value is invalid.
    """
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(set(values) - known):
        raise UsageError(
            f"{source}: unknown settings {', '.join(unknown)}; created by a newer fastgpt?"
        )
    try:
        _check_types(values)
        return Recipe(**{**values, "log": tuple(values.get("log", ()))})  # JSON has no tuples
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
    except TypeError as error:
        raise UsageError(f"{source}: a setting has a value of the wrong type: {error}") from None


def _check_types(values: dict[str, Any]) -> None:
    """Raise ValueError for a value of a wrong type; `Recipe` checks choices and ranges."""
    check: dict[Any, Callable[[str, Any], Any]] = {
        str: checks.text,
        bool: checks.flag,
        int: _whole_number,
        float: checks.number,
    }
    for field in fields(Recipe):
        kind, *others = get_args(field.type) or (field.type,)  # int, or int and None
        value = values.get(field.name, field.default)
        if kind in check and not (others and value is None):
            check[kind](field.name, value)


def _whole_number(name: str, value: Any) -> int:
    """Return an integer, which can also be a float without a fraction."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return checks.integer(name, whole, least=-(2**63), most=2**63 - 1)
