"""What a run takes over: from another model, which it begins with, or from itself, to go on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastgpt.interop import load
from fastgpt.model import GPTConfig
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer
from fastgpt.training.distributed import World
from fastgpt.training.recipes import Recipe, is_path
from fastgpt.utils.errors import UsageError

SHAPE = ("n_layer", "n_head", "n_embd", "bias")  # what a model's weights have decided


@dataclass(frozen=True)
class Origin:
    """What the recipe alone does not say of a run.

    data_sha256: of the data that a run which goes on began with. weights: to begin with, in the
    main process; empty in the others, and None where a checkpoint will bring them.
    """

    tokenizer: BaseTokenizer
    config: GPTConfig
    data_sha256: str | None = None
    weights: Mapping[str, Tensor] | None = None


def begin_from(recipe: Recipe, world: World, given: Collection[str]) -> tuple[Recipe, Origin, str]:
    """Open the model that a recipe begins with; all processes must call.

    given: settings that are there to stay; the others give way to what the model brings. Returns
    the recipe as the model has settled it, what the run takes over, and a line that says so.
    UsageError if it cannot be opened, or is not what was `given`.
    """
    source = recipe.init or ""
    opened = None
    with world.only_main() as main:
        if main:
            opened = load(source)
    config, tokenizer = world.tell(opened and (opened[0].config, opened[1]))
    recipe = _settle(recipe, config, tokenizer, given)
    weights: dict[str, Tensor] = {}
    if opened is not None:
        model, _ = opened
        model.crop_context(recipe.block_size)
        weights = model.state_dict()
    of = f" of {config.block_size:,}" if recipe.block_size < config.block_size else ""
    note = (
        f"begins with {source}: {config.n_layer} layers, {config.n_head} heads, width "
        f"{config.n_embd:,}, context {recipe.block_size:,}{of}"
    )
    config = replace(config, block_size=recipe.block_size, dropout=recipe.dropout)
    return recipe, Origin(tokenizer, config, weights=weights), note


def _settle(
    recipe: Recipe, config: GPTConfig, tokenizer: BaseTokenizer, given: Collection[str]
) -> Recipe:
    """Return the recipe with the model's shape; UsageError names what contradicts it."""
    wrong = [
        f"{name} {getattr(recipe, name)} (there it is {getattr(config, name)})"
        for name in SHAPE
        if name in given and getattr(recipe, name) != getattr(config, name)
    ]
    if "block_size" in given and recipe.block_size > config.block_size:
        wrong.append(f"block_size {recipe.block_size} (there it is {config.block_size}, at most)")
    name_of_tokenizer = _name(tokenizer, recipe.init or "")
    if "tokenizer" in given and recipe.tokenizer != name_of_tokenizer:
        wrong.append(f"tokenizer {recipe.tokenizer} (it has one of its own)")
    if wrong:
        raise UsageError(
            f"{recipe.init} cannot begin a run with {', '.join(wrong)}: leave that to the model"
        )
    return replace(
        recipe,
        block_size=min(recipe.block_size, config.block_size),
        tokenizer=name_of_tokenizer,
        **{name: getattr(config, name) for name in SHAPE},
    )


def _name(tokenizer: BaseTokenizer, source: str) -> str:
    """Return how a recipe calls the tokenizer that came from a source."""
    if isinstance(tokenizer, CharTokenizer):
        return "char"
    if tokenizer == Tokenizer.gpt2():
        return "gpt2"
    return source if is_path(source) else f"./{source}"
