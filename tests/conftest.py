"""Settings and fixtures shared by the test folders."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fastgpt import Tokenizer

if not torch.cuda.is_available():
    # The kernels then run in Triton's interpreter. It must be enabled before Triton is imported
    # (which transformers does), because Triton's own library consists of `@triton.jit` functions.
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network

torch.set_num_threads(1)  # the models are too small for several threads

# The duration of an example depends more on the load of the machine than on the code.
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
    """Return a file with 12,000 characters of Shakespeare."""
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
