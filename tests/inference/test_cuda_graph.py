"""Captured and replayed generation steps. Without a GPU, a tape emulates the CUDA graph.

Like a graph, the tape records only which operators ran on which memory, and nothing of the Python
code. Operators that transfer values between host and device raise an error, as in a capture.
"""

import gc
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastgpt import GPT, GPTConfig
from fastgpt.inference import cuda_graph, session
from fastgpt.inference.generation import complete, generate
from fastgpt.inference.kv_cache import KVCache, StepCache
from fastgpt.inference.sampling import Sampler
from fastgpt.inference.session import GenerationRequest
from tests.backends import INTERPRETED

ATEN = torch.ops.aten
OF_THE_HOST = (
    ATEN._local_scalar_dense.default,
    ATEN.lift_fresh.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
)


class Watch(TorchDispatchMode):
    """Raises an error for operators that synchronize the host with a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in OF_THE_HOST, f"{func} makes the host wait"
        return func(*args, **kwargs or {})


class Tape(Watch):
    """Records operators, then undoes their effects, because a capture does not execute anything."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.kept: list[Any] = []  # keeps them alive: new tensors would reuse their addresses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(value)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in inputs:  # neither a view nor in place
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def record_on_tape(function: Callable[[], Any]) -> Callable[[], Any]:
    tape = Tape()
    with tape:
        result = function()
    tape.undo()

    def play() -> Any:
        tape.play()
        return result

    return play


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace CUDA graphs by tapes; the returned list has one entry per recording."""
    found: list[Any] = []

    def capture(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        found.append(function.__name__)
        return record_on_tape(function)

    monkeypatch.setattr(session, "can_capture", lambda model: True)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    return found


@pytest.fixture
def model() -> GPT:
    model = GPT(GPTConfig(61, 32, 2, 2, 32), ops="reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


PROMPTS = [torch.arange(n) for n in (3, 9, 1, 40)]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("n", [1, 2])
def test_replayed_steps_write_the_same(
    model: GPT, recordings: list[Any], sampling: dict[str, Any], n: int
) -> None:
    """Also beyond the context, where windows slide at different times between the replays."""
    found = complete(model, PROMPTS, 90, n=n, seed=4, **sampling)
    assert len(recordings) == 1
    reference = complete(model, PROMPTS, 90, n=n, seed=4, use_cache=False, **sampling)
    assert len(recordings) == 1
    for ours, theirs in zip(chain(*found), chain(*reference), strict=True):
        assert ours.ids == theirs.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_replayed_steps_fill_rows_that_have_ended(model: GPT, recordings: list[Any]) -> None:
    ids = torch.arange(12).view(4, 3)
    free = generate(model, ids, 60, seed=2)
    stop = int(free[0, 30])
    found = generate(model, ids, 60, seed=2, stop_token=stop)
    assert len(recordings) == 2
    for row, whole in zip(found, free, strict=True):
        end = next((i for i, token in enumerate(whole.tolist()) if i > 2 and token == stop), 62)
        assert torch.equal(row[: end + 1], whole[: row.numel()][: end + 1])
        assert (row[end:] == stop).all() or end == 62


def test_what_has_been_written_leaves_nothing_for_the_collector(
    model: GPT, recordings: list[Any]
) -> None:
    """A reference cycle would keep the cache and the graph in GPU memory."""
    run = model.start_session(GenerationRequest([torch.tensor([1])], 30, Sampler(), 1))
    while run.step() is not None:
        pass
    assert recordings == ["_decode_step"]
    gone = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert gone() is None
    finally:
        gc.enable()


def test_a_recording_must_be_worth_it(model: GPT, recordings: list[Any]) -> None:
    generate(model, torch.tensor([[1]]), 18, temperature=0)
    assert not recordings
    generate(model, torch.tensor([[1]]), 25, temperature=0)
    assert len(recordings) == 1


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter")
def test_the_kernels_steps_replay(model: GPT, recordings: list[Any]) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = generate(model, ids, 22, seed=1)
    assert torch.equal(generate(model.use_ops("triton"), ids, 22, seed=1), expected)
    assert len(recordings) == 2


@pytest.mark.parametrize("sampling", SETTINGS)
def test_the_host_waits_for_no_step(
    model: GPT, recordings: list[Any], sampling: dict[str, Any]
) -> None:
    """A step without a window move or a new block of random numbers does not synchronize."""
    sampler = Sampler(**sampling)
    prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    run = model.start_session(GenerationRequest(prompts, 28, sampler, 1))
    for _ in range(4):
        run.step()
    with Watch():
        for _ in range(20):
            run.step()
    assert len(recordings) == 1
    assert run.lengths == [26, 25]


def test_a_step_depends_on_no_number_of_the_host(model: GPT) -> None:
    cache = KVCache(model, 2, 9)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model.hidden(ids, cache)
    cache.set_lengths([3, 1])
    last = torch.tensor([[7], [8]])
    with torch.no_grad():
        play = record_on_tape(lambda: model.hidden(last, StepCache(cache)))
        assert cache.lengths.tolist() == [3, 1]
        play()
        last.copy_(torch.tensor([[9], [10]]))
        found = play()
    assert cache.lengths.tolist() == [5, 3]
    for row, text in enumerate(([1, 2, 3, 7, 9], [4, 8, 10])):
        expected = model.hidden(torch.tensor([text]))[0, -1]
        torch.testing.assert_close(found[row, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_gpu_replays_what_it_would_write(sampling: dict[str, Any], backend: str) -> None:
    model = GPT(GPTConfig(1000, 64, 2, 2, 64), ops=backend).cuda().eval()
    ids = torch.arange(12).view(4, 3)
    found = generate(model, ids, 150, seed=1, **sampling)
    before = torch.cuda.memory_allocated()
    assert torch.equal(found, generate(model, ids.cuda(), 150, seed=1, **sampling).cpu())
    reference = generate(model, ids, 150, seed=1, use_cache=False, **sampling)
    assert (found == reference).float().mean() > 0.9
    assert torch.cuda.memory_allocated() == before
