"""Tests of runs initialized from a pretrained model (`init`), including LoRA."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, Recipe, Trainer, train
from fastgpt.checkpoint.load import find_checkpoint
from fastgpt.data.pipeline import prepare
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.training.recipes import get_recipe
from fastgpt.utils.errors import UsageError
from tests.recipes import tiny_recipe
from tests.test_cli import run as command

VERDICT = Path(__file__).parents[1] / "assets" / "the-verdict.txt"
SHORT: dict[str, Any] = {"max_steps": 6, "eval_interval": 3, "sample_tokens": 10}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, shakespeare: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "verse.txt"
    path.write_text(shakespeare[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(text: Path) -> Path:
    """A run with a BPE tokenizer trained on its text."""
    recipe = tiny_recipe(text, text.parent / "bpe", tokenizer="bpe", vocab_size=300, **SHORT)
    return Trainer(recipe).fit().run


@pytest.fixture(scope="module")
def foreign(source: Path, text: Path) -> Path:
    """An exported model with settings that no recipe has: layer_norm_eps and an untied head."""
    torch.manual_seed(1)
    config = GPTConfig(300, 24, 2, 2, 16, tie_weights=False, layer_norm_eps=1e-3)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    assert tokenizer.vocab_size == 300
    GPT(config).save_pretrained(text.parent / "foreign", tokenizer)
    return text.parent / "foreign"


@pytest.fixture(scope="module")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model trained on all of the packaged plays."""
    recipe = Recipe(
        tokenizer="bpe",
        vocab_size=512,
        out=str(tmp_path_factory.mktemp("plays") / "run"),
        n_layer=2,
        n_head=4,
        n_embd=64,
        block_size=64,
        batch_size=16,
        max_steps=300,
        lr=3e-3,
        warmup_steps=20,
        eval_interval=100,
        eval_tokens=20_000,
        sample_tokens=10,
        device="cpu",
        dtype="float32",
    )
    return Trainer(recipe).fit().run


@pytest.fixture
def recipe(text: Path, source: Path, tmp_path: Path) -> Recipe:
    shape = {"n_layer": 5, "n_embd": 40}  # not that of the source
    return tiny_recipe(text, tmp_path / "run", init=str(source), lr=1e-3, **shape, **SHORT)


def weights(run: Path, which: str = "newest") -> dict[str, Tensor]:
    return find_checkpoint(run, which).load_model().state_dict()


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def records(run: Path, key: str) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def test_a_run_begins_with_the_weights_and_the_tokenizer(recipe: Recipe, source: Path) -> None:
    trainer = Trainer(recipe)
    assert_same(trainer.model.state_dict(), weights(source))
    assert trainer.learner.corpus.tokenizer == Tokenizer.load(source / "tokenizer.json")
    resolved = trainer.recipe
    assert (resolved.n_layer, resolved.n_embd, resolved.tokenizer) == (1, 16, str(source))
    assert f"initialized from {source}: 1 layer, 2 heads, width 16, context 16" in trainer._notes
    assert trainer.model.training
    result = trainer.fit()
    assert result.step == 6
    saved = json.loads((result.run / "config.json").read_text())["recipe"]
    assert (saved["n_layer"], saved["init"]) == (1, str(source))


def test_what_no_recipe_says_comes_from_the_source_and_stays(
    recipe: Recipe, foreign: Path, tmp_path: Path
) -> None:
    """Resuming does not need the source model any more."""
    gone = shutil.copytree(foreign, tmp_path / "gone")
    begun = Trainer(replace(recipe, init=str(gone), max_steps=3, dropout=0.1, bias=False))
    assert begun.learner.config == GPTConfig(
        300, 16, 2, 2, 16, dropout=0.1, tie_weights=False, layer_norm_eps=1e-3
    )
    assert begun.recipe.bias
    run = begun.fit().run
    shutil.rmtree(gone)
    resumed = Trainer.resume(run, max_steps=5, dropout=0.2)
    assert resumed.learner.config == replace(begun.learner.config, dropout=0.2)
    assert resumed.model.h[1].mlp.dropout == 0.2
    assert resumed.fit().step == 5
    assert find_checkpoint(run).load_model().config.layer_norm_eps == 1e-3


