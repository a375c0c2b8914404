"""Generation by the engine, compared to its PyTorch reference implementation."""

import gc
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt import GPT, CharTokenizer, GPTConfig
from fastgpt.inference.engine import Engine
from fastgpt.inference.generation import complete, generate, stream
from fastgpt.inference.kv_cache import window_start
from fastgpt.inference.sampling import Sampler
from fastgpt.inference.session import GenerationRequest
from fastgpt.inference.text import generate_texts, stream_text
from fastgpt.interop import load
from fastgpt.utils.errors import UsageError
from tests.engine.models import DTYPES, emulated_logits, prompt, random_model, small_model


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def engine(model: GPT) -> Engine:
    return Engine.from_model(model, "float32", 2)


def test_greedy_text_is_that_of_the_reference() -> None:
    """Twenty prompts of different lengths, and a hundred tokens each, beyond the context of 64."""
    model = random_model(GPTConfig(300, 64, 3, 4, 64), std=0.25)
    engine = Engine.from_model(model, "float32", 2)
    for i in range(20):
        ids = prompt(1, 1 + 4 * i, 300, seed=i)
        expected = generate(model, ids, 100, temperature=0)
        assert torch.equal(engine.generate(ids, 100, temperature=0), expected)


@pytest.mark.parametrize(
    ("dtype", "near"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.05)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_is_that_of_the_roundings_it_says_it_makes(
    dtype: Any, near: float, tied: bool
) -> None:
    """Except where two logits are nearly equal and the rounding error decides."""
    model = random_model(GPTConfig(300, 256, 3, 4, 64, tie_weights=tied), std=0.2)
    ids = Engine.from_model(model, dtype, 2, group=32).generate(
        prompt(20, 8, 300), 200, temperature=0
    )
    logits = emulated_logits(model, dtype, 32, ids[:, :-1])[:, 7:]  # after the prompts
    written = logits.gather(2, ids[:, 8:, None])[..., 0]
    behind = (logits.amax(-1) - written) / logits.std()
    assert behind.max() < near
    assert (behind == 0).float().mean() > 0.99


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1e-8},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 61},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.99},
    {"top_p": 1e-9},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.8},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("time", [1, 5, 16, 17, 50])
def test_sampled_text_is_that_of_the_reference(
    model: GPT, engine: Engine, time: int, sampling: dict[str, Any]
) -> None:
    """From inside the context to far beyond it."""
    ids = prompt(3, time)
    expected = generate(model, ids, 40, seed=5, **sampling)
    assert torch.equal(engine.generate(ids, 40, seed=5, **sampling), expected)


