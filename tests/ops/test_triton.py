"""The Triton kernels as PyTorch operators: autograd, tracing, compiling, autocast, a CUDA graph.

The results of the kernels are compared to float64 in tests/kernels; these tests cover the operator
layer. Shapes are tiny because the kernels run in the interpreter; on a GPU they are compiled.
"""

import math
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fastgpt import GPT, GPTConfig, ops
from fastgpt.kernels import attention, layer_norm
from fastgpt.ops import cuda, reference
from tests.opcheck import opcheck

triton = ops.get("triton")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
OPERATORS = torch.ops.fastgpt


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(DEVICE).requires_grad_(grad)


def seed() -> Tensor:
    return torch.tensor([7], device=DEVICE)


def targets(n: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (n,)).to(DEVICE)


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "layer_norm": lambda: (randn(3, 40), None, randn(40), randn(40), 1e-5, torch.float32),
    "layer_norm without bias": lambda: (randn(3, 40), None, randn(40), None, 1e-5, torch.float16),
    "layer_norm of a sum": lambda: (
        *(randn(2, 3, 24), randn(2, 3, 24), randn(24), randn(24)),
        *(1e-5, torch.float32),
    ),
    "layer_norm of a sum of two dtypes": lambda: (
        *(randn(2, 24, dtype=torch.float16), randn(2, 24), randn(24), None),
        *(1e-5, torch.float16),
    ),
    "causal_attention": lambda: (randn(2, 9, 96), 2, 0.0, None),
    "causal_attention with dropout": lambda: (randn(1, 5, 48), 1, 0.5, seed()),
    "gelu": lambda: (randn(3, 5), None),
    "gelu of a sum": lambda: (randn(3, 8), randn(8)),
    "linear_cross_entropy": lambda: (randn(6, 16), randn(9, 16), targets(6, 9), -100, True, True),
    "linear_cross_entropy, x alone": lambda: (
        *(randn(6, 16), randn(9, 16, grad=False), targets(6, 9)),
        *(3, True, False),
    ),
    "cached_attention": lambda: (
        randn(2, 3, 1, 16, grad=False),
        *randn(2, 2, 3, 12, 16, grad=False),
        torch.tensor([4, 12], device=DEVICE),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_pytorch_knows_the_operator(call: str) -> None:
    """Run opcheck: schema, autograd, fake shapes and strides, and AOT dispatch."""
    operator = getattr(OPERATORS, call.split(" ")[0].split(",")[0]).default
    opcheck(operator, CALLS[call]())


def losses(config: GPTConfig, backend: str, steps: int, compiled: bool = False) -> list[float]:
    """Train a small model on learnable data, and return the losses."""
    torch.manual_seed(1)
    model: Any = GPT(config, ops=backend).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    ids = (torch.arange(config.block_size + 1).repeat(2, 1) * torch.tensor([[1], [3]])) % 13
    found = []
    for _ in range(steps):
        loss = run(ids[:, :-1].to(DEVICE), ids[:, 1:].to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


CONFIG = GPTConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=32)


def test_training_is_the_same_with_every_backend() -> None:
    """Over 20 steps, the losses differ by rounding errors, which grow with the steps."""
    truth = losses(CONFIG, "reference", 20)
    assert truth[-1] < truth[0] / 3
    for backend in ("native", "triton"):
        assert losses(CONFIG, backend, 20) == pytest.approx(truth, rel=2e-4), backend


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_model_compiles_as_one_graph(dropout: float) -> None:
    config = GPTConfig(17, 12, 1, 2, 32, dropout=dropout)
    compiled = losses(config, "triton", 3, compiled=True)
    assert all(map(math.isfinite, compiled))
    if not dropout:
        assert compiled == pytest.approx(losses(config, "triton", 3), rel=1e-5)


def test_inductor_expects_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise PyTorch 2.11 takes extremely long to compile the loss of a deep model."""
    inductor = types.SimpleNamespace(FALLBACK_ALLOW_LIST=set())
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", inductor)
    OPERATORS.gelu(torch.empty(3, device="meta"), None)
    assert inductor.FALLBACK_ALLOW_LIST.pop() == "fastgpt::gelu"


def test_under_autocast_results_are_of_its_dtype() -> None:
    """Including norms, unlike PyTorch; the residual stream and weight gradients stay fp32."""
    x, residual, weight = randn(2, 24, dtype=torch.float16), randn(2, 24), randn(24)
    with torch.autocast(DEVICE.type, torch.float16):
        total, y = triton.add_layer_norm(x, residual, weight, None)
        assert triton.layer_norm(residual, weight, None).dtype == torch.float16
        hidden = triton.linear_gelu(residual, randn(8, 24), randn(8))
        loss = triton.linear_cross_entropy(hidden, head := randn(9, 8), targets(2, 9))
    assert (total.dtype, y.dtype, hidden.dtype) == (torch.float32, torch.float16, torch.float16)
    assert loss.dtype == torch.float32
    (loss + y.float().sum() + total.sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (torch.float16, torch.float32)
    assert weight.grad.dtype == head.grad.dtype == torch.float32


def test_generates_under_autocast() -> None:
    """The cache is fp32 like the weights, but queries have autocast's dtype."""
    model = GPT(CONFIG, ops="triton").to(DEVICE).eval()
    ids = torch.arange(6, device=DEVICE).view(2, 3)
    with torch.autocast(DEVICE.type, torch.float16):
        q = randn(2, 2, 1, 16, dtype=torch.float16, grad=False)
        cache = randn(2, 2, 5, 16, grad=False)
        y = triton.cached_attention(q, cache, cache, torch.tensor([5, 2], device=DEVICE))
        assert y.dtype == torch.float16
        assert model.generate(ids, 3, temperature=0.0).shape == (2, 6)


def test_autocast_leaves_float64_alone() -> None:
    x, weight = randn(3, 24, dtype=torch.float64), randn(24, dtype=torch.float64)
    with torch.autocast(DEVICE.type, torch.float16):
        assert triton.layer_norm(x, weight, None).dtype == torch.float64
        assert triton.add_layer_norm(x, x, weight, None)[1].dtype == torch.float64
        assert triton.linear_cross_entropy(x, x, targets(3, 3)).dtype == torch.float64


@pytest.mark.parametrize("call", [call for call in CALLS if "cached" not in call])
def test_refuses_second_derivatives(call: str) -> None:
    """Otherwise they would silently be zero or incomplete."""
    args = CALLS[call]()
    result = getattr(OPERATORS, call.split(" ")[0].split(",")[0])(*args)
    first = result if isinstance(result, Tensor) else next(r for r in result if r.requires_grad)
    with pytest.raises(ValueError, match=r'do not support second derivatives.*ops="reference"'):
        torch.autograd.grad(first.sum(), args[0], create_graph=True)


def test_a_seed_fixes_what_is_dropped() -> None:
    qkv = randn(1, 8, 96)
    first, same, other = (triton.causal_attention(qkv, 2, 0.5, seed) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    drawn = triton.causal_attention(qkv, 2, 0.5)
    torch.manual_seed(0)
    assert torch.equal(drawn, triton.causal_attention(qkv, 2, 0.5))
    assert not torch.equal(drawn, triton.causal_attention(qkv, 2, 0.5))


def test_only_what_is_used_has_a_gradient() -> None:
    """The sum without its norm, the norm without its sum, and a frozen head."""
    x, residual, weight = randn(3, 24), randn(3, 24), randn(24)
    total, _ = triton.add_layer_norm(x, residual, weight, None)
    total.sum().backward()
    assert (x.grad == 1).all()
    assert (residual.grad == 1).all()
    assert weight.grad is None or not weight.grad.any()
    head, labels = randn(9, 24, grad=False), targets(3, 9)
    triton.linear_cross_entropy(x, head, labels).backward()
    assert head.grad is None


def test_the_losss_gradient_is_scaled_by_what_comes_after() -> None:
    x, weight, labels = randn(5, 8), randn(9, 8), targets(5, 9)
    labels[2] = -100
    grads = [
        torch.autograd.grad(3.0 * backend.linear_cross_entropy(x, weight, labels), (x, weight))
        for backend in (triton, reference)
    ]
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_auto_takes_the_faster_attention(
    dtype: torch.dtype, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's attention is faster in full fp32 and for thousands of positions."""
    monkeypatch.setattr(cuda, "uses_tf32", lambda: tf32)
    monkeypatch.setattr(cuda, "LONG", 6)
    for n_time in (5, 6):
        qkv = randn(1, n_time, 96, dtype=dtype)
        kernel = is_kernel(cuda.causal_attention(qkv, 2))
        assert kernel == (tf32 if dtype == torch.float32 else n_time < 6)
        assert is_kernel(cuda.causal_attention(qkv, 2, 0.5))


def is_kernel(out: Tensor) -> bool:
    """Return whether fastgpt's operator made a result, by the class of its autograd node."""
    return "causal_attention" in type(out.grad_fn).__name__


def test_auto_has_all_operations_and_compiles_as_one_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operations = (types.FunctionType, partial)
    names = [name for name, value in vars(reference).items() if isinstance(value, operations)]
    names = [name for name in names if hasattr(triton, name)]
    assert {"norm_mlp", "linear", "causal_attention"} <= set(names)
    assert all(hasattr(cuda, name) for name in names)
    monkeypatch.setattr(ops, "_has_kernels", lambda device: True)
    monkeypatch.setitem(ops._loaded, "cuda", cuda)
    compiled = losses(CONFIG, "auto", 3, compiled=True)
    assert compiled == pytest.approx(losses(CONFIG, "reference", 3), rel=2e-4)


def test_the_limits_are_those_of_the_kernels() -> None:
    assert ops.MAX_HEAD_DIM == attention.LARGEST_HEAD
    assert ops.MAX_WIDTH == layer_norm.MAX_WIDTH


def test_refuses_what_the_kernels_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"float32.*not torch\.int64"):
        triton.gelu(torch.ones(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="128"):
        triton.causal_attention(randn(1, 4, 3 * 160), 1)


@pytest.mark.skipif(not HAS_GPU, reason="records a CUDA graph")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_whole_training_step_records_into_a_cuda_graph(dropout: float) -> None:
    config = GPTConfig(1000, 256, 2, 2, 128, dropout=dropout)
    model = GPT(config, ops="triton").cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
    ids = torch.randint(1000, (2, 4, 256), device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids[0], ids[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        before = [step().item() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    after = []
    for _ in range(20):
        graph.replay()
        after.append(loss.item())
    assert after[-1] < after[0] < before[0]
