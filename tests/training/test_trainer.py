"""Tests of the training loop: learning, stopping, resuming, and handling of errors."""

import errno
import json
import math
import os
import re
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig, Recipe, Tokenizer, Trainer
from fastgpt.checkpoint.load import CheckpointError, find_checkpoint
from fastgpt.data import prepare
from fastgpt.inference.engine import Engine
from fastgpt.training.optimizer import learning_rate, make_optimizer
from fastgpt.utils.errors import UsageError
from fastgpt.utils.precision import choose_precision
from fastgpt.utils.progress import Progress
from fastgpt.utils.signals import Stopped
from tests.recipes import tiny_recipe


@pytest.fixture
def tiny(verse: Path, tmp_path: Path) -> Recipe:
    """A run of about a second, with dropout so that the random state matters."""
    return tiny_recipe(verse, tmp_path / "run", dropout=0.1)


def weights(run: Path, which: str = "newest") -> dict[str, torch.Tensor]:
    return find_checkpoint(run, which).load_model().state_dict()


def records(run: Path, key: str) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r[key]) for r in map(json.loads, lines) if key in r]


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_run_learns_and_leaves_everything(tiny: Recipe) -> None:
    result = Trainer(replace(tiny, max_steps=60, eval_interval=20)).fit()
    losses = records(result.run, "val_loss")
    assert [step for step, _ in losses] == [20, 40, 60]
    assert losses[-1][1] < losses[0][1] < math.log(65)
    assert result.best_val_loss == min(loss for _, loss in losses)
    assert len(result.sample) == 20
    assert (result.run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (result.run / "sample.txt").read_text() == result.sample + "\n"
    config = json.loads((result.run / "config.json").read_text())
    assert config["recipe"]["n_embd"] == 16
    assert config["versions"]["torch"] == torch.__version__
    first = records(result.run, "loss")[0]
    assert first[0] == 1
    assert abs(first[1] - math.log(57)) < 0.5  # nearly uniform over the characters of the text


def test_a_resumed_run_matches_an_uninterrupted_one(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer(tiny).fit()
    stopped = tmp_path / "stopped"
    trainer = Trainer(replace(tiny, out=str(stopped)))
    step = Trainer._step

    def step_and_interrupt(self: Trainer) -> None:
        step(self)
        if self.step == 6:  # between two evaluations
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", step_and_interrupt)
    with pytest.raises(Stopped, match=r"stopped at step 6 and saved; .*--resume .*stopped") as info:
        trainer.fit()
    assert info.value.exit_code == 130
    monkeypatch.setattr(Trainer, "_step", step)
    torch.manual_seed(999)
    resumed = Trainer.resume(stopped).fit()
    assert_same(weights(whole.run), weights(stopped))
    assert records(whole.run, "val_loss") == records(stopped, "val_loss")
    assert (resumed.sample, resumed.step) == (whole.sample, whole.step)


def test_a_run_folder_whose_name_is_not_utf8(tiny: Recipe, tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"r\xff")
    Trainer(replace(tiny, out=str(run))).fit()
    model = GPT.from_pretrained(run)
    Trainer.resume(run, max_steps=find_checkpoint(run).step + 1).fit()
    engine = Engine.from_model(model)
    engine.save(run / "engine.safetensors")
    ids = [[1, 2, 3]]
    assert torch.equal(Engine.load(run / "engine.safetensors").logits(ids), engine.logits(ids))


def test_evaluation_does_not_affect_training(tiny: Recipe, tmp_path: Path) -> None:
    often = Trainer(replace(tiny, eval_interval=1)).fit()
    never = Trainer(replace(tiny, eval_interval=100, out=str(tmp_path / "never"))).fit()
    assert_same(weights(often.run), weights(never.run))


def test_the_seed_decides(tiny: Recipe, tmp_path: Path) -> None:
    first = Trainer(tiny).fit()
    again = Trainer(replace(tiny, out=str(tmp_path / "again"))).fit()
    other = Trainer(replace(tiny, out=str(tmp_path / "other"), seed=2)).fit()
    assert_same(weights(first.run), weights(again.run))
    assert first.best_val_loss != other.best_val_loss


def test_accumulated_micro_batches_are_one_batch(tiny: Recipe, tmp_path: Path) -> None:
    """2 × 4 sequences per step use the same windows as 1 × 8 and give the same weights."""
    settings = {"max_steps": 4, "dropout": 0.0, "grad_clip": 0.0, "weight_decay": 0.0}
    parts = Trainer(replace(tiny, grad_accum=2, **settings))
    whole = Trainer(replace(tiny, batch_size=8, out=str(tmp_path / "whole"), **settings))
    parts.fit(), whole.fit()
    for one, two in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ops", ["reference", "native"])
@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_both_tokenizers_and_backends_train(tiny: Recipe, ops: str, tokenizer: str) -> None:
    recipe = replace(tiny, ops=ops, tokenizer=tokenizer, max_steps=3, eval_interval=3)
    assert math.isfinite(Trainer(recipe).fit().best_val_loss)


def test_bfloat16_trains(tiny: Recipe) -> None:
    result = Trainer(replace(tiny, dtype="bfloat16", max_steps=3)).fit()
    assert all(w.dtype == torch.float32 for w in weights(result.run).values())


def test_resume_to_more_steps_goes_on(tiny: Recipe) -> None:
    run = Trainer(tiny).fit().run
    result = Trainer.resume(run, max_steps=20).fit()
    assert [step for step, _ in records(run, "val_loss")] == [4, 8, 12, 16, 20]
    assert result.step == 20
    assert json.loads((run / "config.json").read_text())["recipe"]["max_steps"] == 20


def test_resume_of_a_finished_run_ends_at_once(tiny: Recipe) -> None:
    run = Trainer(tiny).fit().run
    before = weights(run)
    assert Trainer.resume(run).fit().step == 12
    assert_same(before, weights(run))


def test_faults_17_and_33_another_model_or_data_is_refused(
    tiny: Recipe, verse: Path, tmp_path: Path
) -> None:
    run = Trainer(replace(tiny, max_steps=2)).fit().run
    before = (run / "config.json").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(verse.read_text().replace("you", "me"))
    with pytest.raises(CheckpointError, match="changes: n_layer 1 → 2, tokenizer char → gpt2"):
        Trainer.resume(run, n_layer=2, tokenizer="gpt2")
    with pytest.raises(UsageError, match=r"other\.txt is not the text that the run was trained on"):
        Trainer.resume(run, data=str(other))
    with pytest.raises(CheckpointError, match="the run is already at step 2: raise --max-steps"):
        Trainer.resume(run, max_steps=1)
    assert (run / "config.json").read_bytes() == before


def test_a_torn_line_of_metrics_is_left_out(tiny: Recipe) -> None:
    run = Trainer(replace(tiny, max_steps=4)).fit().run
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "val_')
    Trainer.resume(run, max_steps=8).fit()
    assert [step for step, _ in records(run, "val_loss")] == [4, 8]


def test_a_run_stopped_before_its_first_evaluation_ends_with_one(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(tiny, eval_interval=100))
    step = Trainer._step

    def step_and_interrupt(self: Trainer) -> None:
        step(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", step_and_interrupt)
    with pytest.raises(Stopped):
        trainer.fit()
    trained = records(trainer.run, "seconds")[-1][1]  # in the last record
    assert 0.0 < trained == find_checkpoint(trainer.run).extra["seconds"]
    result = Trainer.resume(trainer.run, max_steps=3).fit()
    assert [step for step, _ in records(trainer.run, "val_loss")] == [3]
    assert math.isfinite(result.best_val_loss)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_non_finite_validation_loss_stops_the_run(
    tiny: Recipe, broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(tiny, eval_interval=1))
    monkeypatch.setattr(trainer, "validation_loss", lambda: broken if trainer.step > 2 else 3.0)
    with pytest.raises(UsageError, match=r"validation loss (nan|inf) at step 3: .* lower --lr"):
        trainer.fit()
    assert find_checkpoint(trainer.run).step == 2


def poison(trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss NaN at the given steps."""
    backward = trainer.learner.backward

    def spoilt(inputs: Any, targets: Any, weight: float) -> torch.Tensor:
        return backward(inputs, targets, math.nan if trainer.step in steps else weight)

    monkeypatch.setattr(trainer.learner, "backward", spoilt)


def test_an_update_with_non_finite_gradients_is_skipped(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(replace(tiny, max_steps=3, max_skipped=2))
    poison(trainer, {0, 2}, monkeypatch)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    seen = []
    step = Trainer._step

    def watch(self: Trainer) -> None:
        step(self)
        same = [torch.equal(p, before[name]) for name, p in self.model.named_parameters()]
        counts = {int(s["step"]) for s in self.learner.updater.optimizer.state.values()}
        seen.append((all(same), counts))

    monkeypatch.setattr(Trainer, "_step", watch)
    trainer.fit()
    assert seen == [(True, {0}), (False, {1}), (False, {1})]
    assert "step 1: gradient norm nan; update skipped" in capsys.readouterr().out


def test_each_streak_of_skipped_updates_is_reported_once(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reports do not depend on the logging interval."""
    monkeypatch.setattr(Progress, "due", lambda self: False)
    trainer = Trainer(replace(tiny, max_steps=8))
    poison(trainer, {1, 2, 5}, monkeypatch)
    trainer.fit()
    message = [line for line in capsys.readouterr().out.splitlines() if "update skipped" in line]
    norm = "gradient norm nan; update skipped"
    assert message == [f"step 2: {norm}", f"step 6: {norm}"]


def test_too_many_skipped_updates_in_a_row_stop_the_run(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(tiny, max_skipped=3))
    poison(trainer, {1, 2, 5, 6, 7, 8}, monkeypatch)
    with pytest.raises(UsageError, match=r"3 updates in a row skipped .* at step 8: .* lower --lr"):
        trainer.fit()
    checkpoint = find_checkpoint(trainer.run)
    assert checkpoint.step == 4
    assert all(t.isfinite().all() for t in checkpoint.model_tensors().values())


def test_non_finite_weights_are_not_saved(tiny: Recipe) -> None:
    trainer = Trainer(tiny)
    with torch.no_grad():
        trainer.model.ln_f.weight.fill_(math.nan)
    with pytest.raises(UsageError, match=r"non-finite weights at step 0 .* lower --lr"):
        trainer._save(None)
    trainer.close()
    assert not list(trainer.run.glob("checkpoints/*"))


def test_a_second_trainer_of_the_same_folder_is_rejected(tiny: Recipe) -> None:
    trainer = Trainer(replace(tiny, max_steps=4))
    trainer.fit()
    resumed = Trainer.resume(trainer.run, max_steps=8)
    with pytest.raises(UsageError, match="run is being written by process") as info:
        Trainer.resume(trainer.run, max_steps=8)
    assert "which is this one; call close() of the earlier Trainer" in str(info.value)
    assert resumed.fit().step == 8


def test_a_second_fit_locks_the_folder_again(tiny: Recipe) -> None:
    trainer = Trainer(replace(tiny, max_steps=4))
    trainer.fit()
    other = Trainer.resume(trainer.run)
    with pytest.raises(UsageError, match="run is being written by process"):
        trainer.fit()
    other.close()
    assert trainer.fit().step == 4


def test_float16_scales_its_loss(tiny: Recipe) -> None:
    """A scale that is far too high causes a few skipped updates until it has been reduced."""
    trainer = Trainer(replace(tiny, dtype="float16", max_steps=30))
    scale = trainer.learner.updater.scale
    assert scale is not None
    scale.factor.fill_(2.0**30)
    trainer.fit()
    state = trainer.learner.updater.extra_state()
    assert 1.0 <= state["loss_scale"] < 2.0**30
    done = {int(s["step"]) for s in trainer.learner.updater.optimizer.state.values()}
    assert done == {30 - int(30 - math.log2(state["loss_scale"]))}
    assert find_checkpoint(trainer.run).extra["loss_scale"] == state["loss_scale"]
    assert Trainer.resume(trainer.run).learner.updater.extra_state() == state


def test_gradients_of_float16_are_those_of_float32(tiny: Recipe) -> None:
    norms = {}
    for dtype in ("float32", "float16"):
        trainer = Trainer(replace(tiny, dtype=dtype, out=f"{tiny.out}-{dtype}", dropout=0.0))
        with trainer.learner.loader(0) as trainer._loader:
            trainer._step()
        norms[dtype] = trainer.norm.item()
        trainer.close()
    assert norms["float16"] == pytest.approx(norms["float32"], rel=1e-2)


def test_float32_after_tf32_is_float32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert choose_precision("tf32", torch.device("cuda"))[0].tf32
        assert not choose_precision("float32", torch.device("cuda"))[0].tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_average_is_what_is_evaluated_and_offered(tiny: Recipe) -> None:
    trainer = Trainer(replace(tiny, ema=0.5, max_steps=3, eval_interval=3))
    seen = [{name: p.detach().clone() for name, p in trainer.model.named_parameters()}]
    update = trainer.learner.updater.step

    def watch(lr: float) -> torch.Tensor:
        norm = update(lr)
        seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        return norm

    trainer.learner.updater.step = watch  # type: ignore[method-assign]
    result = trainer.fit()
    checkpoint = find_checkpoint(result.run)
    for name, average in checkpoint.model_tensors(ema=True).items():
        zero, one, two, three = (weights_then[name] for weights_then in seen)
        truth = 0.125 * zero + 0.125 * one + 0.25 * two + 0.5 * three
        torch.testing.assert_close(average, truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(checkpoint.model_tensors()[name], three, rtol=0.0, atol=0.0)
    offered = checkpoint.load_model(ema=True)
    trainer.model.load_state_dict(offered.state_dict())
    trainer.learner.updater.average = {}
    assert trainer.validation_loss() == pytest.approx(result.best_val_loss, rel=1e-6)


def test_early_stopping_keeps_the_best(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.4, 5: 1.0}
    monkeypatch.setattr(Trainer, "validation_loss", lambda self: losses[self.step])
    result = Trainer(replace(tiny, eval_interval=1, patience=2)).fit()
    assert (result.step, result.best_step, result.best_val_loss) == (4, 2, 2.0)
    assert "no lower loss for 2 evaluations: stopped early" in capsys.readouterr().out
    more = Trainer.resume(result.run, patience=0, max_steps=5).fit()
    assert (more.step, more.best_step) == (5, 5)


def test_recomputing_changes_memory_alone(tiny: Recipe, tmp_path: Path) -> None:
    plain = Trainer(tiny).fit()
    again = Trainer(replace(tiny, recompute=True, out=str(tmp_path / "again"))).fit()
    assert_same(weights(plain.run), weights(again.run))


def test_the_training_loss_beside_an_evaluation_is_that_of_its_step(
    tiny: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.utils.progress.SECONDS_BETWEEN_LOGS", 3600.0)
    losses = []

    class Recorder(Trainer):
        def _step(self) -> None:
            super()._step()
            losses.append(self.loss.item())

    Recorder(tiny).fit()
    printed = re.findall(r"step +(\d+)/12  train loss ([\d.]+)", capsys.readouterr().out)
    assert printed == [(str(step), f"{losses[step - 1]:.4f}") for step in (4, 8, 12)]


def test_samples_while_training_change_nothing(
    tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = Trainer(tiny).fit()
    capsys.readouterr()
    telling = Trainer(replace(tiny, sample_interval=5, out=str(tmp_path / "telling"))).fit()
    assert capsys.readouterr().out.count("--- sample at step") == 2
    assert_same(weights(silent.run), weights(telling.run))


@pytest.mark.parametrize("when", ["it is loaded", "it is used"])
def test_a_compiler_that_fails_is_a_warning(
    tiny: Recipe, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nfound here")

    by_using_it = (lambda module, **_: refuse) if when == "it is used" else refuse
    monkeypatch.setattr(torch, "compile", by_using_it)
    eager = Trainer(replace(tiny, out=f"{tiny.out}-eager")).fit()
    fallen_back = Trainer(replace(tiny, compile="yes")).fit()
    said = capsys.readouterr().out
    assert "warning: torch.compile failed, training continues without it: no compiler found" in said
    assert_same(weights(eager.run), weights(fallen_back.run))


def test_a_compiler_that_uses_what_is_deprecated_is_no_matter(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors in these tests, as with ``python -W error``."""

    def compiled(module: Any, **_: Any) -> Any:
        warnings.warn("`torch.jit` is deprecated", DeprecationWarning, stacklevel=1)
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    trainer = Trainer(replace(tiny, compile="yes"))
    assert "compiled by torch.compile" in trainer._notes
    with pytest.raises(DeprecationWarning):  # outside of compilation they still are
        warnings.warn("ours", DeprecationWarning, stacklevel=1)
    trainer.close()


@pytest.mark.parametrize("where", ["GPT", "Updater", "compile_or_fallback"])
def test_running_out_of_memory_during_setup_is_explained(
    tiny: Recipe, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"fastgpt.training.step.{where}", refuse)
    with pytest.raises(UsageError, match=r"out of memory: a step with batch 4 needs about .* try"):
        Trainer(replace(tiny, compile="yes"))
    assert not Path(tiny.out or "").exists()


def test_the_batch_is_found_before_it_is_compiled(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def compiled(module: Any, trial: Any, _world: Any) -> tuple[Any, str]:
        sizes.append(trial.__self__.recipe.batch_size)
        return module, "compiled"

    monkeypatch.setattr("fastgpt.training.step.largest_batch", lambda *_: 2)
    monkeypatch.setattr("fastgpt.training.step.compile_or_fallback", compiled)
    Trainer(replace(tiny, compile="yes", find_batch=True)).close()
    assert sizes == [2]


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one_but_for_rounding(tiny: Recipe) -> None:
    settings = {"dropout": 0.0, "max_steps": 4}
    eager = Trainer(replace(tiny, out=f"{tiny.out}-eager", **settings)).fit()
    compiled = Trainer(replace(tiny, compile="yes", **settings))
    assert any("compiled by torch.compile" in note for note in compiled._notes)
    assert compiled.fit().best_val_loss == pytest.approx(eager.best_val_loss, rel=1e-4)


@pytest.mark.parametrize("moved", [False, True])
def test_relative_data_are_found_from_elsewhere(
    tiny: Recipe, verse: Path, tmp_path: Path, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the directory where the run was started, else to the current directory."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    verse.rename(here / "verse.txt")
    monkeypatch.chdir(here)
    run = Trainer(replace(tiny, data="verse.txt", max_steps=2)).fit().run
    monkeypatch.chdir(there)
    if moved:
        (here / "verse.txt").rename(there / "verse.txt")
    assert Trainer.resume(run, max_steps=4).fit().step == 4
    monkeypatch.chdir(tmp_path)
    assert Trainer.resume(run, max_steps=6).fit().step == 6


def test_the_summary_names_the_best_checkpoint(tiny: Recipe) -> None:
    run = Trainer(tiny).fit().run
    summary = json.loads((run / "summary.json").read_text())
    step, loss = min(records(run, "val_loss"), key=lambda record: record[1])
    best = find_checkpoint(run, "best")
    assert (summary["best_step"], summary["best_val_loss"]) == (step, loss) == (best.step, loss)
    assert run / summary["best_checkpoint"] == best.path
    assert (summary["steps"], summary["tokens"]) == (12, 12 * 4 * 16)
    trainer = Trainer.resume(run, max_steps=16)
    assert not (run / "summary.json").exists()  # the run is not finished
    trainer.fit()
    assert json.loads((run / "summary.json").read_text())["steps"] == 16


def test_latest_is_a_link_to_the_run_that_was_started_or_resumed_last(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "runs" / "latest"
    first = Trainer(replace(tiny, out=None, max_steps=1), "first").fit().run
    assert os.readlink(link) == first.name
    Trainer(replace(tiny, out="runs/second")).close()
    assert os.readlink(link) == "second"
    Trainer.resume(first).close()
    assert os.readlink(link) == first.name
    Trainer(replace(tiny, out=str(tmp_path / "elsewhere" / "run"))).close()
    assert not (tmp_path / "elsewhere" / "latest").exists()
    link.unlink()
    link.mkdir()  # somebody's own folder
    Trainer(replace(tiny, out="runs/third")).close()
    assert not link.is_symlink()
    assert {path.name for path in link.parent.iterdir()} == {
        *(first.name, "second", "third", "latest"),
    }


def test_the_saved_settings_are_those_of_the_prepared_data(
    tiny: Recipe, verse: Path, tmp_path: Path
) -> None:
    for name, tokenizer, found in (
        ("trained", Tokenizer.train([verse.read_text()], 300), "trained/tokenizer.json"),
        ("gpt2", "gpt2", "gpt2"),
    ):
        folder = tmp_path / name
        prepared = prepare([verse], folder, tokenizer=tokenizer, val_fraction=0.1, progress=False)
        one = replace(tiny, data=str(folder), out=f"{tiny.out}-{name}", max_steps=1)
        run = Trainer(one).fit().run
        recipe = json.loads((run / "config.json").read_text())["recipe"]
        assert recipe["tokenizer"].removeprefix(f"{tmp_path}/") == found
        assert recipe["vocab_size"] == prepared.tokenizer.vocab_size
        assert Trainer.resume(run, max_steps=2).fit().step == 2


def test_a_folder_with_something_in_it_is_refused(tiny: Recipe) -> None:
    Path(tiny.out or "").mkdir()
    (Path(tiny.out or "") / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="run is not empty; continue it with --resume"):
        Trainer(tiny)


def test_a_full_disk_outside_of_checkpointing_is_reported(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = r"run cannot be written: No space left on device; fix this, then continue with --resume"
    monkeypatch.setattr("fastgpt.training.run_output.describe_run", full)
    with pytest.raises(UsageError, match=said):
        Trainer(replace(tiny, out=f"{tiny.out}-begun/run"))
    monkeypatch.undo()
    trainer = Trainer(replace(tiny, max_steps=4))
    (trainer.run / "sample.txt").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=said):
        trainer.fit()
    monkeypatch.setattr("fastgpt.training.run_output.truncate_metrics", full)
    with pytest.raises(UsageError, match=said):
        Trainer.resume(trainer.run)
    monkeypatch.undo()
    (trainer.run / "sample.txt").unlink()
    assert Trainer.resume(trainer.run).fit().step == 4


def test_runs_that_start_within_a_second_have_folders_of_their_own(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgpt.training.run_folder.time.strftime", lambda _: "20260101-000000")
    trainers = [Trainer(replace(tiny, out=None), "verse") for _ in range(3)]
    stem = "runs/verse-20260101-000000"
    assert [str(trainer.run) for trainer in trainers] == [stem, f"{stem}-2", f"{stem}-3"]
    for trainer in trainers:
        trainer.close()


def test_a_run_folder_that_cannot_be_created_is_reported(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be created: Not a directory"):
        Trainer(replace(tiny, out=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 6000}, r"has 10,800 tokens, but block_size=6000 needs at least 12,000"),
        ({"block_size": 2000}, "validation part has 1,200 tokens, not more than block_size=2000"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head"),
        ({"device": "gpu"}, "device 'gpu' cannot be used: .*try --device auto"),
        ({"device": "meta"}, "device 'meta' cannot be used: it is not cpu, cuda or mps"),
        ({"data": ""}, "needs a text to train on: add --data my.txt"),
    ],
)
def test_wrong_settings_are_refused_before_a_folder_is_made(
    tiny: Recipe, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(replace(tiny, **change))
    assert not Path(tiny.out or "").exists()


@pytest.mark.parametrize(
    "change",
    [
        *({"batch_size": 0}, {"block_size": 0}, {"lr": -1.0}, {"lr": math.nan}, {"beta2": 1.0}),
        *({"val_fraction": 1}, {"min_lr": 1.0}, {"seed": -1}, {"seed": 2**63}),
        *({"dtype": "float64"}, {"tokenizer": "chars"}, {"ops": "triton2"}, {"log": ("csv",)}),
        *({"ema": 1.0}, {"patience": -1}, {"schedule": "cos"}, {"decay_fraction": 0.0}),
        *({"keep": 0}, {"parallel": "ddp2"}, {"compile": "maybe"}, {"max_skipped": 0}),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        Recipe(**change)


def test_validation_is_the_whole_part_and_always_the_same(tiny: Recipe) -> None:
    trainer = Trainer(tiny)
    starts = trainer.learner.val_starts
    assert starts.tolist() == list(range(0, 1200 - 16, 16))
    tokens = torch.from_numpy(trainer.learner.corpus.val.astype("int64"))
    trainer.model.eval()
    losses = [trainer.model(tokens[None, s : s + 16], tokens[None, s + 1 : s + 17]) for s in starts]
    assert abs(trainer.validation_loss() - torch.stack(losses).mean().item()) < 1e-5
    assert trainer.model.training
    few = Trainer(replace(tiny, out=str(trainer.run) + "2", eval_tokens=100)).learner.val_starts
    assert len(few) == 6
    assert set(few) <= set(starts)


def test_decay_pulls_on_matrices_only() -> None:
    model = GPT(GPTConfig(50, 16, 2, 2, 32))
    decayed, others = make_optimizer(model, Recipe(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in others["params"])
    total = len(decayed["params"]) + len(others["params"])
    assert total == len(list(model.parameters()))


def test_the_schedule() -> None:
    recipe = Recipe(lr=1.0, min_lr=0.1, warmup_steps=9, max_steps=109)
    rates = [learning_rate(step, recipe) for step in range(120)]
    assert learning_rate(109, Recipe(lr=1e-5, warmup_steps=5, max_steps=109)) == pytest.approx(1e-6)
    assert rates[:9] == pytest.approx([0.1 * i for i in range(1, 10)])
    assert rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == [pytest.approx(0.1)] * 11
    assert sorted(rates[9:], reverse=True) == rates[9:]


@pytest.mark.parametrize(
    ("schedule", "middle", "late"),
    [("linear", 0.55, 0.19), ("wsd", 1.0, 0.55), ("constant", 1.0, 1.0)],
)
def test_other_schedules(schedule: Any, middle: float, late: float) -> None:
    """10 steps of warm-up, then 100 steps; "wsd" decays in the last 20 of all 110."""
    recipe = Recipe(
        lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, schedule=schedule, decay_fraction=2 / 11
    )
    assert learning_rate(9, recipe) == pytest.approx(10 / 11)
    assert learning_rate(10, recipe) == 1.0
    assert learning_rate(60, recipe) == pytest.approx(middle)
    assert learning_rate(100, recipe) == pytest.approx(late)
    assert learning_rate(110, recipe) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_the_speed_leaves_out_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 14.0, 16.0]).__next__
    monkeypatch.setattr("fastgpt.utils.progress.time.perf_counter", clock)
    progress = Progress(0, 10)  # at 0
    progress.stepped(1, 1200)
    with progress.paused("evaluating"):  # from 10 to 14
        pass
    progress.show(1.0, 1e-3)  # at 16
    assert progress.tokens_per_s == pytest.approx(100.0)
