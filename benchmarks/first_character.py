"""Measure the time from the start of a command to the first generated character, with imports.

    python -m benchmarks.first_character FOLDER

FOLDER is a Hugging Face model folder with a tokenizer, such as `hf` in the output of
`python -m benchmarks.peer_models`. The commands are `python -m fastgpt.generate` in each precision,
an equivalent script with transformers, and `import torch` alone. Their runs are interleaved; the
output is the median of each.
"""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import tyro

from benchmarks.common import interleaved

PROMPT = "Hello"
TRANSFORMERS = f"""
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
class Printer:  # transformers' own TextStreamer keeps a word back until it is whole
    def put(self, tokens):
        print(tokenizer.decode(tokens.flatten()), end="", flush=True)
    def end(self):
        pass
model.generate(
    **tokenizer("{PROMPT}", return_tensors="pt"),
    max_new_tokens=20, min_new_tokens=20, do_sample=True, pad_token_id=0, streamer=Printer(),
)
"""


def main(model: tyro.conf.Positional[Path], rounds: int = 5) -> None:
    """Run the benchmark and print the results.

    Args:
        model: the Hugging Face model folder.
        rounds: rounds in which each command runs once, after a warm-up.
    """
    folder = str(model)
    write = [sys.executable, "-m", "fastgpt.generate", folder, "--prompt", PROMPT]
    commands = {
        f"fastgpt, {dtype}": [*write, "--max-new-tokens", "20", "--dtype", dtype]
        for dtype in ("float32", "bfloat16", "int8", "int4")
    }
    commands["transformers"] = [sys.executable, "-c", TRANSFORMERS, folder]
    commands["import torch"] = [sys.executable, "-c", f"import torch; print('{PROMPT}.')"]
    runs = {name: partial(first_character_seconds, command) for name, command in commands.items()}
    for name, times in interleaved(runs, rounds, warm_up=1).items():
        print(f"{name:<18} {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


def first_character_seconds(command: list[str]) -> float:
    """Run a command; return the seconds until the first byte after the prompt."""
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdout is not None
        if len(process.stdout.read(len(PROMPT) + 1)) != len(PROMPT) + 1:
            raise RuntimeError(f"no output from {command}")
        taken = time.perf_counter() - began
        process.stdout.read()
    return taken


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
