"""`python -m benchmarks.peer_models FOLDER`: write one model in the formats of other engines.

The model has the shape of GPT-2 124M and random weights. The files are for
`python -m benchmarks.bench_generate --peers FOLDER`. An engine is skipped with a message if the
packages that write its files are not installed. Existing files are kept.

    hf/                              transformers; also the source of CTranslate2's files
    *.gguf                           llama.cpp: needs gguf, and llama-cpp-python for q4_0
    ctranslate2/                     needs ctranslate2 and transformers
    onnx/*.onnx                      needs onnx, and onnxruntime to check them
    openvino/*.xml, *.bin            needs openvino, and nncf for int8 and int4
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.generation_peers import OnnxRuntime, OpenVino, SteppedEngine, random_gpt2, silence
from fastgpt import GPT
from fastgpt.interop import gguf
from fastgpt.tokenizer import Tokenizer

GGUF_PRECISIONS: tuple[gguf.Precision, ...] = ("f32", "bf16", "q8_0")
LLAMA_FTYPE_Q4_0 = 2
# Maximum difference of logits from fastgpt's, whose standard deviation is about 0.55. The
# quantization errors of random weights are large.
TOLERANCES = {"float32": 1e-3, "int8": 0.15, "int8_channels": 0.15, "int4": 1.5}


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the files that do not exist yet."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_gpt2()
    _make(folder / "hf", [], lambda path: model.save_pretrained(path, Tokenizer.gpt2()))
    for kind in GGUF_PRECISIONS:
        _make(folder / f"{kind}.gguf", ["gguf"], partial(_gguf, model, kind))
    _make(folder / "q4_0.gguf", ["llama_cpp"], _gguf_in_4_bits)
    _make(folder / "ctranslate2", ["ctranslate2", "transformers"], _ctranslate2)
    for precision in TOLERANCES:
        path = folder / "onnx" / f"{precision}.onnx"
        _make(path, ["onnx", "onnxruntime"], partial(_onnx, model, precision))
    for precision in ("float32", "int8", "int4"):
        packages = ["openvino"] if precision == "float32" else ["openvino", "nncf"]
        path = folder / "openvino" / f"{precision}.xml"
        _make(path, packages, partial(_openvino, model, precision))


def _make(path: Path, packages: list[str], write: Callable[[Path], None]) -> None:
    """Write a file, or print why it is skipped."""
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if path.exists():
        print(f"{path} already exists")
    elif missing:
        print(f"{path} is skipped: {', '.join(missing)} not installed")
    else:
        path.parent.mkdir(exist_ok=True)
        write(path)
        print(f"{path} written", flush=True)


def _gguf(model: GPT, precision: gguf.Precision, path: Path) -> None:
    gguf.write(model, path, Tokenizer.gpt2(), precision)


def _gguf_in_4_bits(path: Path) -> None:
    """Quantize f32.gguf with llama.cpp: blocks to 4 bits, table and head to its defaults."""
    import llama_cpp

    silence(llama_cpp)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = LLAMA_FTYPE_Q4_0
    source = path.with_name("f32.gguf")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(settings)
    )
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {source}")


def _ctranslate2(path: Path) -> None:
    """Convert the Hugging Face folder to float32, which CTranslate2 quantizes when it loads it."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(path.with_name("hf"))).convert(str(path))


def _onnx(model: GPT, precision: str, path: Path) -> None:
    from benchmarks import onnx_gpt2

    onnx_gpt2.write(model, path, precision)
    _check(OnnxRuntime(path, precision, 1), model, path, TOLERANCES[precision])


def _openvino(model: GPT, precision: str, path: Path) -> None:
    from benchmarks import openvino_gpt2

    openvino_gpt2.write(model, path, precision)
    engine = OpenVino(path, "float32", 1, KV_CACHE_PRECISION="f32")
    _check(engine, model, path, TOLERANCES[precision])


@torch.no_grad()
def _check(engine: SteppedEngine, model: GPT, path: Path, tolerance: float) -> None:
    """Compare the logits of two rows after a prompt and after each of three further tokens.

    A file whose logits differ from fastgpt's by more than `tolerance` is deleted.
    """
    ids = torch.randint(
        model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1)
    )
    truth = model(ids).numpy()
    engine.open(2, 20)
    furthest = 0.0
    for begin, end in ((0, 17), (17, 18), (18, 19), (19, 20)):
        logits = engine.step(ids[:, begin:end].contiguous().numpy())
        furthest = max(furthest, float(np.abs(logits - truth[:, end - 1]).max()))
    if not furthest <= tolerance:
        path.unlink()
        raise RuntimeError(
            f"{path}: a logit differs from fastgpt's by {furthest:.2g}, more than {tolerance}"
        )
    print(f"{path}: logits within {furthest:.1g} of fastgpt's")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
