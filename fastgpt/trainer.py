"""The training loop.

`Trainer(recipe).fit()` trains, evaluates, keeps the best checkpoint, draws the loss curve and ends
with a sample. What happens at a step is a function of the recipe and the step alone, so a run that
was stopped and resumed computes the same as one that was not.
"""

import ctypes
import math
import platform
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt import ops
from fastgpt.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_run_tokenizer,
    read_json,
    resolve_run,
    save_checkpoint,
    sweep,
    write_json,
)
from fastgpt.data import Batches, Corpus, gather, load_corpus, mix, validation_windows
from fastgpt.device import find_device
from fastgpt.errors import UsageError
from fastgpt.generation import generate
from fastgpt.metrics import append_metrics, cut_metrics
from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import learning_rate, make_optimizer
from fastgpt.progress import Progress
from fastgpt.recipes import Recipe, recipe_from_dict
from fastgpt.signals import Stopped, StopSignal
from fastgpt.tokenizer import BaseTokenizer

# What a run is: changed at a resume, it would be another run.
FIXED_SETTINGS = (
    *("n_layer", "n_head", "n_embd", "block_size", "bias", "tokenizer", "val_fraction"),
    *("seed", "out"),
)


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    run: Path
    step: int
    best_step: int
    best_val_loss: float
    sample: str
    seconds: float


