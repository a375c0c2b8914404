"""fastgpt's engine and other generation engines behind a common interface.

All engines use the weights of the same model (`random_gpt2`); `benchmarks.peer_models` writes the
files for the engines that load files. Each engine is configured to be as fast as possible on a CPU:
the key/value cache is updated in place, logits are computed for the last token only, and its
precision is the one nearest to the requested precision.
"""

import importlib.util
import json
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import seconds
from fastgpt import GPT, GPTConfig
from fastgpt.inference.engine import Engine
from fastgpt.inference.generation import stream
from fastgpt.inference.quantization import Dtype

PRECISIONS: tuple[Dtype, ...] = ("float32", "bfloat16", "int8", "int4")
PROMPT, LONG_PROMPT = 32, 512


def random_gpt2() -> GPT:
    """Return a model with the shape of GPT-2 124M and random weights, the same in every call."""
    torch.manual_seed(1)
    return GPT(GPTConfig(), ops="native").eval()


def load_engines(
    model: GPT, precision: Dtype, threads: int, folder: Path | None
) -> dict[str, "GenerationEngine"]:
    """Load all engines that support the precision; report missing ones once on stderr.

    folder: the output of `benchmarks.peer_models`; None excludes all engines that need files.
    """
    torch.set_num_threads(threads)
    engines: dict[str, GenerationEngine] = {"fastgpt": FastGPT(model, precision, threads)}
    if precision in ("float32", "bfloat16"):
        dtype = getattr(torch, precision)
        engines["fastgpt in PyTorch"] = FastGPTInPyTorch(model.config, dtype)
        if _installed("transformers", "transformers"):
            engines["transformers"] = Transformers(dtype)
    for peer in PEERS if folder is not None else ():
        if folder is not None and precision in peer.files and _installed(peer.name, peer.package):
            path = folder / peer.files[precision]
            if path.exists():
                engines[peer.name] = peer.load(path, precision, threads)
            else:
                _report_missing(peer.name, f"{path} does not exist")
    return engines


class GenerationEngine(ABC):
    """Interface of a measured engine; both methods return seconds."""

    @abstractmethod
    def decode(self, prompts: Tensor, new: int) -> float:
        """Generate `new` tokens for each prompt; return the time from the first to the last."""

    @abstractmethod
    def read(self, prompt: Tensor) -> float:
        """Process a prompt; return the time to the logits of the first new token."""


class FastGPT(GenerationEngine):
    """fastgpt's native engine."""

    def __init__(self, model: GPT, precision: Dtype, threads: int) -> None:
        self.engine = Engine.from_model(model, precision, threads)

    def decode(self, prompts: Tensor, new: int) -> float:
        times = [time.perf_counter() for _ in self.engine.stream(prompts, new, temperature=0)]
        return times[-1] - times[0]

    def read(self, prompt: Tensor) -> float:
        return seconds(lambda: self.engine.prefill(prompt))


