"""`python -m fastgpt.generate RUN --prompt "..."`: write text with a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastgpt import cli
from fastgpt.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Write text with a trained model, printing it as it comes."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder that fastgpt.train made (runs/latest is the newest one), another project's model,
    or a name on the Hugging Face hub."""
    prompt: str = ""
    """Text to continue; empty: start from nothing."""
    max_new_tokens: int = 500
    """Tokens to write."""
    temperature: float = 0.8
    """Below 1 plays safe, above 1 takes risks; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together hold this much probability."""
    seed: int | None = None
    """The same seed writes the same text."""
    skip_unknown: bool = False
    """Leave out characters of the prompt that the model has never seen, instead of refusing."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint of the run to use."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def main(args: Sequence[str]) -> None:
    """Print the prompt and its continuation."""
    options = tyro.cli(Options, args=args, prog="python -m fastgpt.generate")
    text = continue_text(options)  # every mistake is answered before the first character
    print(options.prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print()


def continue_text(options: Options) -> Iterator[str]:
    """Load the model and return the continuation, piece by piece."""
    import torch

    from fastgpt.device import find_device
    from fastgpt.generation import stream
    from fastgpt.interop import load

    device = find_device(options.device)
    model, tokenizer = load(options.run, device, checkpoint=options.checkpoint)
    unknown: Literal["ignore", "strict"] = "ignore" if options.skip_unknown else "strict"
    try:
        ids = tokenizer.encode(options.prompt, errors=unknown) or [tokenizer.start_token]
        tokens = stream(
            model,
            torch.tensor([ids], device=device),
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop_token=tokenizer.eot_token,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return tokenizer.decode_stream(i for i in map(int, tokens) if i != tokenizer.eot_token)


if __name__ == "__main__":
    cli.run(main)
