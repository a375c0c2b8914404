"""Measure the time from the start of a command to the first generated character, with imports.

    python -m benchmarks.first_character FOLDER

FOLDER is a Hugging Face model folder with a tokenizer, such as `hf` in the output of
`python -m benchmarks.peer_models`. The commands are `python -m fastgpt.generate` in each precision,
an equivalent script with transformers, and `import torch` alone. Their runs are interleaved; the
output is the median of each.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = str(options.folder)
    write = [sys.executable, "-m", "fastgpt.generate", folder, "--prompt", PROMPT]
    commands = {
        f"fastgpt, {dtype}": [*write, "--max-new-tokens", "20", "--dtype", dtype]
        for dtype in ("float32", "bfloat16", "int8", "int4")
    }
    commands["transformers"] = [sys.executable, "-c", TRANSFORMERS, folder]
    commands["import torch"] = [sys.executable, "-c", f"import torch; print('{PROMPT}.')"]
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.rounds + 1):
        for name, command in commands.items():
            found = seconds(command)
            if turn > 0:  # the first round is a warm-up
                taken[name].append(found)
    for name, times in taken.items():
        print(f"{name:<18} {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


def seconds(command: list[str]) -> float:
    """Run a command; return the seconds until the first byte after the prompt."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        if len(process.stdout.read(len(PROMPT) + 1)) != len(PROMPT) + 1:
            raise RuntimeError(f"no output from {command}")
        taken = time.perf_counter() - begin
        process.stdout.read()
    return taken


if __name__ == "__main__":
    main()
