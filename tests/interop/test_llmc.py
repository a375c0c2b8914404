"""llm.c model files: exact values, and errors if the header does not match the file."""

import contextlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.interop import load, open_source
from fastgpt.interop.external import NoTokenizerError
from fastgpt.tokenizer import Tokenizer
from fastgpt.utils.errors import UsageError

CONFIG = GPTConfig(vocab_size=100, block_size=6, n_layer=3, n_head=2, n_embd=8)
PADDED = 128
ORDER = (
    *("wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight"),
    *("attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"),
    *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    *("ln_f.weight", "ln_f.bias"),
)


def random_model(config: GPTConfig = CONFIG) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    return model.eval()


def file_of(model: GPT, version: int = 3, padded: int = PADDED, magic: int = 20240326) -> bytes:
    """Return the file that llm.c writes for a model (`write_model` in its train_gpt2.py)."""
    config, weights = model.config, model.state_dict()
    header = np.zeros(256, "<i4")
    header[:8] = [
        *(magic, version, config.block_size, config.vocab_size),
        *(config.n_layer, config.n_head, config.n_embd, padded),
    ]
    parts = [header.tobytes()]
    for name in ORDER:
        names = [name] if name in weights else [f"h.{i}.{name}" for i in range(config.n_layer)]
        for tensor in (weights[n] for n in names):
            bits = tensor if version == 3 else tensor.bfloat16().view(torch.int16)
            parts.append(bits.numpy().tobytes())
        if name == "wte.weight":
            width = config.n_embd * (4 if version == 3 else 2)
            parts.append(bytes((padded - config.vocab_size) * width))
    return b"".join(parts)


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("padded", [PADDED, CONFIG.vocab_size])
def test_a_file_is_its_model_to_the_bit(version: int, padded: int, tmp_path: Path) -> None:
    model = random_model()
    path = tmp_path / "model_00000020.bin"
    path.write_bytes(file_of(model, version, padded))
    read = GPT.from_pretrained(path)
    assert read.config == model.config
    weights = model.state_dict()
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name]), name


def test_gpt2s_size_has_gpt2s_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "gpt2_124M.bin"
    path.write_bytes(file_of(random_model(GPTConfig(50257, 2, 1, 1, 2)), 5, 50304))
    model, tokenizer = load(path)
    assert tokenizer == Tokenizer.gpt2()
    assert model.config.vocab_size == 50257


def test_another_size_needs_a_tokenizer_beside_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["one text of a few words"], 260)
    path = tmp_path / "model.bin"
    path.write_bytes(file_of(random_model(replace(CONFIG, vocab_size=260)), 3, 384))
    with pytest.raises(NoTokenizerError, match="has no tokenizer for its 260 token ids"):
        load(path)
    tokenizer.save(tmp_path)
    assert load(path)[1] == tokenizer


@pytest.mark.parametrize("magic", [20240327, 20240328, 20240520, 20240522, 20240527, 20240803])
def test_its_other_files_are_told_apart(magic: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(file_of(random_model(), magic=magic))
    with pytest.raises(UsageError, match=f"magic {magic}. is not a model of llm.c, but "):
        open_source(path)


def with_header(**changes: int) -> bytes:
    """Return a file with changed integers of the header, given by their position."""
    content = bytearray(file_of(random_model()))
    for place, value in changes.items():
        struct.pack_into("<i", content, 4 * int(place.removeprefix("at_")), value)
    return bytes(content)


REFUSED = [
    (with_header()[:1000], "only 1,000 bytes: its header is truncated"),
    (with_header()[:-1], "has 15,839 bytes, but its header says 15,840"),
    (with_header() + b"x", "has 15,841 bytes, but its header says 15,840"),
    (with_header(at_1=1), "version 1 of llm.c's model format"),
    (with_header(at_2=7), "its header says 15,872"),
    (with_header(at_3=0), "header is damaged"),
    (with_header(at_3=129), "header is damaged"),
    (with_header(at_4=-3), "header is damaged"),
    (with_header(at_4=2**31 - 1), "its header says"),
    (with_header(at_5=3), "8 is not a multiple of 3"),
    (with_header(at_6=2**31 - 1), "its header says"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        GPT.from_pretrained(path)
    assert str(path) in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(4, 16_000), flips=st.lists(st.integers(0, 8 * 1024 - 1), max_size=3))
def test_damaged_headers_are_refused_or_read(size: int, flips: list[int], tmp_path: Path) -> None:
    content = bytearray(with_header()[:size])
    for flip in flips:
        if flip // 8 < len(content):
            content[flip // 8] ^= 1 << flip % 8
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with contextlib.suppress(UsageError):  # no other exception is allowed
        GPT.from_pretrained(path)


def test_a_file_that_shrinks_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(with_header())
    source = open_source(path)
    path.write_bytes(with_header()[:9000])
    with pytest.raises(UsageError, match="is truncated: "):
        source.load_model()
