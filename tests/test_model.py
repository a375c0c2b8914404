"""The network compared to stored activations of a trained model and to Hugging Face's GPT-2."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt import GPT, GPTConfig, ops
from fastgpt.model import meta_weights
from fastgpt.ops import reference
from tests.backends import BACKENDS

NANO = Path(__file__).parent / "assets" / "gpt-nano-sort"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def nano_sort(backend: str) -> GPT:
    """Load minGPT's sorting model: https://github.com/bbycroft/llm-viz."""
    return GPT.from_pretrained(NANO, ops=backend)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(NANO / "golden.npz").items()}


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_every_sub_layer_of_a_trained_model(backend: str, golden: dict[str, Tensor]) -> None:
    model, fast = nano_sort(backend), ops.get(backend)
    block = model.h[0]

    def check(name: str, value: Tensor) -> Tensor:
        # relative to the tensor's largest value: entries of near-cancelling sums are not accurate
        scale = float(golden[name].abs().max())
        torch.testing.assert_close(value, golden[name], rtol=1e-5, atol=2e-6 * scale)
        return value

    ids = golden["idx"].long()
    check("tok_emb", model.wte(ids))
    check("pos_emb", model.wpe(torch.arange(11))[None])
    x = check("x", model.wte(ids) + model.wpe(torch.arange(11)))
    normed = check("ln1", block.ln_1(x, None, fast)[0])
    qkv = check("qkv", block.attn.c_attn(normed))
    q, k, v = reference.split_heads(qkv, 3)
    check("q", q), check("k", k), check("v", v)
    check("attSm", reference.attention_weights(q, k))
    y = check("y", fast.causal_attention(qkv, 3))
    projected = check("yProj", block.attn.c_proj(y))
    attended, stream = block.attn(x, None, block.ln_1, fast)
    torch.testing.assert_close(attended, projected)
    assert torch.equal(stream, x)
    normed, residual = block.ln_2(projected, x, fast)
    check("attnResid", residual), check("ln2", normed)
    out = check("fc", block.mlp.c_fc(normed))
    check("gelu", fast.gelu(out))
    out, stream = block.mlp(projected, x, block.ln_2, fast)
    check("mlp", out), check("attnResid", stream)
    check("mlpResid", out + residual)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_trained_model_whole(backend: str, golden: dict[str, Tensor]) -> None:
    model, fast = nano_sort(backend), ops.get(backend)
    ids = golden["idx"].long()
    x, residual = model.wte(ids) + model.wpe(torch.arange(11)), None
    for i in range(3):
        x, residual = model.h[i](x, residual, fast)
        torch.testing.assert_close(x + residual, golden[f"block{i}"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.hidden(ids), golden["ln_f"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids), golden["lm_head"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids).softmax(-1), golden["probs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trained_model_sorts(backend: str) -> None:
    model = nano_sort(backend)
    unsorted = torch.randint(3, (4 if backend == "triton" else 50, 6))
    written = model.generate(unsorted, 6, temperature=0)[:, 6:]
    assert (written == unsorted.sort(-1).values).all(-1).float().mean() > 0.95


def hugging_face(config: GPTConfig) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def named_weights(model: GPT2LMHeadModel, *, gradients: bool) -> dict[str, Tensor]:
    """Return weights by fastgpt's names and orientation; transformers' Conv1D is `[in, out]`."""
    named = {}
    for name, parameter in model.transformer.named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        assert value is not None
        named[name] = value.T if name.endswith(TRANSPOSED) else value
    return named


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time", [1, 17, 32])
def test_logits_and_gradients_are_hugging_faces(backend: str, time: int) -> None:
    config = GPTConfig(vocab_size=211, block_size=32, n_layer=3, n_head=4, n_embd=64)
    theirs = hugging_face(config).double()
    for parameter in theirs.parameters():  # move biases and norm weights away from 0 and 1
        torch.nn.init.normal_(parameter, std=0.2)
    ours = GPT(config, backend).double()
    ours.load_state_dict(named_weights(theirs, gradients=False))
    ids, targets = torch.randint(211, (2, 3, time))
    logits = theirs(ids).logits
    torch.testing.assert_close(ours(ids), logits, rtol=1e-9, atol=1e-9)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    ours(ids, targets).backward()
    expected = named_weights(theirs, gradients=True)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n_layer", [1, 3, 12])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_without_a_model_are_the_models(
    n_layer: int, tie_weights: bool, bias: bool
) -> None:
    config = GPTConfig(7, 5, n_layer, 2, 8, bias=bias, tie_weights=tie_weights)
    expected = [(name, tensor.shape) for name, tensor in GPT(config).state_dict().items()]
    assert [(name, tensor.shape) for name, tensor in meta_weights(config).items()] == expected


def test_the_defaults_are_the_released_124m() -> None:
    with torch.device("meta"):
        ours, theirs = GPT(GPTConfig()), hugging_face(GPTConfig())
    assert ours.num_params() == sum(p.numel() for p in theirs.parameters()) == 124_439_808
    assert ours.num_params(embeddings=False) == 124_439_808 - 1024 * 768


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_share_weights_and_agree(backend: str, tie_weights: bool, bias: bool) -> None:
    config = GPTConfig(97, 24, 2, 3, 48, bias=bias, tie_weights=tie_weights)
    model = GPT(config, "reference").double()
    ids, targets = torch.randint(97, (2, 2, 24))
    names = list(model.state_dict())
    results = []
    for name in ("reference", backend):
        model.use_ops(name).zero_grad()
        loss = model(ids, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert list(model.state_dict()) == names
    for truth, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)


def test_initialisation_is_gpt2s() -> None:
    model = GPT(GPTConfig(1000, 256, 8, 4, 256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 1 / sqrt(2 · 8 layers)
            assert abs(parameter.std().item() - std) < 0.03 * std, name
    assert model.head_weight is model.wte.weight


def test_no_position_sees_the_future() -> None:
    model = GPT(GPTConfig(50, 16, 2, 2, 32)).eval()
    ids = torch.randint(50, (1, 16))
    changed = ids.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_dropout_only_while_training() -> None:
    model = GPT(GPTConfig(50, 16, 2, 2, 32, dropout=0.5))
    ids = torch.randint(50, (2, 16))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_ignored_targets_do_not_count() -> None:
    model = GPT(GPTConfig(50, 16, 1, 2, 32)).eval()
    ids, targets = torch.randint(50, (2, 1, 16))
    part = targets.clone()
    part[:, 5:] = -100
    torch.testing.assert_close(model(ids, part), model(ids[:, :5], targets[:, :5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 50, "n_head": 4}, "50 is not a multiple of 4; .* n_embd=4[8]|n_embd=52"),
        ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
        ({"vocab_size": -3}, "vocab_size must be at least 1, not -3"),
        ({"n_layer": 2.0}, "n_layer must be an integer, not 2.0"),
        ({"n_layer": True}, "n_layer must be an integer, not True"),
        ({"vocab_size": 10**30}, "vocab_size must be at most 16777216, not 10{30}"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": "0"}, "dropout must be a number, not '0'"),
        ({"layer_norm_eps": math.nan}, r"layer_norm_eps must be in \[0, 1\], not nan"),
        ({"bias": "false"}, "bias must be true or false, not 'false'"),
        ({"tie_weights": None}, "tie_weights must be true or false, not None"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**change)


def test_a_text_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens are more than the model's context of 16"):
        GPT(GPTConfig(50, 16, 1, 2, 32))(torch.zeros(1, 17, dtype=torch.int64))


def test_a_model_can_be_copied_and_changed_apart() -> None:
    model = GPT(GPTConfig(50, 16, 1, 2, 32), "native")
    reference_model = copy.deepcopy(model).use_ops("reference")
    assert (model.ops, reference_model.ops) == ("native", "reference")
    with torch.no_grad():
        reference_model.wte.weight.zero_()
    assert model.wte.weight.abs().sum() > 0


def gradients_under_autocast(model: GPT, ids: Tensor, targets: Tensor, steps: int) -> list[Tensor]:
    """Return loss and gradients under bfloat16 autocast, with weight casts shared by micro-batches.

    The casts are cached until the outermost autocast context ends.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=False):  # outer context: keeps the cache
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, targets)
            (loss / steps).backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("max_logits", [2**25, 97 * 8])
def test_bfloat16_on_a_cpu(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to fp64 within bfloat16's 8 bits, with fp32 gradients for fp32 weights."""
    monkeypatch.setattr(ops, "MAX_LOGITS", max_logits)
    model = GPT(GPTConfig(97, 24, 2, 3, 48), "native")
    exact = copy.deepcopy(model).double().use_ops("reference")
    ids, targets = torch.randint(97, (2, 2, 24))
    loss = exact(ids, targets)
    loss.backward()
    truth = [loss.detach(), *(p.grad for p in exact.parameters())]
    for ours, true in zip(gradients_under_autocast(model, ids, targets, 2), truth, strict=True):
        assert ours.dtype == torch.float32
        error = (ours - true).norm() / true.norm()
        assert error < 4 * 2**-8


@pytest.mark.parametrize("bias", [True, False])
def test_weights_may_be_frozen(bias: bool) -> None:
    """Freezing any weight leaves the gradients of the others unchanged."""
    model = GPT(GPTConfig(97, 24, 2, 3, 48, bias=bias), "native")
    ids, targets = torch.randint(97, (2, 2, 24))
    model(ids, targets).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for frozen in grads:
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name != frozen)
        model(ids, targets).backward()
        for name, parameter in model.named_parameters():
            if name == frozen:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, grads[name])


def test_hooks_see_the_gradients_before_they_are_stored() -> None:
    """As required by DDP: autograd delivers each gradient completely and exactly once."""
    model = GPT(GPTConfig(97, 24, 2, 3, 48), "native")
    seen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({name: seen.get(name, 0) + 1})
        )
        parameter.register_hook(lambda grad: grad * 2)
    ids, targets = torch.randint(97, (2, 2, 24))
    reference_model = copy.deepcopy(model).use_ops("reference")
    model(ids, targets).backward()
    assert seen == dict.fromkeys(dict(model.named_parameters()), 1)
    reference_model(ids, targets).backward()
    for mine, theirs in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, 2 * theirs.grad, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_over_micro_batches() -> None:
    model = GPT(GPTConfig(97, 24, 2, 3, 48), "native")
    reference_model = copy.deepcopy(model).use_ops("reference").double()
    for ids in torch.randint(97, (3, 2, 24)):
        model(ids, ids).backward()
        reference_model(ids, ids).backward()
    for mine, theirs in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_no_gradients_are_kept_where_none_are_wanted() -> None:
    model = GPT(GPTConfig(97, 24, 2, 3, 48), "native")
    ids = torch.randint(97, (2, 24))
    with torch.no_grad():
        quiet = model(ids, ids)
    with torch.inference_mode():
        quieter = model(ids, ids)
    loud = model(ids, ids)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loud.detach())
    assert torch.equal(quieter, quiet)


def test_a_compiler_sees_pytorchs_operators() -> None:
    """torch.compile captures one graph, without the C++ loops, which it cannot trace."""
    model = GPT(GPTConfig(97, 24, 2, 3, 48), "native")
    ids, targets = torch.randint(97, (2, 2, 24))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(ids, targets)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    plain = model(ids, targets)
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(grads, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