class Trainer:
    """Trains one recipe into one run folder.

    recipe: see `fastgpt.recipes`. name: goes into the run folder's name. `Trainer.resume(run)`
    continues a run from its newest good checkpoint. Wrong settings, data or folders raise
    UsageError before the first step. On a CPU the process keeps freed memory from then on.
    """

    def __init__(self, recipe: Recipe, name: str = "run") -> None:
        self._build(recipe)
        self.run = _new_run_folder(recipe, name)
        self.corpus.tokenizer.save(self.run / "tokenizer.json")
        self._describe_run(name)

    @classmethod
    def resume(cls, run: str | Path, **changes: Any) -> "Trainer":
        """Continue the run in folder `run`, with settings changed as given (say, `max_steps`)."""
        run = resolve_run(Path(run))
        name, before = read_run(run)
        recipe = replace(before, **changes)
        checkpoint = find_checkpoint(run)
        _refuse_changes(before, recipe, checkpoint.step)
        trainer = cls.__new__(cls)
        trainer._build(recipe, load_run_tokenizer(run, checkpoint), checkpoint.data_sha256)
        checkpoint.restore(trainer.model, trainer.optimizer)
        trainer.run, trainer.step = run, checkpoint.step
        trainer._evaluated = checkpoint.val_loss is not None
        sweep(run)
        trainer._describe_run(name)
        cut_metrics(run / "metrics.jsonl", checkpoint.step)
        return trainer

    def fit(self) -> Result:
        """Train to `max_steps`.

        Ctrl-C or SIGTERM finishes the step, saves, and raises `Stopped`.
        """
        began = time.perf_counter()
        with StopSignal() as stop, Progress(self.step, self.recipe.max_steps) as progress:
            progress.say(self._summary())
            while self.step < self.recipe.max_steps:
                self._step(progress)
                if self.step % self.recipe.eval_interval == 0 or self._finished():
                    self._evaluate(progress)
                elif stop.requested:
                    self._save(val_loss=None)
                if stop.requested and not self._finished():
                    raise Stopped(stop.requested, self.run, self.step)
            if not self._evaluated:  # resumed at its last step
                self._evaluate(progress)
        return self._finish(time.perf_counter() - began)

    # --- a run's parts -------------------------------------------------------------------------

    def _build(
        self, recipe: Recipe, tokenizer: BaseTokenizer | None = None, data_sha256: str | None = None
    ) -> None:
        """Make everything that does not touch the disk: data, model, optimizer."""
        self.recipe, self.step, self._evaluated = recipe, 0, False
        self.device = find_device(recipe.device)
        self.corpus = _corpus(recipe, tokenizer, data_sha256)
        config = _model_config(recipe, self.corpus)
        self.backend = _backend_name(recipe.ops, self.device, config)
        self.batches = Batches(self.corpus.train, recipe.block_size, recipe.seed)
        self.val_starts = validation_windows(self.corpus.val, recipe.block_size, recipe.eval_tokens)
        torch.manual_seed(recipe.seed)
        self.model = GPT(config, recipe.ops).to(self.device)
        self.optimizer = make_optimizer(self.model, recipe)
        if self.device.type == "cpu":
            _keep_freed_memory()

    def _describe_run(self, name: str) -> None:
        write_json(
            self.run / "config.json",
            {
                "name": name,
                "recipe": asdict(self.recipe),
                "model": asdict(self.model.config),
                "command": " ".join(sys.argv),
                "versions": {
                    "fastgpt": fastgpt.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            },
        )

    def _summary(self) -> str:
        parameters = self.model.num_params() / 1e6
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        kernels = ", Triton kernels" if self.backend == "triton" else ""
        precision = "bfloat16" if self._autocast_dtype() else "float32"
        return (
            f"{parameters:.2f}M parameters, vocabulary of {self.corpus.tokenizer.vocab_size:,}, "
            f"{len(self.corpus.train):,} training and {len(self.corpus.val):,} validation tokens, "
            f"{self.device.type} ({precision}{kernels}{threads})\nrun folder: {self.run}"
        )

    # --- a step --------------------------------------------------------------------------------

    def _step(self, progress: Progress) -> None:
        """Do one optimizer step: the loss is the mean over all tokens of all micro-batches."""
        recipe = self.recipe
        lr = learning_rate(self.step, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(int(mix(recipe.seed, self.step)) >> 1)  # dropout's
        first = self.step * recipe.grad_accum
        losses = [
            self._backward(*self.batches.samples(micro * recipe.batch_size, recipe.batch_size))
            for micro in range(first, first + recipe.grad_accum)
        ]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = recipe.grad_accum * recipe.batch_size * recipe.block_size
        progress.stepped(self.step, tokens)
        if progress.due():
            self._log(progress, torch.stack(losses).mean().item(), lr, norm.item())

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add one micro-batch's gradients; return its loss, still on the device."""
        with self._autocast():
            loss: Tensor = self.model(inputs.to(self.device), targets.to(self.device))
        (loss / self.recipe.grad_accum).backward()
        return loss.detach()

    def _log(self, progress: Progress, loss: float, lr: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"loss {loss}, gradient norm {norm}")
        progress.show(loss, lr)
        self._record(loss=loss, lr=lr, grad_norm=norm, tokens_per_s=progress.tokens_per_s)

    # --- evaluation, saving, the end -----------------------------------------------------------

    def _evaluate(self, progress: Progress) -> None:
        """Measure the validation loss, report it, and save."""
        self._evaluated = True
        with progress.paused():
            val_loss = self.validation_loss()
            self._record(val_loss=val_loss)
            if not math.isfinite(val_loss):
                raise self._diverged(f"validation loss {val_loss}")
            progress.evaluated(val_loss)
            self._save(val_loss)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss, in nats per token, over the fixed validation windows."""
        self.model.eval()
        size = self.recipe.block_size
        per_batch = max(1, 8192 // size)
        total = 0.0
        for first in range(0, len(self.val_starts), per_batch):
            starts = self.val_starts[first : first + per_batch]
            inputs, targets = gather(self.corpus.val, starts, size)
            with self._autocast():
                loss = self.model(inputs.to(self.device), targets.to(self.device))
            total += loss.item() * len(starts)
        self.model.train()
        return total / len(self.val_starts)

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what} at step {self.step}: training has diverged; lower --lr (now "
            f"{self.recipe.lr}); the saved checkpoints are untouched"
        )

    def _save(self, val_loss: float | None) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self._diverged("weights that are not finite")
        save_checkpoint(
            self.run,
            self.step,
            self.model,
            self.optimizer,
            val_loss=val_loss,
            tokenizer_hash=self.corpus.tokenizer.fingerprint,
            data_sha256=self.corpus.sha256,
        )

    def _finish(self, seconds: float) -> Result:
        """Draw the loss curve and write a sample with the best weights."""
        from fastgpt.plot import plot_losses  # matplotlib: only when there is something to draw

        plot_losses(self.run)
        best = find_checkpoint(self.run, "best")
        assert best.val_loss is not None  # the last step was evaluated
        model = best.load_model(self.device, self.recipe.ops)
        tokenizer = self.corpus.tokenizer
        start = torch.tensor([[tokenizer.start_token]], device=self.device)
        ids = generate(
            model, start, self.recipe.sample_tokens, temperature=0.8, seed=self.recipe.seed
        )
        sample = tokenizer.decode(ids[0, 1:])
        (self.run / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        return Result(self.run, self.step, best.step, best.val_loss, sample, seconds)

    def _finished(self) -> bool:
        return self.step >= self.recipe.max_steps

    def _record(self, **values: float) -> None:
        append_metrics(self.run / "metrics.jsonl", {"step": self.step, **values})

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._autocast_dtype()
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def _autocast_dtype(self) -> torch.dtype | None:
        wanted = self.recipe.dtype
        if wanted == "auto":
            wanted = "bfloat16" if self.device.type == "cuda" else "float32"
        return torch.bfloat16 if wanted == "bfloat16" else None


def _backend_name(name: str, device: torch.device, config: GPTConfig) -> str:
    """Return which backend will compute; UsageError if it cannot."""
    try:
        fit = ops.kernels_fit(config.n_embd, config.n_head, torch.float32)
        return ops.check_device(name, device, fit)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None


def read_run(run: Path) -> tuple[str, Recipe]:
    """Return the name and the recipe that a run folder was made with."""
    path = run / "config.json"
    config = read_json(path)
    if not isinstance(config.get("recipe"), dict):
        raise CheckpointError(f"{path} holds no recipe")
    return str(config.get("name", "run")), recipe_from_dict(config["recipe"], str(path))


def _refuse_changes(before: Recipe, after: Recipe, step: int) -> None:
    """Refuse to continue a run at `step` as another run: another model, data split or order."""
    changed = [
        f"{name} {getattr(before, name)} → {getattr(after, name)}"
        for name in FIXED_SETTINGS
        if getattr(before, name) != getattr(after, name)
    ]
    if changed:
        raise CheckpointError(f"cannot resume with changes: {', '.join(changed)}")
    if after.max_steps < step:
        raise CheckpointError(f"the run is at step {step:,} already: raise --max-steps above it")


def _corpus(recipe: Recipe, tokenizer: BaseTokenizer | None, sha256: str | None) -> Corpus:
    if not recipe.data:
        raise UsageError("this recipe needs a text to train on: add --data my.txt")
    return load_corpus(recipe.data, tokenizer or recipe.tokenizer, recipe.val_fraction, sha256)


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


def _new_run_folder(recipe: Recipe, name: str) -> Path:
    run = Path(recipe.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UsageError(
            f"{run} is not empty; continue it with --resume {run}, or choose another --out"
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"run folder {run} cannot be created: {error.strerror}") from None
    return run


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of handing it back to the system.

    Each step frees and allocates the same buffers; without this the system takes the large ones
    back and gives them again page by page, zeroed: 10 to 20% of a small model's step.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
