"""Initialize a run from a pretrained model: its weights, configuration and tokenizer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastgpt.interop import load
from fastgpt.model import GPTConfig
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer
from fastgpt.training.distributed import World
from fastgpt.training.recipes import Recipe, is_path
from fastgpt.utils.errors import UsageError
from fastgpt.utils.progress import plural

SHAPE = ("n_layer", "n_head", "n_embd", "bias")  # settings determined by a model's weights


@dataclass(frozen=True)
class Origin:
    """The state that a run takes over from a pretrained model, or from itself when resumed.

    Attributes:
        tokenizer: The tokenizer.
        config: The model configuration.
        data_sha256: For a resumed run, the hash of its training data.
        weights: The initial weights in the main process, an empty mapping in the other processes;
            None if they will be loaded from a checkpoint.
    """

    tokenizer: BaseTokenizer
    config: GPTConfig
    data_sha256: str | None = None
    weights: Mapping[str, Tensor] | None = None


def initialize_from(
    recipe: Recipe, world: World, given: Collection[str]
) -> tuple[Recipe, Origin, str]:
    """Load the pretrained model `recipe.init`. All processes must call it.

    Args:
        recipe: The recipe, with `init` set.
        world: The processes; the main process loads the model.
        given: Names of settings that the model must not override. All others that the model
            determines are replaced by its values.

    Returns:
        The recipe with the model's shape and tokenizer, the `Origin`, and a message.

    Raises:
        UsageError: If the model cannot be loaded, or contradicts a setting in `given`.
    """
    source = recipe.init or ""
    opened = world.on_main(lambda: load(source))
    config, tokenizer = world.broadcast_object(opened and (opened[0].config, opened[1]))
    recipe = _with_shape_of(recipe, config, tokenizer, given)
    weights: dict[str, Tensor] = {}
    if opened is not None:
        model, _ = opened
        model.crop_context(recipe.block_size)
        weights = model.state_dict()
    of = f" of {config.block_size:,}" if recipe.block_size < config.block_size else ""
    note = (
        f"initialized from {source}: {plural(config.n_layer, 'layer')}, "
        f"{plural(config.n_head, 'head')}, width {config.n_embd:,}, "
        f"context {recipe.block_size:,}{of}"
    )
    config = replace(config, block_size=recipe.block_size, dropout=recipe.dropout)
    return recipe, Origin(tokenizer, config, weights=weights), note


def _with_shape_of(
    recipe: Recipe, config: GPTConfig, tokenizer: BaseTokenizer, given: Collection[str]
) -> Recipe:
    """Return the recipe with the model's shape and tokenizer.

    Raises:
        UsageError: If the model contradicts settings in `given`; the message lists them.
    """
    wrong = [
        f"{name} {getattr(recipe, name)} (the model has {getattr(config, name)})"
        for name in SHAPE
        if name in given and getattr(recipe, name) != getattr(config, name)
    ]
    if "block_size" in given and recipe.block_size > config.block_size:
        wrong.append(f"block_size {recipe.block_size} (the model has at most {config.block_size})")
    name_of_tokenizer = tokenizer_setting(tokenizer, recipe.init or "")
    if "tokenizer" in given and recipe.tokenizer != name_of_tokenizer:
        wrong.append(f"tokenizer {recipe.tokenizer} (the model has its own)")
    if wrong:
        raise UsageError(
            f"cannot initialize from {recipe.init} with {', '.join(wrong)}: omit these settings"
        )
    return replace(
        recipe,
        block_size=min(recipe.block_size, config.block_size),
        tokenizer=name_of_tokenizer,
        **{name: getattr(config, name) for name in SHAPE},
    )


def tokenizer_setting(tokenizer: BaseTokenizer, source: str) -> str:
    """Return the value of `Recipe.tokenizer` for a tokenizer loaded from `source`."""
    if isinstance(tokenizer, CharTokenizer):
        return "char"
    if tokenizer == Tokenizer.gpt2():
        return "gpt2"
    return source if is_path(source) else f"./{source}"