def test_sampling_from_a_large_vocabulary_is_that_of_the_reference() -> None:
    """Candidates are then searched in blocks and sorted a few at a time."""
    model = random_model(GPTConfig(50257, 16, 1, 2, 32), std=0.02)
    engine = Engine.from_model(model, "float32", 1)
    ids = prompt(2, 3, 50257)
    for sampling in ({}, {"top_k": 50}, {"top_k": 5000}, {"top_p": 0.3}, {"top_p": 0.95}):
        expected = generate(model, ids, 8, seed=2**40 + 7, **sampling)
        assert torch.equal(engine.generate(ids, 8, seed=2**40 + 7, **sampling), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_cache_changes_nothing(model: GPT, dtype: str, threads: int) -> None:
    """Compare each token to a recomputation of its whole window."""
    engine = Engine.from_model(model, dtype, threads)
    ids = engine.generate(prompt(2, 3), 60, temperature=0)
    for length in range(3, 63):
        window = ids[:, window_start(length, 16) : length]
        assert torch.equal(engine.prefill(window).argmax(-1), ids[:, length])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: str) -> None:
    model = random_model(GPTConfig(61, 128, 2, 3, 96))
    first, *others = (
        Engine.from_model(model, dtype, n).logits(prompt(2, 128)) for n in (1, 2, 3, 7)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_text_in_any_batch(model: GPT, dtype: str) -> None:
    engine = Engine.from_model(model, dtype, 2)
    ids = prompt(14, 6)
    whole = engine.generate(ids, 30, seed=list(range(7, 21)))
    assert torch.equal(whole, engine.generate(ids, 30, seed=7))
    for row in range(14):
        alone = engine.generate(ids[row : row + 1], 30, seed=7 + row)
        assert torch.equal(alone[0], whole[row])
    assert not torch.equal(whole, engine.generate(ids, 30, seed=100))
    assert not torch.equal(engine.generate(ids, 30), engine.generate(ids, 30))


def test_prompts_of_different_lengths_are_read_as_if_alone(engine: Engine) -> None:
    prompts = [prompt(1, time, seed=time)[0].tolist() for time in (1, 30, 16, 7)]
    together = complete(engine, prompts, 40, seed=[1, 2, 3, 4])
    for row, ids in enumerate(prompts):
        alone = engine.generate(torch.tensor([ids]), 40, seed=row + 1)
        assert together[row][0].ids == alone[0, len(ids) :].tolist()


def test_a_prompt_longer_than_a_pass_takes_at_once() -> None:
    """A pass computes 512 tokens at once, and rows may be split between passes."""
    model = random_model(GPTConfig(61, 700, 2, 2, 32))
    ids = prompt(3, 650)
    engine = Engine.from_model(model, "float32", 2)
    expected = model(ids)[:, -1].detach()
    assert (engine.prefill(ids) - expected).abs().max() < 1e-4 * expected.std()
    assert torch.equal(
        engine.generate(ids, 70, temperature=0), generate(model, ids, 70, temperature=0)
    )


def test_a_row_ends_at_the_stop_token(model: GPT, engine: Engine) -> None:
    free = generate(model, prompt(3), 30, seed=2)
    stop = int(free[0, 9])
    expected = generate(model, prompt(3), 30, seed=2, stop_token=stop)
    assert torch.equal(engine.generate(prompt(3), 30, seed=2, stop_token=stop), expected)
    alone = generate(model, prompt(3)[:1], 30, seed=2, stop_token=stop)
    assert torch.equal(engine.generate(prompt(3)[:1], 30, seed=2, stop_token=stop), alone)


def test_tokens_come_one_by_one(model: GPT, engine: Engine) -> None:
    expected = list(stream(model, prompt(), 9, seed=4, top_k=9))
    got = list(engine.stream(prompt(), 9, seed=4, top_k=9))
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_two_streams_of_one_engine_do_not_mix(engine: Engine) -> None:
    first, second = prompt(2, 5, seed=1), prompt(3, 9, seed=2)
    pairs = list(
        zip(engine.stream(first, 20, seed=1), engine.stream(second, 20, seed=2), strict=True)
    )
    assert torch.equal(
        torch.stack([a for a, _ in pairs], 1), engine.generate(first, 20, seed=1)[:, 5:]
    )
    assert torch.equal(
        torch.stack([b for _, b in pairs], 1), engine.generate(second, 20, seed=2)[:, 9:]
    )


def test_nothing_new_is_a_copy(engine: Engine) -> None:
    assert torch.equal(engine.generate(prompt(), 0), prompt())


@pytest.mark.parametrize("kind", ["model", "engine"])
def test_prefill_is_part_of_the_first_step(model: GPT, engine: Engine, kind: str) -> None:
    """Calling it explicitly, once or twice, changes nothing."""
    source = {"model": model, "engine": engine}[kind]
    request = GenerationRequest(prompt(), 9, Sampler(top_k=9, repetition_penalty=1.2), 4)
    expected = list(stream(model, prompt(), 9, seed=4, top_k=9, repetition_penalty=1.2))
    session = source.start_session(request)
    for tokens in expected:
        logits = session.prefill()
        assert torch.equal(session.prefill(), logits)
        assert torch.equal(session.step(), tokens)
    assert session.step() is None


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers Ctrl-C to the whole console")
def test_ctrl_c_stops_generation(engine: Engine) -> None:
    """A generation that would take a day ends, and the engine can be used again."""
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    # A shell makes commands that it starts in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompt(), 10**9)
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.generate(prompt(), 3).shape == (2, 8)


def test_python_runs_while_a_step_is_computed() -> None:
    """Another thread keeps counting, which it could not while generation holds the GIL."""
    engine = Engine.from_model(random_model(GPTConfig(61, 512, 4, 4, 256)), "float32", 1)
    ids = prompt(4, 512)
    counted, over = 0, threading.Event()

    def read() -> None:
        engine.prefill(ids)
        over.set()

    thread = threading.Thread(target=read)
    thread.start()
    while not over.is_set():
        counted += 1
    thread.join()
    assert counted > 1000


def test_engines_in_threads_do_not_disturb_each_other() -> None:
    models = [small_model(seed) for seed in (1, 2)]
    engines = [Engine.from_model(model, "float32", 2) for model in models]
    expected = [generate(model, prompt(), 100, seed=1) for model in models]
    right: list[bool] = []

    def write(index: int) -> None:
        for _ in range(5):
            ids = engines[index].generate(prompt(), 100, seed=1)
            right.append(torch.equal(ids, expected[index]))

    threads = [threading.Thread(target=write, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_a_thousand_generations_leak_nothing(engine: Engine) -> None:
    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(100):
        engine.generate(prompt(), 5, seed=1)
    before = resident()
    for _ in range(1000):
        engine.generate(prompt(), 5, seed=1, repetition_penalty=1.1)
    assert resident() - before < 4 << 20


FORK = """
import os, torch
from tests.engine.models import prompt, small_model
from fastgpt.inference.engine import Engine
engines = [Engine.from_model(small_model(), "float32", 2) for _ in range(2)]
expected = engines[0].generate(prompt(), 5, seed=1)
child = os.fork()
if child == 0:
    same = [torch.equal(engine.generate(prompt(), 5, seed=1), expected) for engine in engines]
    engines.clear()
    os._exit(0 if all(same) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(engines[0].generate(prompt(), 5, seed=1), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_engines_work_in_a_forked_process() -> None:
    """Two engines, because threads started after the fork may reuse handles from before it."""
    run_alone(FORK)


SCARCE = """
import os, resource, torch
from fastgpt import GPTConfig
from fastgpt.inference.engine import Engine
from tests.engine.models import prompt, random_model, small_model

def allow(megabytes):
    taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + (megabytes << 20), most))
"""

FEW_THREADS = """
model = small_model()
allow(1024)
for dtype in ("float32", "int4"):
    try:
        Engine.from_model(model, dtype, 1000)
        raise AssertionError("there were 1000 stacks of 2 MB at least")
    except ValueError as error:
        assert "cannot start 1000 threads: the system allows only " in str(error)
assert Engine.from_model(model, "float32", 2).generate(prompt(), 3).shape == (2, 8)
"""

LITTLE_MEMORY = """
model = random_model(GPTConfig(61, 512, 1, 4, 1024), std=0.02)
engine = Engine.from_model(model, "float32", 1)
expected = engine.prefill(prompt(1, 200))
allow(12)
try:
    engine.prefill(prompt(1, 512))
    raise AssertionError("it takes 27 MB to compute in")
except MemoryError:
    pass
allow(1024)
assert torch.equal(engine.prefill(prompt(1, 200)), expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="limits ASan's memory, too")
@pytest.mark.parametrize("script", [FEW_THREADS, LITTLE_MEMORY], ids=["threads", "memory"])
def test_what_is_scarce_ends_in_an_error_and_the_rest_goes_on(script: str) -> None:
    run_alone(SCARCE + script)


def run_alone(script: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_as_many_tokens_as_can_be_counted() -> None:
    """The largest count that fits 64 bits together with the length of a prompt."""
    model = random_model(GPTConfig(61, 256, 1, 2, 32))
    ids = prompt(1, 5)
    text = Engine.from_model(model, "float32", 1).stream(ids, 2**64 - 1, temperature=0)
    written = torch.stack([next(text) for _ in range(240)], 1)
    assert torch.equal(written, generate(model, ids, 240, temperature=0)[:, 5:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, not nan"),
        ({"top_k": -1}, "top_k must be at least 1 .*not -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], not 1.5"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], not 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-9 to 1e9, not 0.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be from -2 to 2, not inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be from -2 to 2, not nan"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"seed": [1, 2, 3]}, "3 seeds for 2 rows"),
        ({"seed": -1}, r"a seed must be from 0 to 2\^63 - 1, not -1"),
    ],
)
def test_invalid_settings_are_rejected(engine: Engine, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.stream(prompt(), **{"max_new_tokens": 3, **wrong})  # raises without being iterated


INTEGERS = ["max_new_tokens", "n", "top_k", "stop_token", "seed"]
NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in INTEGERS for value in (1.5, 2.0, "2", math.inf)]
    + [(name, value) for name in NUMBERS for value in ("0.5", 1j)]
    + [("max_new_tokens", None), ("n", None), ("temperature", None), ("seed", [0, 1.0])],
)
def test_settings_of_a_wrong_type_are_rejected_alike(
    model: GPT, engine: Engine, name: str, value: Any
) -> None:
    """The prompt is longer than the context, where 1.5 new tokens never ended."""
    kind = "a number" if name in NUMBERS else "an integer"
    shown = value[1] if isinstance(value, list) else value
    for generator in (model, engine):
        with pytest.raises(TypeError, match=re.escape(f"{name} must be {kind}, not {shown!r}")):
            stream(generator, prompt(2, 20), **{"max_new_tokens": 3, name: value})


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [(name, kind(2), 2) for name in INTEGERS for kind in (np.int64, np.uint8, torch.tensor)]
    + [(name, kind("0.5"), 0.5) for name in NUMBERS for kind in (np.float32, Fraction, Decimal)]
    + [("top_k", True, 1), ("top_k", False, None), ("presence_penalty", True, 1.0)],
)
def test_numbers_of_any_type_are_the_same_in_both_engines(
    model: GPT, engine: Engine, name: str, value: Any, same: Any
) -> None:
    for generator in (model, engine):
        settings = {"max_new_tokens": 3, "seed": 5, "n": 1}
        expected = generate(generator, prompt(), **settings | {name: same})
        assert torch.equal(generator.generate(prompt(), **settings | {name: value}), expected)
        assert value == same or same is None  # a tensor is not changed by counting down


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.tolist,
        lambda ids: tuple(map(tuple, ids.tolist())),
        torch.Tensor.numpy,
        lambda ids: ids.numpy().astype(np.uint16),
        lambda ids: np.frombuffer(ids.numpy().tobytes(), np.int64).reshape(2, 5),  # read-only
        lambda ids: ids.to(torch.uint16),
    ],
)
def test_ids_of_any_kind_give_the_same_tokens_in_both_engines(
    model: GPT, engine: Engine, kind: Callable[[torch.Tensor], Any]
) -> None:
    ids = kind(prompt())
    for generator in (model, engine):
        expected = generator.generate(prompt(), 5, seed=1)
        assert torch.equal(generator.generate(ids, 5, seed=1), expected)
        steps = torch.stack(list(stream(generator, ids, 5, seed=1)), 1)
        assert torch.equal(steps, expected[:, 5:])
        completions = complete(generator, ids, 5, seed=1)
        assert [completion.ids for (completion,) in completions] == steps.tolist()
    assert torch.equal(engine.logits(ids), engine.logits(prompt()))
    assert torch.equal(engine.prefill(ids), engine.prefill(prompt()))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[batch, tokens\].*not \[3\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"at least one token, not \[1, 0\]"),
        (torch.tensor([[3, 61]]), "token id 61 is outside the model's vocabulary of 61"),
        (torch.tensor([[-1, 3]]), "token id -1 is outside"),
        ([1, 2], r"\[batch, tokens\].*not \[2\]; for one prompt: \[tokenizer.encode\(text\)\]"),
        ([[]], r"at least one token, not \[1, 0\]"),
        ([[1], [2, 3]], "rows of equal length .*for prompts of different lengths: .*complete"),
        ([[1.0, 2.0]], "token ids must be integers, not torch.float32"),
        ([[True, False]], "token ids must be integers, not torch.bool"),
        ([[2**70]], "ids must be"),
        ("abc", "ids must be a tensor, an array or a list"),
    ],
)
def test_wrong_ids_are_refused(model: GPT, engine: Engine, ids: Any, message: str) -> None:
    for generator in (model, engine):
        with pytest.raises(ValueError, match=message):
            generator.generate(ids, 3)


