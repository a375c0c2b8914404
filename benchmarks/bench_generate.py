"""Generation on a CPU: tokens per second of decoding and of reading prompts, beside others'.

    python -m benchmarks.bench_generate                      GPT-2 124M's shape, random weights
    python -m benchmarks.bench_generate --gguf FOLDER        llama.cpp, too (f32, bf16, q8_0, q4_0)

One process; every contender is loaded, then measured in turns, so that all see the same machine,
and the medians of the rounds are printed with their ratio to the best other. What a round measures:
decoding (a prompt of 32, then `--new` tokens, the first not counted) with 1, 8 and 32 rows, and
reading a prompt of 512 tokens. PyTorch's contenders: fastgpt's own cached path, and transformers.
llama.cpp needs llama-cpp-python and, in FOLDER, files of a model of that shape called f32.gguf,
bf16.gguf, q8_0.gguf and q4_0.gguf (fastgpt's export writes the first three; llama.cpp's
llama_model_quantize the last).
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.engine import Engine
from fastgpt.generation import stream

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
GGUF = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
PROMPT, LONG_PROMPT = 32, 512


class Contender(Protocol):
    """What is measured: both return seconds."""

    def decode(self, prompts: Tensor, new: int) -> float:
        """Take the time from the first new token to the last."""

    def read(self, prompt: Tensor) -> float:
        """Take the time to the logits of the first new token."""


class Ours:
    """The engine."""

    def __init__(self, model: GPT, precision: str, threads: int) -> None:
        self.engine = Engine(model, precision, threads)  # type: ignore[arg-type]

    def decode(self, prompts: Tensor, new: int) -> float:
        """See Contender."""
        times: list[float] = []
        self.engine.generate(
            prompts, new, temperature=0, on_tokens=lambda _: times.append(time.perf_counter())
        )
        return times[-1] - times[0]

    def read(self, prompt: Tensor) -> float:
        """See Contender."""
        return seconds(lambda: self.engine.prefill(prompt))


class Twin:
    """fastgpt's path in PyTorch."""

    def __init__(self, model: GPT, precision: str, threads: int) -> None:
        self.model, self.threads = model, threads

    def decode(self, prompts: Tensor, new: int) -> float:
        """See Contender."""
        torch.set_num_threads(self.threads)
        times = [time.perf_counter() for _ in stream(self.model, prompts, new, temperature=0)]
        return times[-1] - times[0]

    @torch.no_grad()
    def read(self, prompt: Tensor) -> float:
        """See Contender."""
        torch.set_num_threads(self.threads)
        return seconds(lambda: self.model.logits(self.model.hidden(prompt)[:, -1]))


class Transformers:
    """Hugging Face's generate."""

    def __init__(self, model: Any, threads: int) -> None:
        self.model, self.threads = model, threads

    def decode(self, prompts: Tensor, new: int) -> float:
        """See Contender."""
        torch.set_num_threads(self.threads)
        times: list[float] = []

        class Clock:
            def put(self, _: Tensor) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        if len(prompts) > 1:  # streamers take one row: the time to the first token is taken off
            first = seconds(lambda: self._write(prompts, 1))
            return seconds(lambda: self._write(prompts, new)) - first
        self._write(prompts, new, streamer=Clock())
        return times[-1] - times[1]  # the first is the prompt

    def read(self, prompt: Tensor) -> float:
        """See Contender."""
        torch.set_num_threads(self.threads)
        with torch.no_grad():
            return seconds(lambda: self.model(prompt, logits_to_keep=1))

    def _write(self, prompts: Tensor, new: int, **more: Any) -> None:
        self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **more,
        )


