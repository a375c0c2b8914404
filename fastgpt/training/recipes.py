"""The named recipes: everything that decides a training run, one typed dataclass each.

Each field is an option of `python -m fastgpt.train` by the same name; its docstring is the help.
This module imports nothing heavy, so that help and mistakes are answered at once.
"""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from fastgpt.utils.errors import UsageError

TOKENIZERS = ("char", "gpt2", "bpe")  # those that have a name; others are in files


@dataclass(frozen=True)
class Recipe:
    """A training run. The defaults are those of `shakespeare-char`."""

    data: str = "shakespeare"
    """Text to train on: the path of a UTF-8 text file, a folder that fastgpt.prepare made or one of
    nanoGPT's or llm.c's token files (these bring their own tokenizer and validation part), or
    "shakespeare", the packaged text."""
    val_data: str | None = None
    """Another text file to validate on; then all of `data` is for training."""
    tokenizer: str = "char"
    """One token per character of the text ("char"), GPT-2's byte-pair encoding ("gpt2"), one
    learned from the text ("bpe"), or the path of a tokenizer's file or folder (./mine)."""
    vocab_size: int = 10_000
    """How many tokens "bpe" learns."""
    val_fraction: float = 0.1
    """The last part of the text, kept for validation if there is no `val_data`."""
    init: str | None = None
    """Begin with the weights and the tokenizer of another model: a run folder, a folder or file of
    another project (see fastgpt.interop), or a name on the Hugging Face hub, say gpt2. It brings
    its shape, of which block_size alone may be made smaller."""
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

    lora_rank: int = 0
    """Train small matrices of this rank beside the weights of `init`, which stay as they are (LoRA,
    Hu et al. 2021); 0 to train all weights."""
    lora_alpha: float = 16.0
    """How much they count: their product is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Share of their inputs dropped while training."""
    lora_targets: Literal["all", "attention", "mlp"] = "all"
    """Which linear layers get them: those of attention, those of the MLPs, or all."""

    batch_size: int = 12
    """Sequences per micro-batch: what a process holds in memory at once."""
    grad_accum: int = 1
    """Micro-batches per step. A step is batch_size * grad_accum sequences, which several processes
    share out among themselves: the run is the same on any number of them, but for rounding and for
    what dropout drops."""
    find_batch: bool = False
    """Take the largest micro-batch that fits the memory; a step's sequences stay the same."""
    max_steps: int = 4500
    """Optimizer steps."""
    epochs: float | None = None
    """Go through the training text so often, instead of max_steps; the warm-up is then a tenth of
    the steps at most."""
    lr: float = 6e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule; by default a tenth of lr."""
    warmup_steps: int = 180
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls to min_lr after the warm-up: half a cosine, a line, or not until
    the last part of the run (warm-up, stable, decay)."""
    decay_fraction: float = 0.2
    """The last part of the steps, in which "wsd" lowers the learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices and embeddings only."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.99
    """AdamW's decay of the squared gradient's mean."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 for no clipping."""
    max_skipped: int = 5
    """Updates in a row that may be left out because their gradient is not finite; then it ends."""
    ema: float = 0.0
    """Keep a moving average of the weights that decays so much a step (say 0.999), and evaluate,
    sample and offer that one; 0 for none."""

    eval_interval: int = 500
    """Steps between evaluations; each saves a checkpoint (the best and the newest are kept). 0 for
    about twenty in the run, and one an epoch at least, where that is not over a hundred."""
    eval_tokens: int = 1_000_000
    """Validation tokens per evaluation at most, the same ones each time."""
    patience: int = 0
    """Evaluations without a better loss after which training stops early; 0 for never."""
    keep: int = 2
    """Newest checkpoints to keep; the best is kept besides."""
    sample_tokens: int = 500
    """Length of the text sample at the end."""
    sample_interval: int = 0
    """Steps between text samples while training; 0 for none before the end."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where to log besides metrics.jsonl: tensorboard, wandb."""
    seed: int = 1337
    """Fixes weights, data order and dropout."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of the products: auto is bfloat16 where the processor has units for it (float16 on
    older GPUs), else float32. Weights are float32 always."""
    ops: Literal["auto", "triton", "native", "reference"] = "auto"
    """Implementation of the operations (see fastgpt.ops)."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Use torch.compile; auto: on CUDA. Where it fails, a warning says why, and training goes on
    without it."""
    recompute: bool = False
    """Compute each block's activations twice instead of keeping them: less memory, a third more
    work."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes (torchrun): each holds the whole model (ddp), or a part of it and of
    the optimizer's state (fsdp)."""

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
        for name in _AT_LEAST_ZERO:
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UsageError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not (self.tokenizer in TOKENIZERS or is_path(self.tokenizer)):
            raise UsageError(
                f"tokenizer must be one of {', '.join(TOKENIZERS)} or the path of a file or folder "
                f"(./{self.tokenizer}), not {self.tokenizer!r}"
            )
        if self.epochs is not None and not 0.0 < self.epochs < float("inf"):
            raise UsageError(f"epochs must be more than 0, not {self.epochs}")
        if self.lora_rank and not self.init:
            raise UsageError("lora_rank is for the weights of another model: give it with --init")
        if not 0.0 < self.lora_alpha < float("inf"):
            raise UsageError(f"lora_alpha must be more than 0, not {self.lora_alpha}")
        if self.min_lr is not None and not 0.0 <= self.min_lr <= self.lr:
            raise UsageError(f"min_lr must be from 0 to lr ({self.lr}), not {self.min_lr}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if not 0.0 < self.val_fraction < 1.0:
            raise UsageError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise UsageError(f"decay_fraction must be in (0, 1], not {self.decay_fraction}")
        if unknown := set(self.log) - {"tensorboard", "wandb"}:
            raise UsageError(f"log must be of tensorboard and wandb, not {', '.join(unknown)}")


_AT_LEAST_ONE = (
    *("n_layer", "n_head", "n_embd", "block_size"),
    *("batch_size", "grad_accum", "max_steps", "max_skipped", "eval_tokens", "keep"),
    "vocab_size",
)
_AT_LEAST_ZERO = (
    *("lr", "weight_decay", "grad_clip", "warmup_steps", "patience"),
    *("sample_tokens", "sample_interval", "eval_interval", "lora_rank"),
)


def is_path(name: str) -> bool:
    """Whether a name is meant for a path, by its looks alone: a run may outlive the file."""
    return any(sign in name for sign in "./\\")


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


_TINYSTORIES = Recipe(
    data="",
    tokenizer="bpe",
    vocab_size=10_000,
    val_fraction=0.01,
    n_layer=6,
    n_head=8,
    n_embd=512,
    block_size=256,
    dropout=0.1,
    bias=True,
    batch_size=64,
    epochs=1.0,
    lr=6e-4,
    warmup_steps=1000,
    beta2=0.95,
    eval_interval=0,
    sample_tokens=200,
)
_STORY_300K = Recipe(
    data="",
    tokenizer="gpt2",
    n_layer=12,
    n_head=12,
    n_embd=768,
    block_size=256,
    dropout=0.1,
    bias=True,
    batch_size=8,
    epochs=10.0,
    lr=5e-4,
    warmup_steps=100,
    beta2=0.95,
    eval_interval=0,
    patience=5,
    sample_tokens=200,
)
# With the rate of the one above it stops at twice the perplexity: there are ten times fewer steps.
_BEDTIME_512 = replace(_STORY_300K, block_size=512, batch_size=2, lr=2e-4)
_FINETUNE = replace(_STORY_300K, init="gpt2", epochs=5.0, lr=3e-5, beta2=0.999, patience=4)

RECIPES: dict[str, Recipe] = {
    "shakespeare-char": Recipe(),
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

# What each is, and what to expect: of figures, those with "some" are estimates from a step's speed.
DESCRIPTIONS: dict[str, str] = {
    "shakespeare-char": "characters of Shakespeare's plays; 2 cores: loss 1.66 in 2 minutes",
    "tinystories": "25M parameters, TinyStories (--data), own vocabulary; 2 cores: some 2 days",
    "story-300k": "124M parameters on 300,000 tokens (--data); 2 cores: some 2 hours",
    "bedtime-512": "the same on 30,000 tokens, context 512; 2 busy cores: 23 minutes",
    "finetune": "GPT-2's weights, or --init MODEL, go on with your text (--data)",
    "finetune-lora": "the same by small matrices beside frozen weights (LoRA)",
    "gpt2": "GPT-2, 124M parameters, on your text (--data); an H200: 535,000 tokens/s",
    "gpt2-medium": "GPT-2, 355M parameters; wants a GPU, as all that follow",
    "gpt2-large": "GPT-2, 774M parameters",
    "gpt2-xl": "GPT-2, 1.6B parameters",
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
        return Recipe(**{**values, "log": tuple(values.get("log", ()))})  # JSON has lists only
    except TypeError as error:
        raise UsageError(f"{source}: a setting has a value of the wrong kind: {error}") from None