def test_more_tokens_than_the_context_have_no_logits(engine: Engine) -> None:
    with pytest.raises(ValueError, match="17 tokens are more than the model's context of 16"):
        engine.logits(prompt(1, 17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wpe.weight", "h.1.attn.c_proj.weight", "h.0.ln_1.bias"])
def test_weights_that_are_not_finite_are_refused(dtype: str, name: str) -> None:
    model = small_model()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=f"{name} contains NaN or infinity"):
        Engine.from_model(model, dtype)


def test_overflow_on_the_way_says_so_and_ends_the_text() -> None:
    model = small_model()
    with torch.no_grad():
        model.ln_f.weight.fill_(1e38)
    ids = Engine.from_model(model, "float32", 1).stream(prompt(), 5)
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        next(ids)


def test_more_than_can_be_counted_is_as_much_as_there_is(model: GPT, engine: Engine) -> None:
    many = 10**30
    expected = generate(model, prompt(), 5, seed=1, top_k=61)
    assert torch.equal(generate(engine, prompt(), 5, seed=1, top_k=many), expected)
    assert torch.equal(generate(engine, prompt(), 5, seed=1, stop_token=many), expected)
    steps = stream(engine, prompt(), many, seed=1)
    assert torch.equal(torch.stack([next(steps) for _ in range(5)], 1), expected[:, 5:])
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        next(engine.stream(prompt(), 3, n=0))


def test_wrong_numbers_of_threads_and_dtypes_are_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="threads must be from 1 to 1024, not 5000"):
        Engine.from_model(model, threads=5000)
    with pytest.raises(ValueError, match=r"dtype must be one of .*not 'int2'"):
        Engine.from_model(model, "int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be 32 or 64, not 16"):
        Engine.from_model(model, "int4", group=16)