class FastGPTInPyTorch(GenerationEngine):
    """fastgpt's generation in PyTorch."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype) -> None:
        self.model = GPT(config, ops="native").to(dtype).eval()

    def decode(self, prompts: Tensor, new: int) -> float:
        times = [time.perf_counter() for _ in stream(self.model, prompts, new, temperature=0)]
        return times[-1] - times[0]

    @torch.no_grad()
    def read(self, prompt: Tensor) -> float:
        return seconds(lambda: self.model.logits(self.model.hidden(prompt)[:, -1]))


class Transformers(GenerationEngine):
    """`generate` of Hugging Face transformers."""

    def __init__(self, dtype: torch.dtype) -> None:
        import transformers

        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype).eval()

    def decode(self, prompts: Tensor, new: int) -> float:
        if len(prompts) > 1:  # streamers support one row only: subtract the time of the first token
            first = seconds(lambda: self._generate(prompts, 1))
            return seconds(lambda: self._generate(prompts, new)) - first
        clock = Clock()
        self._generate(prompts, new, streamer=clock)
        return clock.times[-1] - clock.times[1]  # the first call of the streamer is the prompt

    @torch.no_grad()
    def read(self, prompt: Tensor) -> float:
        return seconds(lambda: self.model(prompt, logits_to_keep=1))

    def _generate(self, prompts: Tensor, new: int, **settings: Any) -> None:
        self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )


class Clock:
    """The times at which tokens arrive; a streamer of transformers."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class LlamaCpp(GenerationEngine):
    """llama.cpp through its C interface, used as in its own benchmark: without sampling."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        silence(llama_cpp)
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        self.threads = threads
        self.context: Any = None
        weakref.finalize(self, llama_cpp.llama_model_free, self.model)

    def decode(self, prompts: Tensor, new: int) -> float:
        rows, length = prompts.shape
        self._open(rows, length + new)
        self._run([(r, t, int(i)) for r, ids in enumerate(prompts) for t, i in enumerate(ids)])
        begin = time.perf_counter()
        for t in range(length, length + new - 1):
            self._run([(r, t, 17) for r in range(rows)])
        taken = time.perf_counter() - begin
        self._close()
        return taken

    def read(self, prompt: Tensor) -> float:
        self._open(1, prompt.size(1))
        taken = seconds(lambda: self._run([(0, t, int(i)) for t, i in enumerate(prompt[0])]))
        self._close()
        return taken

    def _open(self, rows: int, positions: int) -> None:
        """Create an empty context of just this size: attention covers the whole context."""
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * (-(-positions // 256) * 256), rows
        settings.n_batch = settings.n_ubatch = max(LONG_PROMPT, rows * PROMPT)
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, settings)

    def _close(self) -> None:
        """Free the context and its threads."""
        self.api.llama_free(self.context)

    def _run(self, tokens: list[tuple[int, int, int]]) -> None:
        """Process (row, position, id) triples, with logits for the last one of each row."""
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


class CTranslate2(GenerationEngine):
    """`generate_batch` of CTranslate2, which quantizes the weights when it loads them."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(path), compute_type=precision, intra_threads=threads, inter_threads=1
        )
        self.names: list[str] = json.loads((path / "vocabulary.json").read_text("utf-8"))

    def decode(self, prompts: Tensor, new: int) -> float:
        clock = Clock()
        self._generate(prompts, new, callback=clock.put)
        # The callback is called once per row and token.
        return clock.times[-1] - clock.times[len(prompts) - 1]

    def read(self, prompt: Tensor) -> float:
        return seconds(lambda: self._generate(prompt, 1))

    def _generate(self, prompts: Tensor, new: int, **settings: Any) -> None:
        tokens = [[self.names[i] for i in row] for row in prompts.tolist()]
        self.generator.generate_batch(
            tokens, max_length=new, min_length=new, include_prompt_in_result=False, **settings
        )


