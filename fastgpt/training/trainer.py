"""The training loop.

`Trainer(recipe).fit()` trains and evaluates the model, keeps the best checkpoint, plots the loss
curve and generates a sample at the end. What a step computes depends only on the recipe and the
step number, so a resumed run gives the same results as an uninterrupted one. This holds for any
number of processes.

The training step is implemented in `fastgpt.training.step`, evaluation in
`fastgpt.training.validation`, and the run folder's files in `fastgpt.training.run_output`.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint.load import Checkpoint, find_checkpoint, load_run_tokenizer, resolve_run
from fastgpt.checkpoint.save import TrainingState
from fastgpt.model import GPT
from fastgpt.tokenizer import CharTokenizer
from fastgpt.training.distributed import World
from fastgpt.training.initialization import Origin
from fastgpt.training.loggers import check_loggers
from fastgpt.training.loss_curves import plot_losses
from fastgpt.training.memory_estimate import gigabytes
from fastgpt.training.nonfinite import SkippedUpdates
from fastgpt.training.recipes import Recipe
from fastgpt.training.run_folder import (
    check_max_steps,
    check_resume_settings,
    check_unoccupied,
    explain_write_errors,
    find_data,
    interrupted_run,
    read_run,
)
from fastgpt.training.run_output import RunWriter
from fastgpt.training.step import Learner
from fastgpt.training.throughput import device_peak, flops_per_token
from fastgpt.training.validation import (
    averaged,
    format_loss,
    generate_sample,
    mean_loss,
    perplexity,
    unsharded_model,
)
from fastgpt.utils.device import find_device
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import write_json
from fastgpt.utils.memory_usage import used
from fastgpt.utils.progress import Progress, plural
from fastgpt.utils.signals import Stopped, StopSignal


@dataclass(frozen=True)
class Result:
    """The outcome of a finished run."""

    run: Path
    step: int
    best_step: int
    best_val_loss: float
    sample: str
    seconds: float
    val_loss_before: float | None = None
    """Validation loss of the pretrained model (`init`) before training; None without one."""
    shows_perplexity: bool = True
    """Whether to report perplexity. False for character-level tokenizers."""

    @property
    def losses(self) -> str:
        """A one-line summary of the validation losses."""
        best = self._format(self.best_val_loss)
        if self.val_loss_before is None:
            return f"best validation loss {best} at step {self.best_step:,}"
        before = self._format(self.val_loss_before)
        if not self.best_step:
            return f"validation loss before: {before}; no evaluation improved on it"
        return f"validation loss before: {before}; after: {best} at step {self.best_step:,}"

    def _format(self, loss: float) -> str:
        return format_loss(loss, self.shows_perplexity)


@dataclass
class RunState:
    """The progress of a run, saved in each checkpoint next to the tensors."""

    step: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf
    evaluations_since: int = 0  # number of evaluations since the best one
    val_loss_before: float | None = None  # of the pretrained model (`init`), before training
    seconds: float = 0.0  # training time, summed over all resumes of the run

    def evaluated(self, val_loss: float) -> None:
        """Record the validation loss of the current step and update the best one."""
        self.evaluations_since += 1
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step, self.evaluations_since = val_loss, self.step, 0


class Trainer:
    """Train a model from a recipe and save the results in a run folder.

    Use `Trainer.resume(run)` to continue a run from its newest valid checkpoint. Under `torchrun`,
    the processes split the work of each step. After a failure, processes restarted by `torchrun`
    continue the interrupted run.

    On a CPU, the allocator is configured to keep freed memory for the rest of the process.

    Args:
        recipe: The settings, see `fastgpt.training.recipes`.
        name: Prefix of the run folder's name, used if the recipe does not set `out`.
        given: Names of settings that a pretrained model (`init`) must not override.

    Raises:
        UsageError: Before the first step, if settings, data or folders are invalid.
    """

    def __init__(self, recipe: Recipe, name: str = "run", given: Collection[str] = ()) -> None:
        with self._started(recipe):
            if run := self.world.from_main(lambda: interrupted_run(recipe)):
                self._continue(run, {})
            else:
                self._begin(recipe, name, given)

    @classmethod
    def resume(cls, run: str | Path, **changes: Any) -> "Trainer":
        """Return a trainer that continues the run in folder `run`.

        `changes` override settings of the saved recipe, for example `max_steps`.
        """
        run = resolve_run(Path(run))
        trainer = cls.__new__(cls)
        with trainer._started(replace(read_run(run)[1], **changes)):
            trainer._continue(run, changes)
        return trainer

    def fit(self) -> Result:
        """Train up to step `max_steps`, or until `patience` evaluations in a row do not improve.

        On Ctrl-C, SIGTERM or SIGHUP, finish the current step, save a checkpoint, and raise
        `Stopped`. The run continues if its output cannot be displayed.
        """
        try:
            with contextlib.ExitStack() as stack:
                stop = stack.enter_context(StopSignal())
                stack.enter_context(self.writer.opened(self.recipe, self.step))
                progress = stack.enter_context(self._progress())
                self._loader = stack.enter_context(self.learner.loader(self.step))
                stack.enter_context(self.learner.explain_memory_errors())
                self._train(progress, stop)
                self.state.seconds = progress.seconds()
            return self.world.from_main(self._finish)
        finally:
            self.close()

    def validation_loss(self) -> float:
        """Return the mean loss, in nats per token, over the fixed validation windows.

        Uses the averaged weights if the run keeps them. Collective: all processes must call it.
        """
        with averaged(self.learner):
            return mean_loss(self.learner)

    def close(self) -> None:
        """Release the lock of the run folder and leave the process group. Called by `fit`."""
        self.writer.close()
        self.world.close()

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.writer.path

    @property
    def recipe(self) -> Recipe:
        """The settings, with all open values resolved."""
        return self.learner.recipe

    @property
    def model(self) -> GPT:
        """The model; with FSDP, the shard of this process."""
        return self.learner.model

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return self.state.step

    @property
    def step_tokens(self) -> int:
        """The number of tokens per step, over all processes."""
        return self.learner.sequences * self.recipe.block_size

    # --- before the first step -----------------------------------------------------------------

    @contextlib.contextmanager
    def _started(self, recipe: Recipe) -> Iterator[None]:
        """Select the device and join the process group; close everything if the block raises."""
        self.state, self._evaluated = RunState(), False
        self._skipped = SkippedUpdates()
        self._notes: list[str] = []
        self.world = World()
        self.writer = RunWriter(self.world)
        self.device = find_device(recipe.device, self.world.local_rank)
        self.world.start(self.device)
        try:
            check_loggers(recipe.log)
            yield
        except BaseException:
            self.close()
            raise

    def _begin(self, recipe: Recipe, name: str, given: Collection[str]) -> None:
        """Start a new run."""
        self.world.on_main(lambda: check_unoccupied(recipe))  # fail before reading the data
        self.learner = Learner(recipe, self.device, self.world, given=given)
        self._notes += self.learner.notes
        tokenizer = self.learner.corpus.tokenizer
        self.writer.create(name, self.recipe, self.learner.config, tokenizer)

    def _continue(self, run: Path, changes: dict[str, Any]) -> None:
        """Continue the run in a folder from its newest valid checkpoint."""
        name, before = read_run(run)
        recipe = replace(before, **{**find_data(run, before), **changes})
        checkpoint = self.writer.reopen(run, recipe.keep, self._notes)
        check_resume_settings(before, recipe)
        tokenizer = load_run_tokenizer(run, checkpoint)
        config = replace(checkpoint.config, dropout=recipe.dropout)
        origin = Origin(tokenizer, config, checkpoint.data_sha256)
        self.learner = Learner(recipe, self.device, self.world, origin)
        check_max_steps(checkpoint.step, self.recipe)
        self._notes += self.learner.notes
        self.learner.restore(checkpoint)
        self._restore_run_state(checkpoint)
        self.writer.rewind(name, self.recipe, self.learner.config, self.step)

    def _restore_run_state(self, checkpoint: Checkpoint) -> None:
        """Restore the progress from a checkpoint; fields that it does not have stay as they are."""
        saved = {key: checkpoint.extra.get(key, v) for key, v in asdict(self.state).items()}
        self.state = RunState(**{**saved, "step": checkpoint.step})
        self._notes.append(f"resumed at step {self.step:,}")
        self._evaluated = checkpoint.val_loss is not None

    # --- training ------------------------------------------------------------------------------

    def _train(self, progress: Progress, stop: StopSignal) -> None:
        """Run the steps, with logging, evaluations, checkpoints and samples between them."""
        progress.say(self._summary())
        if self.recipe.init is not None and self.step == 0 and not self._evaluated:
            self._evaluate(progress)  # baseline: the loss of the pretrained model
        if self._evaluation_due() and not self._evaluated:  # the run was stopped just before it
            self._evaluate(progress)
        while not self._finished():
            self._step()
            progress.stepped(self.step, self.step_tokens)
            self._report_skipped(progress)
            # All processes must take the same branches below, which contain collective calls.
            shown = progress.due() or self._evaluation_due()
            requested, due = self.world.all_reduce_max(stop.requested, shown)
            if due:
                self._log(progress)
            if requested and not self._last_step():
                self.state.seconds = progress.seconds()
                self._save(None)
                raise Stopped(requested, self.run, self.step)
            if self._evaluation_due():
                self._evaluate(progress)
            if self.recipe.sample_interval and self.step % self.recipe.sample_interval == 0:
                self._show_sample(progress)

    def _step(self) -> None:
        """Run one optimizer step."""
        self.loss, self.norm = self.learner.step(self.step, self._loader)
        self.state.step += 1
        self._evaluated = False
        self._skipped.add(self.step, self.learner.updater.skipped, self.norm)
        if self.device.type == "cpu":  # reading the counter does not synchronize with a device
            self._check_skipped()

    def _check_skipped(self) -> None:
        """Raise UsageError after too many consecutive skipped updates."""
        if (skipped := int(self.learner.updater.skipped)) >= self.learner.updater.patience:
            raise self._diverged(
                f"{plural(skipped, 'update')} in a row skipped because of non-finite gradients"
            )

    def _report_skipped(self, progress: Progress, wait: bool = False) -> None:
        """Report skipped updates, once per streak.

        Not with float16, where skipped updates are expected whenever the loss scale is too high.
        """
        for step, norm in self._skipped.new_streaks(wait):
            if self.learner.updater.scale is None:
                progress.say(f"step {step:,}: gradient norm {norm}; update skipped")

    def _log(self, progress: Progress) -> None:
        """Show and record the loss, learning rate and gradient norm of the last step."""
        loss = self.world.all_reduce_sum(self.loss.item())[0] / self.world.size
        lr, norm = self.learner.lr, self.norm.item()
        self._check_skipped()
        self._report_skipped(progress, wait=True)
        progress.show(loss, lr, norm)
        self._record(loss=loss, lr=lr, grad_norm=norm, **progress.figures())

    def _last_step(self) -> bool:
        return self.step >= self.recipe.max_steps

    def _finished(self) -> bool:
        patience = self.recipe.patience
        return self._last_step() or 0 < patience <= self.state.evaluations_since

    # --- evaluation, samples, saving -----------------------------------------------------------

    def _evaluation_due(self) -> bool:
        return self.step > 0 and (self.step % self.recipe.eval_interval == 0 or self._last_step())

    def _evaluate(self, progress: Progress) -> None:
        """Compute the validation loss, report it, and save a checkpoint."""
        self._evaluated = True
        with progress.paused("evaluating"):
            val_loss = self.validation_loss()
            words = {"val_perplexity": perplexity(val_loss)} if self._shows_perplexity else {}
            self._record(val_loss=val_loss, **words, seconds=progress.seconds())
            if not math.isfinite(val_loss):
                raise self._diverged(f"validation loss {val_loss}")
            shown = format_loss(val_loss, self._shows_perplexity)
            if self.step:
                progress.evaluated(shown)
            else:
                progress.say(f"before: validation loss {shown}")
                self.state.val_loss_before = val_loss
            self.state.evaluated(val_loss)
            self.state.seconds = progress.seconds()
            self._save(val_loss)
            if self._finished() and not self._last_step():
                evaluations = plural(self.recipe.patience, "evaluation")
                progress.say(f"no lower loss for {evaluations}: stopped early")

    @property
    def _shows_perplexity(self) -> bool:
        """Whether to report perplexity: not for character-level tokenizers."""
        return not isinstance(self.learner.corpus.tokenizer, CharTokenizer)

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what} at step {self.step}: training has diverged; lower --lr (now "
            f"{self.recipe.lr}); the saved checkpoints are untouched"
        )

    def _save(self, val_loss: float | None) -> None:
        """Save a checkpoint from the main process; all processes must call, to gather shards."""
        learner = self.learner
        state = TrainingState(
            self.step,
            learner.model_tensors(),
            learner.optimizer_tensors(),
            val_loss,
            learner.config,
            learner.corpus.tokenizer.fingerprint,
            learner.corpus.sha256,
            learner.average_tensors(),
            {**asdict(self.state), **learner.extra_state()},
        )
        self.writer.save(state)

    def _show_sample(self, progress: Progress) -> None:
        """Print a sample of the current model without changing the state of the training."""
        with (
            progress.paused("generating a sample"),
            averaged(self.learner),
            torch.random.fork_rng(),
        ):
            model = unsharded_model(self.learner)
            if self.world.is_main:
                text = generate_sample(self.learner, model)
                progress.say(f"--- sample at step {self.step:,}\n{text}\n---")
                self.writer.loggers.text(self.step, text)

    def _finish(self) -> Result:
        """Plot the loss curve, generate a sample with the best weights, and return the result.

        For the main process only.
        """
        plot_losses(self.run)
        best = find_checkpoint(self.run, "best", weights_only=True)
        assert best.val_loss is not None  # the last step is always evaluated
        model = best.load_model(self.device, self.recipe.ops, ema=best.has_ema)
        sample = generate_sample(self.learner, model)
        with explain_write_errors(self.run):
            (self.run / "sample.txt").write_text(sample + "\n", encoding="utf-8")
            write_json(self.run / "summary.json", self._results(best))
        return Result(
            self.run,
            self.step,
            best.step,
            best.val_loss,
            sample,
            self.state.seconds,
            self.state.val_loss_before,
            self._shows_perplexity,
        )

    def _results(self, best: Checkpoint) -> dict[str, Any]:
        """Return the contents of `summary.json`; losses are in nats per token."""
        return {
            "best_checkpoint": str(best.path.relative_to(self.run)),
            "best_step": best.step,
            "best_val_loss": best.val_loss,
            "val_loss_before": self.state.val_loss_before,
            "steps": self.step,
            "tokens": self.step * self.step_tokens,
            "seconds": self.state.seconds,
        }

    # --- reporting -----------------------------------------------------------------------------

    def _progress(self) -> Progress:
        dtype = self.learner.precision.dtype
        self.peak = peak = device_peak(self.device, dtype) if self.world.is_main else None
        return Progress(
            self.step,
            self.recipe.max_steps,
            seconds=self.state.seconds,
            flops_per_token=flops_per_token(
                self.model.config,
                self.model.num_params(embeddings=False),
                frozen=self.learner.lora is not None,
            ),
            peak=peak.flops * self.world.size if peak else None,
            memory=lambda: used(self.device),
            shown=self.world.is_main,
        )

    def _record(self, **values: float) -> None:
        self.writer.loggers.log(self.step, {**values, "tokens": self.step * self.step_tokens})

    def _summary(self) -> str:
        """Return the lines printed at the start: model, data, device, memory and notes."""
        corpus, parameters = self.learner.corpus, self.model.num_params() / 1e6
        on_cpu = self.device.type == "cpu"
        threads = f", {plural(torch.get_num_threads(), 'thread')}" if on_cpu else ""
        kernels = ", Triton kernels" if self.learner.backend == "triton" else ""
        several = f", {self.world.size} processes" if self.world.size > 1 else ""
        mfu = f"; MFU relative to the {self.peak}" if self.peak else ""
        lora = self.learner.lora
        trained = f" ({lora.n_params(self.model.config):,} trained)" if lora else ""
        vocab_size = corpus.tokenizer.vocab_size
        lines = [
            f"{parameters:.2f}M parameters{trained}, vocabulary of {vocab_size:,}, "
            f"{len(corpus.train):,} training and {len(corpus.val):,} validation tokens",
            f"{self.device.type}{kernels}{threads}{several}; {self.learner.precision}; "
            f"memory per step: about {gigabytes(self.learner.memory().total)}{mfu}",
            *self._notes,
            f"run folder: {self.run}",
        ]
        return "\n".join(lines)