def test_a_model_in_bfloat16_is_taken(model: GPT) -> None:
    half = small_model().bfloat16()
    expected = half.float()(prompt()).detach()
    got = Engine.from_model(half.bfloat16(), "float32", 1).logits(prompt())
    assert (got - expected).abs().max() < 1e-4


def test_the_settings_are_those_of_the_dataclass() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'heat'"):
        Engine.from_model(small_model()).generate(prompt(), 3, heat=1.0)
    assert Sampler().temperature == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_a_file_as_from_the_model_that_it_holds(tmp_path: Path, dtype: Any) -> None:
    """Also if the vocabulary is padded, and if the file stores matrices transposed."""
    saved = random_model(GPTConfig(70, 16, 2, 2, 32, tie_weights=False))
    characters = CharTokenizer([chr(0x100 + i) for i in range(61)])
    saved.save_pretrained(tmp_path / "model", characters)
    model, _ = load(tmp_path / "model")
    engine, tokenizer = Engine.from_pretrained(tmp_path / "model", dtype, 2)
    assert engine.config == model.config
    assert tokenizer.vocab_size == engine.config.vocab_size == 61
    assert torch.equal(engine.logits(prompt()), Engine.from_model(model, dtype).logits(prompt()))
    with pytest.raises(UsageError, match="nothing does not exist"):
        Engine.from_pretrained(tmp_path / "nothing")


