"""How good a model is while it trains: its loss on the validation part, and a text by it.

Nothing here changes what training computes. All processes must call, unless it says otherwise.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgpt.data.corpus import gather
from fastgpt.inference.generation import generate
from fastgpt.lora import merged
from fastgpt.model import GPT, meta_model
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.training.distributed import settle
from fastgpt.training.step import Learner

MOST_EXPONENT = 700.0  # e to more is beyond fp64
VALIDATION_TOKENS = 8192  # evaluated at once, on each process


@contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """Have the averaged weights in the model, within the block; nothing without an average."""
    learner.updater.swap_average()
    try:
        yield
    finally:
        learner.updater.swap_average()


@torch.no_grad()
def mean_loss(learner: Learner) -> float:
    """Return the mean loss, in nats per token, over the validation windows."""
    world, starts, size = learner.world, learner.val_starts, learner.recipe.block_size
    per_batch = max(1, VALIDATION_TOKENS // size)
    n_batches = -(-len(starts) // per_batch)
    rounds = -(-n_batches // world.size)
    learner.model.eval()
    total = 0.0
    for number in range(world.rank, rounds * world.size, world.size):
        # One that has no batch left in the last round repeats the first, for nothing: with
        # fsdp the others need it to take part.
        first = number * per_batch if number < n_batches else 0
        here = starts[first : first + per_batch]
        inputs, targets = gather(learner.corpus.val, here, size)
        with learner.precision.autocast():
            loss = learner.model(inputs.to(learner.device), targets.to(learner.device))
        if number < n_batches:
            total += loss.item() * len(here)
    learner.model.train()
    settle(learner.model)
    return world.sums(total)[0] / len(starts)


def perplexity(loss: float) -> float:
    """Return e to a loss in nats per token: among how many tokens the model is at a loss."""
    return math.exp(loss) if loss < MOST_EXPONENT else math.inf


def told(loss: float, with_perplexity: bool) -> str:
    """Write a validation loss, with the perplexity where that says something."""
    return f"{loss:.4f}" + (f", perplexity {perplexity(loss):,.1f}" if with_perplexity else "")


def whole_model(learner: Learner) -> GPT:
    """Return the model, or with fsdp a copy of it that is whole, LoRA's matrices added to it."""
    if learner.recipe.parallel != "fsdp" or learner.world.size == 1:
        return learner.model
    model = meta_model(learner.config, learner.recipe.ops)
    tensors = learner.model_tensors()
    if learner.lora:
        tensors = merged(tensors, learner.lora)
    model.load_state_dict(tensors, assign=True)
    return model


def write_sample(model: GPT, tokenizer: BaseTokenizer, n_tokens: int, seed: int) -> str:
    """Return a text of so many tokens by a whole model; for one process to call."""
    start = torch.tensor([[tokenizer.start_token]], device=model.device)
    ids = generate(model, start, n_tokens, temperature=0.8, seed=seed)
    return tokenizer.decode(ids[0, 1:])