class LlamaCpp:
    """llama.cpp by its C interface, as its own benchmark calls it: no sampling."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_log_set(_silence(llama_cpp), None)
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        self.threads = threads
        self.context: Any = None

    def decode(self, prompts: Tensor, new: int) -> float:
        """See Contender."""
        rows, length = prompts.shape
        self._open(rows, length + new)
        self._run([(r, t, int(i)) for r, ids in enumerate(prompts) for t, i in enumerate(ids)])
        begin = time.perf_counter()
        for t in range(length, length + new - 1):
            self._run([(r, t, 17) for r in range(rows)])
        return time.perf_counter() - begin

    def read(self, prompt: Tensor) -> float:
        """See Contender."""
        self._open(1, prompt.size(1))
        return seconds(lambda: self._run([(0, t, int(i)) for t, i in enumerate(prompt[0])]))

    def _open(self, rows: int, positions: int) -> None:
        """Make an empty context of just that size: its attention goes over all that there is."""
        if self.context is not None:
            self.api.llama_free(self.context)
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * (-(-positions // 256) * 256), rows
        settings.n_batch = settings.n_ubatch = max(LONG_PROMPT, rows * PROMPT)
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, settings)

    def _run(self, tokens: list[tuple[int, int, int]]) -> None:
        """Read (row, position, id)s, with the logits of each row's last."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (row, position, token) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = i + 1 == len(tokens) or tokens[i + 1][0] != row
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        self.api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")


def _silence(llama_cpp: Any) -> Any:
    """Return a callback for its log, kept alive with the module."""
    llama_cpp.fastgpt_silent = llama_cpp.llama_log_callback(lambda *_: None)
    return llama_cpp.fastgpt_silent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    options = parser.parse_args()
    torch.manual_seed(1)
    model = GPT(GPTConfig(), ops="native").eval()
    for precision in options.precisions:
        for threads in options.threads:
            contenders = _contenders(model, precision, threads, options.gguf)
            _report(precision, threads, contenders, options)


def _contenders(
    model: GPT, precision: str, threads: int, gguf: Path | None
) -> dict[str, Contender]:
    contenders: dict[str, Contender] = {"fastgpt": Ours(model, precision, threads)}
    if precision in ("float32", "bfloat16"):
        dtype = getattr(torch, precision)
        twin = GPT(model.config, ops="native").to(dtype).eval()
        contenders["fastgpt in PyTorch"] = Twin(twin, precision, threads)
        if importlib.util.find_spec("transformers"):
            import transformers

            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype).eval()
            contenders["transformers"] = Transformers(theirs, threads)
    if gguf is not None:
        contenders["llama.cpp"] = LlamaCpp(gguf / f"{GGUF[precision]}.gguf", threads)
    return contenders


def _report(
    precision: str, threads: int, contenders: dict[str, Contender], options: argparse.Namespace
) -> None:
    cases: list[tuple[str, int, Callable[[Contender], float]]] = []
    for rows in options.rows:
        new = options.new if rows == 1 else max(options.new // 8, 2)
        ids = torch.randint(50257, (rows, PROMPT))
        cases.append((f"decode {rows}", rows * (new - 1), _decoding(ids, new)))
    text = torch.randint(50257, (1, LONG_PROMPT))
    cases.append((f"read {LONG_PROMPT}", LONG_PROMPT, lambda c: c.read(text)))
    for name, tokens, measure in cases:
        speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for turn in range(options.rounds + 1):
            for contender, it in contenders.items():
                taken = measure(it)
                if turn > 0:  # the first warms up
                    speeds[contender].append(tokens / taken)
        medians = {contender: statistics.median(found) for contender, found in speeds.items()}
        best = max((m for contender, m in medians.items() if contender != "fastgpt"), default=0.0)
        ratio = f"  {medians['fastgpt'] / best:.2f} times the best other" if best else ""
        line = ", ".join(f"{contender} {median:.0f}" for contender, median in medians.items())
        print(f"{precision:8} {threads} threads  {name:10} {line}{ratio}", flush=True)


def _decoding(ids: Tensor, new: int) -> Callable[[Contender], float]:
    return lambda contender: contender.decode(ids, new)


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