# --- as `fastgpt.inference.generation` and `fastgpt.inference.text` use it ------------------------


def test_prompts_of_any_lengths_and_their_logprobs_as_pytorch_does(
    model: GPT, engine: Engine
) -> None:
    generator = torch.Generator().manual_seed(9)
    size = model.config.vocab_size
    prompts = [torch.randint(size, (n,), generator=generator) for n in (5, 1, 16, 17, 40, 2)]
    settings = {"n": 2, "seed": 3, "top_k": 7, "repetition_penalty": 1.2}
    expected = complete(model, prompts, 20, **settings)
    found = complete(engine, prompts, 20, **settings)
    for ours, theirs in zip(chain(*found), chain(*expected), strict=True):
        assert ours.ids == theirs.ids
        assert ours.finish == theirs.finish
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    ends = {expected[0][0].ids[3], expected[2][1].ids[5]}
    stopped = complete(engine, prompts, 20, **settings, stop_tokens=ends)
    reference = complete(model, prompts, 20, **settings, stop_tokens=ends)
    assert [c.ids for c in chain(*stopped)] == [c.ids for c in chain(*reference)]
    assert complete(engine, [], 20) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", [1, 15, 16, 40])
def test_texts_of_one_prompt_are_those_of_its_copies(model: GPT, dtype: Any, time: int) -> None:
    """The shared prompt is processed once; keys, values and logits are bitwise those of copies."""
    engine = Engine.from_model(model, dtype, 2)
    ids = prompt(2, time, model.config.vocab_size)
    expected = generate(engine, ids.repeat_interleave(3, 0), 20, seed=8)
    assert torch.equal(generate(engine, ids, 20, n=3, seed=8), expected)
    session = engine.start_session(GenerationRequest(ids, 20, Sampler(), 8, 3))
    session.end(3)  # before anything is processed
    steps = [session.step() for _ in range(20)]
    others = [0, 1, 2, 4, 5]
    assert torch.equal(torch.stack(steps, 1)[others], expected[others, time:])


def test_text_as_from_pytorch(model: GPT) -> None:
    characters = CharTokenizer([chr(0x100 + i) for i in range(model.config.vocab_size)])
    engine, text = model.quantize("float32"), characters.decode([1, 2, 3])
    streams = [stream_text(m, characters, text, 40, seed=6, stop=["xx"]) for m in (model, engine)]
    assert list(streams[0]) == list(streams[1])
    stop = [characters.decode([5]), characters.decode([9])]
    whole = [
        generate_texts(m, characters, [text, characters.decode([7])], 40, seed=6, stop=stop, n=2)
        for m in (model, engine)
    ]
    assert [[w.text for w in row] for row in whole[0]] == [
        [w.text for w in row] for row in whole[1]
    ]
    for write_tokens in (complete, generate):
        with pytest.raises(ValueError, match="n must be at least 1, not 0"):
            write_tokens(engine, prompt(), 3, n=0)
        with pytest.raises(ValueError, match="an Engine always uses a cache"):
            write_tokens(engine, prompt(), 3, use_cache=False)
