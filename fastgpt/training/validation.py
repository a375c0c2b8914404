"""Evaluation during training: validation loss, perplexity and samples.

Nothing here affects the training. All processes must call these functions, unless stated otherwise.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgpt.data.batches import gather
from fastgpt.inference.generation import generate
from fastgpt.lora import merge_lora
from fastgpt.model import GPT, meta_model
from fastgpt.training.distributed import reshard
from fastgpt.training.step import Learner

MOST_EXPONENT = 700.0  # math.exp overflows fp64 slightly above
VALIDATION_TOKENS = 8192  # per batch and process


@contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """Load the averaged weights into the model within the block; do nothing without averaging."""
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
        # With FSDP, all processes must take part in each forward. A process without a batch in the
        # last round repeats the first batch and ignores the result.
        first = number * per_batch if number < n_batches else 0
        here = starts[first : first + per_batch]
        inputs, targets = gather(learner.corpus.val, here, size)
        with learner.precision.autocast():
            loss = learner.model(inputs.to(learner.device), targets.to(learner.device))
        if number < n_batches:
            total += loss.item() * len(here)
    learner.model.train()
    reshard(learner.model)
    return world.all_reduce_sum(total)[0] / len(starts)


def perplexity(loss: float) -> float:
    """Return the perplexity, exp(loss), of a loss in nats per token; inf if it overflows."""
    return math.exp(loss) if loss < MOST_EXPONENT else math.inf


def format_loss(loss: float, with_perplexity: bool) -> str:
    """Format a validation loss, optionally with its perplexity."""
    return f"{loss:.4f}" + (f", perplexity {perplexity(loss):,.1f}" if with_perplexity else "")


def unsharded_model(learner: Learner) -> GPT:
    """Return the model, or with FSDP an unsharded copy of it with the LoRA weights merged."""
    if learner.recipe.parallel != "fsdp" or learner.world.size == 1:
        return learner.model
    model = meta_model(learner.config, learner.recipe.ops)
    tensors = learner.model_tensors()
    if learner.lora:
        tensors = merge_lora(tensors, learner.lora)
    model.load_state_dict(tensors, assign=True)
    return model


def generate_sample(learner: Learner, model: GPT) -> str:
    """Generate a text of `sample_tokens` tokens with an unsharded model; for a single process."""
    tokenizer, recipe = learner.corpus.tokenizer, learner.recipe
    start = torch.tensor([[tokenizer.start_token]], device=model.device)
    ids = generate(model, start, recipe.sample_tokens, temperature=0.8, seed=recipe.seed)
    return tokenizer.decode(ids[0, 1:])