def test_a_shorter_context_is_cropped(recipe: Recipe, foreign: Path) -> None:
    trainer = Trainer(replace(recipe, init=str(foreign), block_size=8))
    assert "context 8 of 24" in trainer._notes[0]
    whole = GPT.from_pretrained(foreign)
    ids = torch.arange(8)[None]
    trainer.model.eval()
    torch.testing.assert_close(trainer.model(ids), whole(ids))
    assert trainer.model.wpe.weight.shape == (8, 16)
    trainer.close()


def test_a_longer_context_gives_way_unless_it_was_asked_for(recipe: Recipe, foreign: Path) -> None:
    asked = replace(recipe, init=str(foreign), block_size=32)
    trainer = Trainer(asked)
    assert trainer.recipe.block_size == 24
    trainer.close()
    with pytest.raises(UsageError, match=r"block_size 32 \(the model has at most 24\)"):
        Trainer(replace(asked, out=f"{asked.out}-2"), given={"block_size"})


def test_what_contradicts_the_source_is_refused(source: Path, text: Path, tmp_path, capfd) -> None:
    common = ["--data", str(text), "--init", str(source), "--out", str(tmp_path / "run")]
    options = ["--n-layer", "2", "--n-embd", "16", "--bias", "--block-size", "32"]
    assert command(train.main, *common, *options, "--tokenizer", "gpt2") == 2
    error = capfd.readouterr().err
    for part in (
        *(str(source), "n_layer 2 (the model has 1)", "bias True (the model has False)"),
        *("block_size 32 (the model has at most 16)", "tokenizer gpt2 (the model has its own)"),
    ):
        assert part in error
    assert "n_embd" not in error
    assert not (tmp_path / "run").exists()


def test_the_recipe_that_was_named_gives_way(source: Path, text: Path, tmp_path, capfd) -> None:
    options = ["--init", str(source), "--data", str(text), "--max-steps", "1", "--device", "cpu"]
    options += ["--epochs", "None", "--out", str(tmp_path / "run"), "--val-fraction", "0.1"]
    assert command(train.main, "tinystories", *options) == 0
    assert "1 layer, 2 heads, width 16, context 16\n" in capfd.readouterr().out


