"""LoRA: its results and gradients match the paper, and frozen weights cost nothing extra."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from fastgpt import GPT, GPTConfig, Recipe, Trainer
from fastgpt.checkpoint.load import CheckpointError, find_checkpoint
from fastgpt.inference.engine import Engine
from fastgpt.inference.generation import generate
from fastgpt.lora import Lora, LoraAttention, LoraMLP, add_lora, merge_lora
from fastgpt.ops import cpu, products
from fastgpt.training.memory_estimate import Setup, estimate
from fastgpt.training.optimizer import Updater, trainable
from fastgpt.utils.errors import UsageError
from tests.backends import BACKENDS
from tests.recipes import tiny_recipe
from tests.training.test_memory_estimate import measured_peak

SHAPES = {
    "gpt2": GPTConfig(31, 16, 2, 2, 32),
    "no bias": GPTConfig(31, 16, 2, 2, 32, bias=False),
    "untied": GPTConfig(31, 16, 1, 4, 32, tie_weights=False),
}
TARGETS = ("all", "attention", "mlp")


def adapted(config: GPTConfig, lora: Lora, ops: str = "native") -> GPT:
    """Return a model with nonzero LoRA matrices, as after some training."""
    model = GPT(config, ops)
    add_lora(model, lora)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if name.endswith("lora_b"):
                parameter.normal_()
    return model


def plain(model: GPT, lora: Lora) -> GPT:
    """Return the plain model with the LoRA matrices merged into the weights."""
    result = GPT(model.config, "native")
    result.load_state_dict(merge_lora(model.state_dict(), lora))
    return result


def some_ids(rows: int = 2, time: int = 16) -> Tensor:
    return torch.randint(31, (rows, time))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_begins_as_the_model_was(shape: str, backend: str) -> None:
    model, ids = GPT(SHAPES[shape], backend), some_ids()
    before = model(ids)
    add_lora(model, Lora(4, 8.0))
    torch.testing.assert_close(model(ids), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_it_computes_the_same(shape: str, targets: Any, backend: str) -> None:
    lora = Lora(3, 6.0, targets=targets)
    model, ids = adapted(SHAPES[shape], lora, backend), some_ids()
    one = plain(model, lora)
    torch.testing.assert_close(one(ids), model(ids), rtol=0.0, atol=1e-5)
    assert (one(ids) - GPT(SHAPES[shape])(ids)).abs().max() > 0.01
    assert isinstance(model.h[0].attn, LoraAttention) == (targets != "mlp")
    assert isinstance(model.h[0].mlp, LoraMLP) == (targets != "attention")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", TARGETS)
def test_its_gradients_are_those_of_the_merged_weights(targets: Any, backend: str) -> None:
    """The reference is autograd through W + scale · B A in float64."""
    config, lora = SHAPES["gpt2"], Lora(3, 6.0, targets=targets)
    model, ids = adapted(config, lora, backend), some_ids()
    model(ids, ids.roll(-1, 1)).backward()
    wide = {n: p.detach().double() for n, p in model.named_parameters()}
    leaves = {n: wide[n].requires_grad_() for n in trainable(model)}
    truth = GPT(config, "reference").double()
    functional_call(truth, merge_lora(wide, lora), (ids, ids.roll(-1, 1))).backward()
    for name, leaf in leaves.items():
        found = model.get_parameter(name).grad
        assert found is not None
        assert leaf.grad is not None
        size = float(leaf.grad.abs().max())
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-5 * size)


def test_with_a_cache_it_writes_what_the_merged_model_writes() -> None:
    lora = Lora(3, 6.0)
    model, prompt = adapted(SHAPES["gpt2"], lora).eval(), some_ids(1, 3)
    texts = [generate(m, prompt, 30, temperature=0.0) for m in (model, plain(model, lora).eval())]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("targets", TARGETS)
def test_frozen_weights_cost_no_gradients(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is computed for gradients of frozen matrices, and nothing for frozen norms."""
    made: list[tuple[int, ...]] = []
    norms: list[tuple[bool, ...]] = []
    weight_gradient, norm_backward = products.weight_gradient, cpu._norm_backward

    def watch(grad: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        made.append((grad.size(1), x.size(1)))
        return weight_gradient(grad, x, *args, **options)

    def watch_norm(*args: Any) -> Any:
        result = norm_backward(*args)
        norms.append(tuple(grad is None for grad in result))
        return result

    def refuse(*_: Any) -> None:
        raise AssertionError("the head is frozen")

    monkeypatch.setattr(products, "weight_gradient", watch)
    monkeypatch.setattr(products, "weight_gradient_into", refuse)
    monkeypatch.setattr(cpu, "_norm_backward", watch_norm)
    model, ids = adapted(SHAPES["gpt2"], Lora(3, 6.0, targets=targets)), some_ids()
    model(ids, ids).backward()
    n_layers = 2 * {"all": 4, "attention": 2, "mlp": 2}[targets]
    assert len(made) == 2 * n_layers
    assert all(3 in shape for shape in made)
    assert norms
    assert all(norm == (False, True, True) for norm in norms)
    frozen = {n: p.grad for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(model.parameters())) - 2 * n_layers
    assert set(frozen.values()) == {None}


def test_a_frozen_weight_needs_no_input() -> None:
    """The input of a frozen layer is not saved, as only the gradient of its weight needs it."""
    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(16, 32)
    for trains in (False, True):
        kept: list[tuple[int, ...]] = []

        def keep(tensor: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = cpu.linear(x, weight.requires_grad_(trains), None)
        assert ((64, 32) in kept) == trains
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, weight.detach().sum(0).expand(64, 32))


def test_in_bfloat16_the_gradients_are_near() -> None:
    lora = Lora(4, 4.0)
    model, ids = adapted(SHAPES["gpt2"], lora), some_ids()
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.mul_(0.1 if name.endswith("lora_b") else 1.0)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids, ids.roll(-1, 1))
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None})
        model.zero_grad()
    for name, grad in grads[0].items():
        assert grads[1][name].dtype == torch.float32
        assert (grads[1][name] - grad).norm() < 0.05 * grad.norm(), name


