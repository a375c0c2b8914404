"""What several test folders share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fastgpt import Tokenizer

if not torch.cuda.is_available():
    # The kernels then run in Triton's interpreter, which must be on before anything loads Triton:
    # its own library is made of `@triton.jit` functions too, and transformers imports it.
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network

torch.set_num_threads(1)  # tiny models: a second thread only waits

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("fastgpt", deadline=None)
settings.load_profile("fastgpt")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def checkout() -> Path:
    return ROOT


@pytest.fixture
def verse(tmp_path: Path) -> Path:
    """Twelve thousand characters of Shakespeare, in a file."""
    whole = (ROOT / "fastgpt" / "assets" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    path = tmp_path / "verse.txt"
    path.write_text(whole[:12_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture(scope="session")
def multilingual() -> str:
    return (ROOT / "tests" / "assets" / "multilingual.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def shakespeare() -> str:
    return (ROOT / "fastgpt" / "assets" / "tinyshakespeare.txt").read_text("utf-8")
