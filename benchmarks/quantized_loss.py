"""`python -m benchmarks.quantized_loss runs/latest`: the effect of quantization on the loss.

Prints the loss in nats per token on the validation part of the run's data, in non-overlapping
windows, for each dtype of the native engine.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

import fastgpt
from fastgpt.checkpoint.load import resolve_run
from fastgpt.data.batches import gather, validation_windows
from fastgpt.data.corpus import load_corpus
from fastgpt.inference.engine import Engine
from fastgpt.training.run_folder import find_data, read_run

WEIGHTS = (("float32", 64), ("bfloat16", 64), ("int8", 64), ("int4", 64), ("int4", 32))


def main(run: tyro.conf.Positional[Path], tokens: int = 20_000) -> None:
    """Print the loss for each dtype, and its difference from float32.

    Args:
        run: the run folder.
        tokens: the number of validation tokens.
    """
    run = resolve_run(run)
    model, tokenizer = fastgpt.load(run)
    _, recipe = read_run(run)
    files = find_data(run, recipe)
    data, val_data = files["data"] or "", files["val_data"]
    val = load_corpus(data, tokenizer, recipe.val_fraction, val_data=val_data).val
    size = model.config.block_size
    inputs, targets = gather(val, validation_windows(val, size, tokens), size)
    exact = 0.0
    for dtype, group in WEIGHTS:
        engine = Engine.from_model(model, dtype, group=group)
        logits = torch.cat([engine.logits(row[None]) for row in inputs])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        exact = exact or loss
        name = f"{dtype}, groups of {group}" if dtype == "int4" else dtype
        print(f"{name:<20}{loss:.5f}  {loss / exact - 1:+.3%}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