def test_what_it_drops_while_training() -> None:
    model, ids = adapted(SHAPES["gpt2"], Lora(4, 8.0, dropout=0.5)), some_ids()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    everything = {name for name, _ in model.named_parameters()}
    assert {n.rpartition(".")[2] for n in everything} == {"weight", "bias", "lora_a", "lora_b"}


def test_only_the_matrices_are_optimized_and_averaged() -> None:
    config, lora = SHAPES["gpt2"], Lora(3, 6.0)
    model = adapted(config, lora)
    names = {n for n, _ in model.named_parameters() if n.endswith(("lora_a", "lora_b"))}
    recipe = Recipe(ema=0.5, init="somewhere", lora_rank=3)
    updater = Updater(model, recipe, torch.float32)
    optimized = {p for group in updater.optimizer.param_groups for p in group["params"]}
    assert optimized == {model.get_parameter(name) for name in names}
    assert set(updater.average) == names
    assert sum(p.numel() for p in optimized) == lora.n_params(config)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_number_of_its_parameters(targets: Any) -> None:
    config, lora = SHAPES["untied"], Lora(5, 6.0, targets=targets)
    model = adapted(config, lora)
    assert sum(p.numel() for p in trainable(model).values()) == lora.n_params(config)


@pytest.mark.parametrize(
    ("config", "lora", "settings"),
    [
        pytest.param(GPTConfig(512, 128, 4, 4, 128), Lora(8, 16.0), {}, id="small"),
        pytest.param(
            GPTConfig(512, 128, 4, 4, 128), Lora(8, 16.0), {"dtype": torch.bfloat16}, id="bf16"
        ),
        pytest.param(
            GPTConfig(512, 128, 4, 4, 128), Lora(8, 16.0, 0.1), {"grad_accum": 2}, id="dropout"
        ),
        pytest.param(GPTConfig(50257, 64, 2, 4, 256), Lora(4, 8.0), {}, id="wide"),
        pytest.param(
            GPTConfig(512, 128, 4, 4, 128), Lora(8, 16.0, targets="attention"), {}, id="attention"
        ),
        pytest.param(GPTConfig(512, 128, 4, 4, 128), Lora(8, 16.0, targets="mlp"), {}, id="mlp"),
    ],
)
def test_the_estimate_of_its_memory(
    config: GPTConfig, lora: Lora, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.training.memory_estimate._uses_cpu_loops", lambda setup: False)
    needed = estimate(Setup(config, 4, lora=lora, **settings))

    def prepared(*args: Any) -> GPT:
        model = GPT(*args)
        add_lora(model, lora)
        return model

    monkeypatch.setattr("tests.training.test_memory_estimate.GPT", prepared)
    assert needed.total == pytest.approx(measured_peak(config, 4, **settings), rel=0.1)
    assert needed.optimizer == 8 * lora.n_params(config)
    assert needed.total < estimate(Setup(config, 4, **settings)).total


# --- in a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, shakespeare: str) -> Recipe:
    """Return the run folder of a trained model, and its recipe."""
    text = tmp_path_factory.mktemp("source") / "verse.txt"
    text.write_text(shakespeare[:6000], encoding="utf-8")
    settings = {"max_steps": 6, "eval_interval": 3, "sample_tokens": 10}
    recipe = tiny_recipe(text, text.parent / "run", **settings)
    Trainer(recipe).fit()
    return recipe


@pytest.fixture
def recipe(source: Recipe, tmp_path: Path) -> Recipe:
    return replace(
        source, init=source.out, out=str(tmp_path / "run"), lora_rank=2, dropout=0.1, grad_accum=2
    )


def weights(run: str | Path | None) -> dict[str, Tensor]:
    return find_checkpoint(Path(run or ""), "newest").load_model().state_dict()


def test_a_checkpoint_holds_all_and_gives_a_plain_model(recipe: Recipe) -> None:
    trainer = Trainer(replace(recipe, ema=0.5, eval_interval=6))
    result = trainer.fit()
    checkpoint = find_checkpoint(result.run, "newest")
    held, frozen = checkpoint.model_tensors(), weights(recipe.init)
    for name, tensor in frozen.items():
        assert torch.equal(held[name], tensor), name
    assert all(n.split(".")[-2] in ("lora_a", "lora_b") for n in checkpoint.optimizer_tensors())
    assert checkpoint.lora == Lora(2, 16.0, 0.0, "all")
    inputs = some_ids(1)
    model = checkpoint.load_model().eval()
    assert set(model.state_dict()) == set(frozen)
    trainer.model.eval()
    torch.testing.assert_close(model(inputs), trainer.model(inputs), rtol=0.0, atol=1e-5)
    with torch.no_grad():
        trainer.learner.updater.swap_average()
    averaged = checkpoint.load_model(ema=True).eval()
    engine, _ = Engine.from_pretrained(result.run, checkpoint="newest")
    torch.testing.assert_close(engine.logits(inputs), averaged(inputs), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(averaged(inputs), trainer.model(inputs), rtol=0.0, atol=1e-5)
    assert not torch.equal(averaged(inputs), model(inputs))


@pytest.mark.parametrize(
    "settings",
    [{}, {"recompute": True, "lora_dropout": 0.2}, {"dtype": "bfloat16", "ema": 0.9}],
    ids=["plain", "recompute", "bf16"],
)
def test_a_resumed_run_matches_an_uninterrupted_one(
    recipe: Recipe, tmp_path: Path, settings: dict[str, Any]
) -> None:
    constant = replace(recipe, schedule="constant", **settings)
    Trainer(replace(constant, out=str(tmp_path / "whole"))).fit()
    Trainer(replace(constant, out=str(tmp_path / "parted"), max_steps=3)).fit()
    Trainer.resume(tmp_path / "parted", max_steps=6).fit()
    whole, parted = tensors(tmp_path / "whole"), tensors(tmp_path / "parted")
    for one, two in zip(whole, parted, strict=True):
        assert torch.equal(one, two)


def tensors(run: Path) -> list[Tensor]:
    checkpoint = find_checkpoint(run, "newest")
    every = {**checkpoint.model_tensors(), **checkpoint.optimizer_tensors()}
    return [every[name] for name in sorted(every)]


def test_another_rank_is_another_run(recipe: Recipe) -> None:
    run = Trainer(replace(recipe, max_steps=1, eval_interval=1)).fit().run
    with pytest.raises(CheckpointError, match="changes: lora_rank 2 → 4"):
        Trainer.resume(run, lora_rank=4)
    assert json.loads((run / "config.json").read_text())["recipe"]["lora_rank"] == 2


def test_without_weights_to_begin_with_it_is_refused() -> None:
    with pytest.raises(UsageError, match="lora_rank needs a pretrained model"):
        Recipe(lora_rank=4)


def test_a_manifest_whose_lora_is_none(recipe: Recipe) -> None:
    checkpoint = find_checkpoint(Trainer(replace(recipe, max_steps=1)).fit().run, "newest")
    damaged = replace(checkpoint, extra={"lora": {"rank": 2, "color": "red"}})
    with pytest.raises(CheckpointError, match=r"manifest.json: lora is \{'rank': 2, 'color'"):
        damaged.load_model()
