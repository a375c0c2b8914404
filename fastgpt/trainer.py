"""The training loop.

`Trainer(recipe).fit()` trains, evaluates, keeps the best checkpoint, draws the loss curve and ends
with a sample. What happens at a step is a function of the recipe and the step alone, so a run that
was stopped and resumed computes the same as one that was not, on any number of processes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_run_tokenizer,
    open_checkpoint,
    resolve_run,
)
from fastgpt.checkpointer import Checkpointer, TrainingState
from fastgpt.compilation import compiled_or_not
from fastgpt.data import Batches, Corpus, gather, load_corpus, mix, validation_windows
from fastgpt.device import find_device
from fastgpt.distributed import (
    World,
    accumulating,
    part_like,
    restarted_by,
    settle,
    share_out,
    whole,
    wrap,
)
from fastgpt.errors import UsageError
from fastgpt.feeder import Feeder
from fastgpt.generation import generate
from fastgpt.host_memory import give_back, keep_freed_memory
from fastgpt.loggers import Loggers, check_loggers, open_loggers
from fastgpt.memory import (
    MemoryEstimate,
    available,
    batches,
    check_fits,
    estimate,
    explain_out_of_memory,
    find_batch,
    gigabytes,
    largest_batch,
    used,
)
from fastgpt.metrics import cut_metrics
from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import Updater, learning_rate
from fastgpt.peak import device_peak, flops_per_token
from fastgpt.precision import Precision, choose_precision, fastest
from fastgpt.progress import Progress
from fastgpt.recipes import Recipe
from fastgpt.run_folder import (
    describe_run,
    interrupted_run,
    new_run_folder,
    read_run,
    refuse_changes,
    refuse_occupied,
    writing,
)
from fastgpt.run_lock import RunLock
from fastgpt.signals import Stopped, StopSignal
from fastgpt.tokenizer import BaseTokenizer

VALIDATION_TOKENS = 8192  # evaluated at once, on each process
TRIAL_TOKENS = 1024  # to see which precision is the fastest


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    run: Path
    step: int
    best_step: int
    best_val_loss: float
    sample: str
    seconds: float


@dataclass
class Standing:
    """How far a run has come: what a checkpoint holds besides tensors."""

    step: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf
    evaluations_since: int = 0  # the best one
    seconds: float = 0.0  # of training, in all the sessions that the run took

    def evaluated(self, val_loss: float) -> None:
        """Note the validation loss of this step."""
        self.evaluations_since += 1
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step, self.evaluations_since = val_loss, self.step, 0


class Trainer:
    """Trains one recipe into one run folder.

    recipe: see `fastgpt.recipes`. name: goes into the run folder's name. `Trainer.resume(run)`
    continues a run from its newest good checkpoint. Started by `torchrun`, the processes share the
    work of each step; started again by it after a failure, they continue the run they were at.
    Wrong settings, data or folders raise UsageError before the first step. On a CPU the process
    keeps freed memory from then on.
    """

    def __init__(self, recipe: Recipe, name: str = "run") -> None:
        with self._joined(recipe):
            if run := self._interrupted(recipe):
                self._continue(run, {})
            else:
                self._begin(recipe, name)

    @classmethod
    def resume(cls, run: str | Path, **changes: Any) -> "Trainer":
        """Continue the run in folder `run`, with settings changed as given (say, `max_steps`)."""
        run = resolve_run(Path(run))
        trainer = cls.__new__(cls)
        with trainer._joined(replace(read_run(run)[1], **changes)):
            trainer._continue(run, changes)
        return trainer

    def fit(self) -> Result:
        """Train to `max_steps`, or until `patience` evaluations in a row brought no better loss.

        Ctrl-C or SIGTERM finishes the step, saves, and raises `Stopped`.
        """
        self._own_again()
        try:
            with contextlib.ExitStack() as stack:
                stop = stack.enter_context(StopSignal())
                stack.enter_context(self.checkpointer or contextlib.nullcontext())
                progress = stack.enter_context(self._progress())
                self._feed = stack.enter_context(self._feeder())
                self._open_loggers()
                stack.enter_context(self._enough_memory())
                progress.say(self._summary())
                self._train(progress, stop)
                self.standing.seconds = progress.seconds()
            return self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Let others write the run folder, and part from the other processes; `fit` does it."""
        if self.loggers is not None:
            self.loggers.close()
        if self.lock is not None:
            self.lock.release()
        self.world.close()

    @property
    def step(self) -> int:
        """How many steps the run has done."""
        return self.standing.step

    @property
    def step_tokens(self) -> int:
        """How many tokens a step is, over all processes."""
        return self._sequences * self.recipe.block_size

    # --- a run's parts -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _joined(self, recipe: Recipe) -> Iterator[None]:
        """Find the device and the other processes; part from them if the block fails."""
        self.loggers: Loggers | None = None
        self.lock: RunLock | None = None
        self.checkpointer: Checkpointer | None = None
        self._notes: list[str] = []
        self.world = World()
        self.device = find_device(recipe.device, self.world.local_rank)
        self.world.start(self.device)
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _begin(self, recipe: Recipe, name: str) -> None:
        """Start a new run."""
        with self.world.only_main() as main:
            if main:
                refuse_occupied(recipe)  # before the data are read
        self._build(recipe)
        self._spread()
        with self.world.only_main() as main:
            run = new_run_folder(recipe, name) if main else Path()
            if main:
                self._own(run, recipe.keep)
                with writing(run):
                    self.corpus.tokenizer.save(run / "tokenizer.json")
                    describe_run(run, name, self.recipe, self.config)
        self.run = self.world.tell(run)

    def _continue(self, run: Path, changes: dict[str, Any]) -> None:
        """Go on with the run in a folder, from its newest good checkpoint."""
        name, before = read_run(run)
        self.run, recipe = run, replace(before, **changes)
        checkpoint = self._newest(run, recipe.keep)
        refuse_changes(before, recipe, checkpoint.step)
        self._build(recipe, load_run_tokenizer(run, checkpoint), checkpoint.data_sha256)
        self._spread()
        with self._enough_memory():
            self._restore(checkpoint)
        with self.world.only_main() as main:
            if main:
                with writing(run):
                    describe_run(run, name, self.recipe, self.config)
                    cut_metrics(run / "metrics.jsonl", checkpoint.step)

    def _build(
        self, recipe: Recipe, tokenizer: BaseTokenizer | None = None, data_sha256: str | None = None
    ) -> None:
        """Make what does not touch the disk: data, model, this process's share of a step."""
        check_loggers(recipe.log)
        self.recipe, self.standing, self._evaluated = recipe, Standing(), False
        self._precisions = choose_precision(recipe.dtype, self.device)
        self.precision = self._precisions[0]
        self.corpus = self._load(tokenizer, data_sha256)
        self.config = _model_config(recipe, self.corpus)
        self.backend = _backend_name(recipe.ops, self.device, self.config)
        self.batches = Batches(self.corpus.train, recipe.block_size, recipe.seed)
        self.val_starts = validation_windows(self.corpus.val, recipe.block_size, recipe.eval_tokens)
        torch.manual_seed(recipe.seed)
        self.free = available(self.device)
        with self._enough_memory():
            self.model = GPT(self.config, recipe.ops).to(self.device)
        self.model.recompute = recipe.recompute
        if self.device.type == "cpu":
            keep_freed_memory()

    def _load(self, tokenizer: BaseTokenizer | None, sha256: str | None) -> Corpus:
        """Load the data; the main process checks it, for all."""
        recipe = self.recipe
        if not recipe.data:
            raise UsageError("this recipe needs a text to train on: add --data my.txt")
        source = recipe.data, tokenizer or recipe.tokenizer, recipe.val_fraction
        with self.world.only_main() as main:
            corpus = load_corpus(*source, sha256) if main else None
        sha256 = self.world.tell(corpus and corpus.sha256)
        return corpus or load_corpus(*source, sha256, check=False)

    def _spread(self) -> None:
        """Make what trains the model: spread over the processes, with an optimizer, compiled."""
        with self._enough_memory():
            self.module = wrap(self.model, self.world, self.recipe.parallel)
            self._choose_precision()
            self.updater = Updater(self.model, self.recipe, self.precision.dtype)
            if self.recipe.find_batch:  # before a batch that may not fit is tried in compiling
                self._find_batch()
            if _wants_compile(self.recipe.compile, self.device):
                self.module, note = compiled_or_not(self.module, self._trial, self.world)
                self._notes.append(note)
        self.share = share_out(self._sequences, self.recipe.batch_size, self.world)
        if warning := check_fits(self._memory(), self.free):
            self._notes.append(f"warning: {warning}")

    def _choose_precision(self) -> None:
        """Take the fastest precision, and stay with it: a resume must not find another."""
        if len(self._precisions) == 1:
            return
        batch = min(self.recipe.batch_size, max(1, TRIAL_TOKENS // self.recipe.block_size))
        found = fastest(self._precisions, lambda tried: self._trial(self.module, batch, tried))
        give_back()  # what the other precision needed
        self.precision = self.world.tell(found)
        changes: dict[str, Any] = {"dtype": self.precision.name}
        self.recipe = replace(self.recipe, **changes)

    def _find_batch(self) -> None:
        """Take the largest micro-batch that fits by the estimate, and on CUDA when it is tried."""
        most = 1 if self.free is None else largest_batch(self._memory(), self.free) or 1
        found = batches(self._sequences, most)
        if self.device.type == "cuda" and self.recipe.parallel == "ddp":
            found = [find_batch(lambda size: self._trial(self.model, size), found)]
        batch = -self.world.agree(-found[0])[0]  # the smallest that any process found
        accum = self._sequences // batch
        self.recipe = replace(self.recipe, batch_size=batch, grad_accum=accum, find_batch=False)
        self._notes.append(f"the largest micro-batch: --batch-size {batch} --grad-accum {accum}")

    def _own(self, run: Path, keep: int) -> None:
        """Make the run folder this process's alone, before anything in it is read or changed."""
        self.lock = RunLock(run)
        self.checkpointer = Checkpointer(run, keep)

    def _own_again(self) -> None:
        """Take the run folder's lock, if a fit before this one has let go of it."""
        if self.lock is not None and not self.lock.held:
            self.lock = RunLock(self.run)

    def _newest(self, run: Path, keep: int) -> Checkpoint:
        """Take the run folder; return its newest good checkpoint, as the main process found it."""
        found = None
        with self.world.only_main() as main:
            if main:
                self._own(run, keep)
                found = find_checkpoint(run, report=self._notes.append)
        path = self.world.tell(found and found.path)
        return found or open_checkpoint(path)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take weights, optimizer and standing from a checkpoint."""
        checkpoint.restore(self.model, self.updater.optimizer, part_like)
        if self.updater.average:
            for name, tensor in checkpoint.model_tensors(ema=True).items():
                average = self.updater.average[name]
                average.copy_(part_like(tensor, average))
        self.updater.restore_extra(checkpoint.extra)
        standing = {key: checkpoint.extra.get(key, v) for key, v in asdict(self.standing).items()}
        self.standing = Standing(**{**standing, "step": checkpoint.step})
        self._notes.append(f"continued at step {self.step:,}")
        self._evaluated = checkpoint.val_loss is not None

    def _interrupted(self, recipe: Recipe) -> Path | None:
        """Return the run that these processes were at before `torchrun` started them again."""
        before = restarted_by()
        if before is None:
            return None
        with self.world.only_main() as main:
            run = interrupted_run(before, recipe) if main else None
        told: Path | None = self.world.tell(run)
        return told

    @property
    def _sequences(self) -> int:
        """How many sequences a step is, over all processes."""
        return self.recipe.batch_size * self.recipe.grad_accum

    def _feeder(self) -> Feeder:
        """Return this process's micro-batches from the present step on."""
        plan = (
            (step * self._sequences + first, count)
            for step in range(self.step, self.recipe.max_steps)
            for first, count in self.share
        )
        return Feeder(self.batches, plan, self.device)

    # --- training ------------------------------------------------------------------------------

    def _train(self, progress: Progress, stop: StopSignal) -> None:
        """Do the steps, and what is due between them."""
        if self._evaluation_due() and not self._evaluated:  # stopped just before it
            self._evaluate(progress)
        while not self._finished():
            self._step()
            progress.stepped(self.step, self.step_tokens)
            requested, due = self.world.agree(stop.requested, progress.due())
            if due:
                self._log(progress)
            if requested and not self._last_step():
                self.standing.seconds = progress.seconds()
                self._save(None)
                raise Stopped(requested, self.run, self.step)
            if self._evaluation_due():
                self._evaluate(progress)
            if self.recipe.sample_interval and self.step % self.recipe.sample_interval == 0:
                self._show_sample(progress)

    def _step(self) -> None:
        """Do one optimizer step: the loss is the mean over all tokens of all processes."""
        recipe, world = self.recipe, self.world
        torch.manual_seed(int(mix(mix(recipe.seed, self.step), world.rank)) >> 1)  # dropout's
        losses = []
        for number, (_, count) in enumerate(self.share, start=1):
            # Gradients are averaged over the processes: so each counts for that much more.
            weight = count * world.size / self._sequences
            with accumulating(self.module, last=number == len(self.share)):
                losses.append(self._backward(*next(self._feed), weight))
        self.loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self.norm = self.updater.step(learning_rate(self.step, recipe))
        self.standing.step += 1
        self._evaluated = False
        if self.device.type == "cpu":  # where looking does not mean waiting
            self._check_skipped()

    def _backward(self, inputs: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Add one micro-batch's gradients; return its share of the loss, still on the device."""
        with self.precision.autocast():
            loss: Tensor = self.module(inputs, targets) * weight
        self.updater.scaled(loss).backward()
        return loss.detach()

    def _trial(self, module: nn.Module, batch: int = 0, precision: Precision | None = None) -> None:
        """Do a micro-batch without consequences, to see whether it works."""
        inputs, targets = self.batches.samples(0, batch or self.recipe.batch_size)
        with (precision or self.precision).autocast():
            loss = module(inputs.to(self.device), targets.to(self.device))
        loss.backward()
        self.model.zero_grad()

    def _check_skipped(self) -> None:
        """End the run after too many updates in a row that had to be left out."""
        if (skipped := int(self.updater.skipped)) >= self.updater.patience:
            raise self._diverged(
                f"{skipped} updates in a row left out, because their gradient is not finite"
            )

    def _log(self, progress: Progress) -> None:
        loss, lr = self.world.sums(self.loss.item())[0] / self.world.size, self._lr()
        norm = self.norm.item()
        self._check_skipped()
        if self.updater.skipped and self.updater.scale is None:
            progress.say(f"step {self.step:,}: gradient norm {norm}; this update is left out")
        progress.show(loss, lr, norm)
        self._record(loss=loss, lr=lr, grad_norm=norm, **progress.figures())

    def _lr(self) -> float:
        return float(self.updater.optimizer.param_groups[0]["lr"])

    def _last_step(self) -> bool:
        return self.step >= self.recipe.max_steps

    def _finished(self) -> bool:
        patience = self.recipe.patience
        return self._last_step() or 0 < patience <= self.standing.evaluations_since

    # --- evaluation, samples, saving -----------------------------------------------------------

    def _evaluation_due(self) -> bool:
        return self.step > 0 and (self.step % self.recipe.eval_interval == 0 or self._last_step())

    def _evaluate(self, progress: Progress) -> None:
        """Measure the validation loss, report it, and save."""
        self._evaluated = True
        with progress.paused():
            val_loss = self.validation_loss()
            self._record(val_loss=val_loss, seconds=progress.seconds())
            if not math.isfinite(val_loss):
                raise self._diverged(f"validation loss {val_loss}")
            progress.evaluated(val_loss)
            self.standing.evaluated(val_loss)
            self.standing.seconds = progress.seconds()
            self._save(val_loss)
            if self._finished() and not self._last_step():
                patience = self.recipe.patience
                progress.say(f"no better loss for {patience} evaluations: stopped early")

    def validation_loss(self) -> float:
        """Return the mean loss, in nats per token, over the fixed validation windows.

        Of the averaged weights, if the run keeps them. All processes must call.
        """
        with self._averaged():
            return self._mean_loss()

    @torch.no_grad()
    def _mean_loss(self) -> float:
        size, starts = self.recipe.block_size, self.val_starts
        per_batch = max(1, VALIDATION_TOKENS // size)
        n_batches = -(-len(starts) // per_batch)
        rounds = -(-n_batches // self.world.size)
        self.model.eval()
        total = 0.0
        for number in range(self.world.rank, rounds * self.world.size, self.world.size):
            # One that has no batch left in the last round repeats the first, for nothing: with
            # fsdp the others need it to take part.
            first = number * per_batch if number < n_batches else 0
            here = starts[first : first + per_batch]
            inputs, targets = gather(self.corpus.val, here, size)
            with self.precision.autocast():
                loss = self.model(inputs.to(self.device), targets.to(self.device))
            if number < n_batches:
                total += loss.item() * len(here)
        self.model.train()
        settle(self.model)
        return self.world.sums(total)[0] / len(starts)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Have the averaged weights in the model, within the block; nothing without an average."""
        self.updater.swap_average()
        try:
            yield
        finally:
            self.updater.swap_average()

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what} at step {self.step}: training has diverged; lower --lr (now "
            f"{self.recipe.lr}); the saved checkpoints are untouched"
        )

    def _save(self, val_loss: float | None) -> None:
        """Have the main process save a checkpoint; with fsdp all processes give their parts."""
        state = self._state(val_loss)
        with self.world.only_main():
            if self.checkpointer is not None:
                self.checkpointer.save(state)

    def _state(self, val_loss: float | None) -> TrainingState:
        parameters = dict(self.model.named_parameters())
        moments = self.updater.optimizer.state
        return TrainingState(
            self.step,
            {name: whole(p.detach()) for name, p in parameters.items()},
            {
                f"{name}.{key}": whole(value)
                for name, p in parameters.items()
                for key, value in moments.get(p, {}).items()
            },
            val_loss,
            self.model.config,
            self.corpus.tokenizer.fingerprint,
            self.corpus.sha256,
            {n: whole(t) for n, t in self.updater.average.items()} or None,
            {**asdict(self.standing), **self.updater.extra_state()},
        )

    def _show_sample(self, progress: Progress) -> None:
        """Print a sample of the present model; nothing of the training is disturbed."""
        with progress.paused(), self._averaged(), torch.random.fork_rng():
            model = self._whole_model()
            if self.world.is_main:
                text = self._sample(model)
                progress.say(f"--- a sample at step {self.step:,}\n{text}\n---")
                if self.loggers is not None:
                    self.loggers.text(self.step, text)

    def _whole_model(self) -> GPT:
        """Return the model, or with fsdp a copy of it that is whole."""
        if self.recipe.parallel != "fsdp" or self.world.size == 1:
            return self.model
        with torch.device("meta"):
            model = GPT(self.model.config, self.recipe.ops)
        tensors = {name: whole(p.detach()) for name, p in self.model.named_parameters()}
        model.load_state_dict(tensors, assign=True)
        return model

    def _sample(self, model: GPT) -> str:
        tokenizer, recipe = self.corpus.tokenizer, self.recipe
        start = torch.tensor([[tokenizer.start_token]], device=self.device)
        ids = generate(model, start, recipe.sample_tokens, temperature=0.8, seed=recipe.seed)
        return tokenizer.decode(ids[0, 1:])

    def _finish(self) -> Result:
        """Draw the loss curve and write a sample with the best weights."""
        result = None
        with self.world.only_main() as main:
            if main:
                result = self._finish_alone()
        told: Result = self.world.tell(result)
        return told

    def _finish_alone(self) -> Result:
        from fastgpt.plot import plot_losses  # matplotlib: only when there is something to draw

        plot_losses(self.run)
        best = find_checkpoint(self.run, "best", weights_only=True)
        assert best.val_loss is not None  # the last step was evaluated
        model = best.load_model(self.device, self.recipe.ops, ema=best.has_ema)
        sample = self._sample(model)
        with writing(self.run):
            (self.run / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        seconds = self.standing.seconds
        return Result(self.run, self.step, best.step, best.val_loss, sample, seconds)

    # --- what a person sees --------------------------------------------------------------------

    def _progress(self) -> Progress:
        peak = device_peak(self.device, self.precision.dtype) if self.world.is_main else None
        self.peak = peak
        return Progress(
            self.step,
            self.recipe.max_steps,
            seconds=self.standing.seconds,
            flops_per_token=flops_per_token(
                self.model.config, self.model.num_params(embeddings=False)
            ),
            peak=peak.flops * self.world.size if peak else None,
            memory=lambda: used(self.device),
            shown=self.world.is_main,
        )

    def _enough_memory(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a want of memory is told with what to change."""
        return explain_out_of_memory(self._memory(), self.free)

    def _memory(self) -> MemoryEstimate:
        """Return what a step is expected to need on this device."""
        recipe = self.recipe
        return estimate(
            self.config,
            recipe.batch_size,
            grad_accum=recipe.grad_accum,
            dtype=self.precision.dtype,
            backend=self.backend,
            device=self.device.type,
            world_size=self.world.size,
            fsdp=recipe.parallel == "fsdp" and self.world.size > 1,
            recompute=recipe.recompute,
        )

    def _open_loggers(self) -> None:
        if self.world.is_main:
            settings = asdict(self.recipe)
            self.loggers = open_loggers(self.recipe.log, self.run, settings, self.step)

    def _record(self, **values: float) -> None:
        if self.loggers is not None:
            self.loggers.log(self.step, {**values, "tokens": self.step * self.step_tokens})

    def _summary(self) -> str:
        """Say what is about to happen, and what was decided on the way."""
        parameters = self.model.num_params() / 1e6
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        kernels = ", Triton kernels" if self.backend == "triton" else ""
        several = f", {self.world.size} processes" if self.world.size > 1 else ""
        mfu = f"; MFU is of the {self.peak}" if self.peak else ""
        lines = [
            f"{parameters:.2f}M parameters, vocabulary of {self.corpus.tokenizer.vocab_size:,}, "
            f"{len(self.corpus.train):,} training and {len(self.corpus.val):,} validation tokens",
            f"{self.device.type}{kernels}{threads}{several}; {self.precision}; "
            f"a step's tensors: about {gigabytes(self._memory().total)}{mfu}",
            *self._notes,
            f"run folder: {self.run}",
        ]
        return "\n".join(lines)


def _wants_compile(wish: str, device: torch.device) -> bool:
    return wish == "yes" or (wish == "auto" and device.type == "cuda")


def _backend_name(name: str, device: torch.device, config: GPTConfig) -> str:
    """Return which backend will compute; UsageError if it cannot."""
    try:
        fit = ops.kernels_fit(config.n_embd, config.n_head, torch.float32)
        return ops.check_device(name, device, fit)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None


def _model_config(recipe: Recipe, corpus: Corpus) -> GPTConfig:
    try:
        return GPTConfig(
            vocab_size=corpus.tokenizer.vocab_size,
            block_size=recipe.block_size,
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            n_embd=recipe.n_embd,
            dropout=recipe.dropout,
            bias=recipe.bias,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
