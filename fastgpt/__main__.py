"""Command-line entry point: `python -m fastgpt COMMAND ...` and the console script `fastgpt`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError

COMMANDS = {
    "train": "train a model; with no arguments, on the packaged Shakespeare",
    "prepare": "tokenize texts into shards to train on",
    "generate": "generate text with a trained model",
    "evaluate": "measure a model: loss and perplexity on a text, HellaSwag, LAMBADA",
    "lm_eval": "run EleutherAI's lm-evaluation-harness on a model",
    "convert": "export a model to Hugging Face transformers, llama.cpp or nanoGPT",
    "plot": "compare runs: a plot of their losses, and a table",
}


def dispatch(args: Sequence[str]) -> None:
    """Run the command named by the first argument, or list the commands if there is none."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: fastgpt COMMAND [--help]\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10}{purpose}")
        return
    if args[0] not in COMMANDS:
        raise UsageError(f"unknown command {args[0]!r}; choose one of {', '.join(COMMANDS)}")
    import_module(f"fastgpt.{args[0]}").main(args[1:])


def main() -> None:
    """Run the console script."""
    cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