class SteppedEngine(GenerationEngine):
    """An engine that executes single steps, in a greedy decoding loop of this class."""

    @abstractmethod
    def open(self, rows: int, positions: int) -> None:
        """Start new sequences of at most `positions` tokens each."""

    @abstractmethod
    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append ids to the sequences and return the logits of the next token.

        ids: `[B, T]`, contiguous. The logits, `[B, V]`, are valid until the next step.
        """

    def decode(self, prompts: Tensor, new: int) -> float:
        self.open(len(prompts), prompts.size(1) + new)
        ids = self.step(prompts.numpy()).argmax(-1, keepdims=True)
        begin = time.perf_counter()
        for _ in range(new - 1):
            ids = self.step(ids).argmax(-1, keepdims=True)
        return time.perf_counter() - begin

    def read(self, prompt: Tensor) -> float:
        self.open(*prompt.shape)
        return seconds(lambda: self.step(prompt.numpy()))


class OnnxRuntime(SteppedEngine):
    """onnxruntime with the graph of `benchmarks.onnx_gpt2`."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        # Threads spin while they wait for work during a run; this stops the spinning after a run.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        self.session: Any = onnxruntime.InferenceSession(
            path, settings, providers=["CPUExecutionProvider"]
        )
        self.total = np.zeros(1, np.int32)

    def open(self, rows: int, positions: int) -> None:
        # Each key/value buffer is bound both as past and as present.
        self.binding = self.session.io_binding()
        self.total[:] = 0
        self.last_key = np.zeros(rows, np.int32)
        self.kept = []
        for past in self.session.get_inputs():
            if past.name.startswith("past."):
                _, heads, _, width = past.shape
                buffer = np.zeros((rows, heads, positions, width), np.float32)
                self.kept.append(buffer)
                self._bind(past.name, buffer)
                self._bind(past.name.replace("past", "present"), buffer)
        self.logits = np.zeros((rows, self.session.get_outputs()[0].shape[1]), np.float32)
        for name in ("logits", "total", "last_key"):
            self._bind(name, getattr(self, name))

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        length = int(self.total[0])
        # Bound by address, like ids: both must stay alive until the end of the run.
        positions = np.arange(length, length + ids.shape[1])
        self.total += ids.shape[1]
        self.last_key[:] = self.total - 1
        self._bind("ids", ids)
        self._bind("positions", positions)
        self.session.run_with_iobinding(self.binding)
        return self.logits

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        output = name.startswith(("present.", "logits"))
        bind = self.binding.bind_output if output else self.binding.bind_input
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class OpenVino(SteppedEngine):
    """OpenVINO with the model of `benchmarks.openvino_gpt2`, which has an internal cache."""

    def __init__(self, path: Path, precision: str, threads: int, **more: str) -> None:
        import openvino

        settings: dict[str, str | int] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            # Keys and values are stored in 8 bits unless KV_CACHE_PRECISION is set.
            **more,
        }
        if precision == "float32":  # on CPUs with bfloat16 instructions, the default is bfloat16
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        model = openvino.Core().compile_model(path, "CPU", settings)
        self.tensor: Any = openvino.Tensor
        self.request: Any = model.create_infer_request()
        self.length = 0

    def open(self, rows: int, positions: int) -> None:
        self.request.reset_state()
        self.length = 0
        self._set("beam_idx", np.arange(rows, dtype=np.int32))

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._set("ids", ids)
        self._set("positions", np.arange(self.length, self.length + ids.shape[1]))
        self.length += ids.shape[1]
        self.request.infer()
        logits: NDArray[np.float32] = self.request.get_tensor("logits").data
        return logits

    def _set(self, name: str, value: NDArray[Any]) -> None:
        self.request.set_tensor(name, self.tensor(value, shared_memory=False))


@dataclass(frozen=True)
class Peer:
    """An engine that loads files, with one file for each supported precision."""

    name: str
    package: str
    load: Callable[[Path, str, int], GenerationEngine]
    files: Mapping[Dtype, str]


# CTranslate2 supports neither bfloat16 nor 4 bits on a CPU, and onnxruntime's CPU operations do not
# support bfloat16.
PEERS = (
    Peer(
        *("llama.cpp", "llama_cpp", LlamaCpp),
        dict(zip(PRECISIONS, ("f32.gguf", "bf16.gguf", "q8_0.gguf", "q4_0.gguf"), strict=True)),
    ),
    Peer(
        *("ctranslate2", "ctranslate2", CTranslate2),
        dict.fromkeys(("float32", "int8"), "ctranslate2"),
    ),
    Peer(
        *("onnxruntime", "onnxruntime", OnnxRuntime),
        {name: f"onnx/{name}.onnx" for name in ("float32", "int8", "int4")},
    ),
    Peer(
        *("onnxruntime by channel", "onnxruntime", OnnxRuntime),
        {"int8": "onnx/int8_channels.onnx"},
    ),
    Peer(
        *("openvino", "openvino", OpenVino),
        {name: f"openvino/{name}.xml" for name in ("float32", "int8", "int4")}
        | {"bfloat16": "openvino/float32.xml"},
    ),
)


def silence(llama_cpp: Any) -> None:
    """Disable llama.cpp's log with a callback that stays alive as long as the module."""
    llama_cpp.fastgpt_silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(llama_cpp.fastgpt_silent, None)


def _installed(name: str, package: str) -> bool:
    if importlib.util.find_spec(package):
        return True
    _report_missing(name, f"{package} is not installed")
    return False


@cache  # print each message once
def _report_missing(name: str, why: str) -> None:
    print(f"without {name}: {why}", file=sys.stderr)