def test_a_source_that_is_none(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        Trainer(replace(recipe, init=str(tmp_path / "nowhere")))
    assert not Path(recipe.out or "").exists()


def test_characters_that_the_source_does_not_know(recipe: Recipe, text: Path, tmp_path) -> None:
    letters = Trainer(tiny_recipe(text, tmp_path / "char", **SHORT | {"max_steps": 1}))
    run = letters.fit().run
    other = tmp_path / "other.txt"
    other.write_text("naïve " * 100, encoding="utf-8")
    with pytest.raises(UsageError, match=r"other.txt: character 'ï' \(U\+00EF\) at position 2"):
        Trainer(replace(recipe, data=str(other), init=str(run)))
    trainer = Trainer(replace(recipe, init=str(run), tokenizer="gpt2"))
    assert isinstance(trainer.learner.corpus.tokenizer, CharTokenizer)
    assert trainer.recipe.tokenizer == "char"
    trainer.close()


def test_prepared_data_must_have_the_sources_tokenizer(
    recipe: Recipe, source: Path, text: Path, tmp_path: Path
) -> None:
    for name, tokenizer in (("same", source / "tokenizer.json"), ("other", "gpt2")):
        prepare(text, tmp_path / name, tokenizer=tokenizer, val_fraction=0.1, progress=False)
    trainer = Trainer(replace(recipe, data=str(tmp_path / "same")))
    trainer.close()
    with pytest.raises(UsageError, match="other was prepared with another tokenizer"):
        Trainer(replace(recipe, data=str(tmp_path / "other"), out=str(tmp_path / "run2")))


def test_losses_before_and_after_are_told(source: Path, text: Path, tmp_path, capfd) -> None:
    options = ["--init", str(source), "--data", str(text), "--out", str(tmp_path / "run")]
    options += ["--max-steps", "30", "--eval-interval", "10", "--warmup-steps", "0"]
    options += ["--lr", "1e-2", "--device", "cpu", "--dtype", "float32", "--sample-tokens", "5"]
    assert command(train.main, *options) == 0
    out = capfd.readouterr().out
    losses = records(tmp_path / "run", "val_loss")
    perplexities = records(tmp_path / "run", "val_perplexity")
    assert list(losses) == [0, 10, 20, 30]
    best = min(losses, key=lambda step: losses[step])
    assert best > 0

    def message(step: int) -> str:
        assert perplexities[step] == pytest.approx(math.exp(losses[step]))
        return f"{losses[step]:.4f}, perplexity {math.exp(losses[step]):.1f}"

    assert f"before: validation loss {message(0)}\n" in out
    after = f"validation loss before: {message(0)}; after: {message(best)} at step {best}, after "
    assert after in out.splitlines()[-2]


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2, "lora_alpha": 100.0}], ids=["full", "lora"])
def test_what_only_gets_worse_leaves_the_original_as_the_best(
    recipe: Recipe, source: Path, lora: dict[str, Any]
) -> None:
    spoiling = replace(recipe, lr=1.0, grad_clip=0.0, warmup_steps=0, eval_interval=1, patience=2)
    trainer = Trainer(replace(spoiling, max_steps=50, keep=1, **lora))
    result = trainer.fit()
    assert (result.best_step, result.step) == (0, 2)
    assert result.best_val_loss == result.val_loss_before
    assert "no evaluation improved on it" in result.losses
    assert_same(weights(result.run, "best"), weights(source))


def test_stopped_before_the_first_step_it_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    """The checkpoint at step 0 has weights but no optimizer state, and can be resumed."""
    whole = Trainer(recipe).fit()
    trainer = Trainer(replace(recipe, out=str(tmp_path / "stopped")))
    step = trainer.learner.step

    def fail(*_: Any) -> None:
        raise RuntimeError("the power is out")

    trainer.learner.step = fail  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="the power is out"):
        trainer.fit()
    trainer.learner.step = step  # type: ignore[method-assign]
    assert find_checkpoint(trainer.run).step == 0
    resumed = Trainer.resume(trainer.run)
    result = resumed.fit()
    assert records(result.run, "val_loss") == records(whole.run, "val_loss")
    assert result.val_loss_before == whole.val_loss_before
    assert_same(weights(result.run), weights(whole.run))


def test_the_perplexity_of_characters_is_not_told(text: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(text, tmp_path / "run", **SHORT)
    result = Trainer(recipe).fit()
    assert not records(result.run, "val_perplexity")
    assert "perplexity" not in result.losses
    assert result.val_loss_before is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "finetune-lora"])
def test_fine_tuning_stops_before_it_overfits(name: str, plays: Path, tmp_path: Path) -> None:
    """Fine-tune on a story of 20,000 characters."""
    story = replace(
        get_recipe(name),
        data=str(VERDICT),
        init=str(plays),
        out=str(tmp_path / "story"),
        block_size=64,
        epochs=60.0,
        lr=3e-3,
        dropout=0.0,
        device="cpu",
        dtype="float32",
        sample_tokens=10,
    )
    trainer = Trainer(story)
    result = trainer.fit()
    losses = records(result.run, "val_loss")
    assert result.val_loss_before is not None
    assert result.best_val_loss < result.val_loss_before - 0.2
    assert result.best_val_loss == min(losses.values())
    best = find_checkpoint(result.run, "best")
    assert (best.step, best.val_loss) == (result.best_step, result.best_val_loss)
    assert result.step < trainer.recipe.max_steps
    assert losses[result.step] > result.best_val_loss
