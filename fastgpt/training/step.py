"""A single training step: the model, its data and its optimizer, on one or several processes.

`Learner` runs individual steps. Evaluation, files and stopping are handled by
`fastgpt.training.trainer`. The result of a step depends only on the recipe and the step number.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.checkpoint.load import Checkpoint
from fastgpt.data.batches import Batches, validation_windows
from fastgpt.data.corpus import Corpus, load_corpus
from fastgpt.data.prefetch import MicroBatchLoader
from fastgpt.data.text import PACKAGED
from fastgpt.lora import Lora, add_lora
from fastgpt.model import GPT, GPTConfig, meta_model
from fastgpt.training.compile import compile_or_fallback
from fastgpt.training.distributed import (
    World,
    full_tensor,
    gradient_sync,
    shard_like,
    split_step,
    wrap,
)
from fastgpt.training.initialization import Origin, initialize_from, tokenizer_setting
from fastgpt.training.memory_advice import (
    batch_sizes,
    check_fits,
    explain_out_of_memory,
    find_batch,
    largest_batch,
)
from fastgpt.training.memory_estimate import MemoryEstimate, Setup, estimate
from fastgpt.training.optimizer import Updater, learning_rate
from fastgpt.training.recipes import Recipe, is_path
from fastgpt.training.run_length import resolve_length
from fastgpt.utils.errors import UsageError
from fastgpt.utils.hashing import mix
from fastgpt.utils.host_memory import keep_freed_memory, trim_pool
from fastgpt.utils.memory_usage import available
from fastgpt.utils.precision import Precision, choose_precision, fastest

TRIAL_TOKENS = 1024  # per trial step, when the precisions are timed


class Learner:
    """A model with its data, optimizer and precision, trained on one device.

    On a CPU, the allocator is configured to keep freed memory for the rest of the process.

    Args:
        recipe: The settings, see `fastgpt.training.recipes`. Values that it leaves open (precision,
            batch size, number of steps, shape of a pretrained model) are filled in in
            `self.recipe`.
        device: The device to train on.
        world: The processes that share each step.
        origin: For a resumed run, its tokenizer, model configuration and data hash.
        given: Names of settings that a pretrained model (`init`) must not override.

    Attributes:
        model: The model; with FSDP, the shard of this process.
        module: The module that training calls: the model wrapped for DDP or FSDP, and compiled.
        updater: The `Updater` with the optimizer.
        corpus: The training and validation data and the tokenizer.
        val_starts: The start positions of the validation windows.
        precision: The precision of the matrix products.
        notes: Messages about values that were chosen automatically.

    Raises:
        UsageError: If settings or data are invalid.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        world: World,
        origin: Origin | None = None,
        given: Collection[str] = (),
    ) -> None:
        self.device, self.world = device, world
        self.notes: list[str] = []
        self._precisions = choose_precision(recipe.dtype, device)
        self.precision = self._precisions[0]
        if origin is None and recipe.init is not None:
            recipe, origin, note = initialize_from(recipe, world, given)
            self.notes.append(note)
        self.corpus = _load(recipe, world, origin)
        if origin is None:
            recipe = _with_tokenizer_of(recipe, self.corpus)
        self.config = origin.config if origin else _model_config(recipe, self.corpus)
        self.lora = _lora(recipe) if recipe.lora_rank else None
        self.backend = _backend_name(recipe.ops, device, self.config)
        self.batches = Batches(self.corpus.train, recipe.block_size, recipe.seed)
        self.val_starts = validation_windows(self.corpus.val, recipe.block_size, recipe.eval_tokens)
        self.recipe, length = resolve_length(recipe, self.batches.n_windows)
        self.notes += filter(None, [length])
        torch.manual_seed(recipe.seed)
        self.free = available(device)
        with self.explain_memory_errors():
            self._make_model(origin.weights if origin else None)
        self._prepare()

    @property
    def sequences(self) -> int:
        """The number of sequences per step, over all processes."""
        return self.recipe.batch_size * self.recipe.grad_accum

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.updater.optimizer.param_groups[0]["lr"])

    # --- a step --------------------------------------------------------------------------------

    def loader(self, first: int) -> MicroBatchLoader:
        """Return an iterator over this process's micro-batches, starting at step `first`."""
        plan = (
            (step * self.sequences + at, count)
            for step in range(first, self.recipe.max_steps)
            for at, count in self.share
        )
        return MicroBatchLoader(self.batches, plan, self.device)

    def step(self, number: int, loader: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run optimizer step `number` (from 0) with the next micro-batches of `loader`.

        Returns:
            This process's loss and the gradient norm, as tensors on the device, without
            synchronization. The mean of this loss over the processes is the mean loss over all
            tokens of the step.
        """
        recipe, world = self.recipe, self.world
        self._seed(int(mix(mix(recipe.seed, number), world.rank)) >> 1)
        losses = []
        for position, (_, count) in enumerate(self.share, start=1):
            # A micro-batch contributes count / sequences to the mean over the step, which is the
            # mean over its tokens, as all sequences have the same number. DDP and FSDP divide the
            # summed gradients by the world size, which this factor compensates.
            weight = count * world.size / self.sequences
            with gradient_sync(self.module, enabled=position == len(self.share)):
                losses.append(self.backward(*next(loader), weight))
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return loss, self.updater.step(learning_rate(number, recipe))

    def backward(self, inputs: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Accumulate the gradients of one micro-batch and return its weighted loss (a scalar).

        The loss stays on the device and is detached.
        """
        with self.precision.autocast():
            loss: Tensor = self.module(inputs, targets) * weight
        self.updater.scaled(loss).backward()
        return loss.detach()

    def _seed(self, seed: int) -> None:
        """Seed the random number generator used by dropout.

        On a CPU, seed only the CPU generator: `torch.manual_seed` also records a stack trace for
        each device type that is not in use, which costs 1% of a small model's step.
        """
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    # --- to and from a checkpoint --------------------------------------------------------------

    def model_tensors(self) -> dict[str, Tensor]:
        """Return the full (unsharded) weights by name. All processes must call it."""
        return {name: full_tensor(p.detach()) for name, p in self.model.named_parameters()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the full optimizer state by name, such as `wte.weight.exp_avg`.

        All processes must call it.
        """
        moments = self.updater.optimizer.state
        return {
            f"{name}.{key}": full_tensor(value)
            for name, p in self.model.named_parameters()
            for key, value in moments.get(p, {}).items()
        }

    def average_tensors(self) -> dict[str, Tensor] | None:
        """Return the full averaged weights, or None without averaging. All processes must call."""
        return {n: full_tensor(t) for n, t in self.updater.average.items()} or None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the weights, their average and the optimizer state from a checkpoint."""
        with self.explain_memory_errors():
            checkpoint.restore(self.model, self.updater.optimizer, shard_like)
            if self.updater.average:
                saved = checkpoint.model_tensors(ema=True)
                for name, average in self.updater.average.items():
                    average.copy_(shard_like(saved[name], average))
        self.updater.restore_extra(checkpoint.extra)

    def extra_state(self) -> dict[str, Any]:
        """Return the state, other than tensors, that must be saved in a checkpoint."""
        lora = {"lora": self.lora.as_dict()} if self.lora else {}
        return {**self.updater.extra_state(), **lora}

    # --- memory --------------------------------------------------------------------------------

    def explain_memory_errors(self) -> AbstractContextManager[None]:
        """Return a context manager that turns out-of-memory errors into helpful UsageErrors."""
        return explain_out_of_memory(self.memory(), self.free)

    def memory(self) -> MemoryEstimate:
        """Return the estimated memory of a training step on this device."""
        recipe = self.recipe
        setup = Setup(
            self.config,
            recipe.batch_size,
            recipe.grad_accum,
            self.precision.dtype,
            self.backend,
            self.device.type,
            self.world.size,
            fsdp=recipe.parallel == "fsdp" and self.world.size > 1,
            recompute=recipe.recompute,
            lora=self.lora,
        )
        return estimate(setup)

    # --- construction --------------------------------------------------------------------------

    def _make_model(self, weights: Mapping[str, Tensor] | None) -> None:
        """Create the model, newly initialized or with the pretrained weights of the main process.

        weights: the pretrained weights in the main process, an empty mapping in the others, or None
        for a new model.
        """
        if weights is None:
            self.model = GPT(self.config, self.recipe.ops).to(self.device)
        else:
            model = meta_model(self.config, self.recipe.ops)
            self.model = model.to_empty(device=self.device)
            if self.world.is_main:
                self.model.load_state_dict(weights)
        if self.lora:
            add_lora(self.model, self.lora)
        if weights is not None:
            self.world.broadcast_tensors(self.model.parameters())
        self.model.recompute = self.recipe.recompute
        if self.device.type == "cpu":
            keep_freed_memory()

    def _prepare(self) -> None:
        """Wrap the model for the processes, create the optimizer, and compile.

        Also chooses the precision and the batch size if the recipe leaves them open, and adds a
        warning to `notes` if a step may not fit into memory.
        """
        on_cuda = self.device.type == "cuda"
        with self.explain_memory_errors():
            self.module = wrap(self.model, self.world, self.recipe.parallel)
            self._choose_precision()
            self.updater = Updater(self.model, self.recipe, self.precision.dtype)
            if self.recipe.find_batch:  # before compiling, which runs a step with the batch size
                self._find_batch()
            if self.recipe.compile == "yes" or (self.recipe.compile == "auto" and on_cuda):
                self.module, note = compile_or_fallback(self.module, self._trial, self.world)
                self.notes.append(note)
        self.share = split_step(self.sequences, self.recipe.batch_size, self.world)
        if warning := check_fits(self.memory(), self.free):
            self.notes.append(f"warning: {warning}")

    def _choose_precision(self) -> None:
        """Choose the fastest precision, and store it in the recipe so that a resume keeps it."""
        if len(self._precisions) == 1:
            return
        batch = min(self.recipe.batch_size, max(1, TRIAL_TOKENS // self.recipe.block_size))
        found = fastest(self._precisions, lambda tried: self._trial(self.module, batch, tried))
        trim_pool()  # release the memory that the other precision needed
        self.precision = self.world.broadcast_object(found)
        changes: dict[str, Any] = {"dtype": self.precision.name}
        self.recipe = replace(self.recipe, **changes)

    def _find_batch(self) -> None:
        """Choose the largest micro-batch that fits.

        The memory estimate decides; on CUDA with DDP, candidates are also tried with a real step.
        """
        most = 1 if self.free is None else largest_batch(self.memory().setup, self.free) or 1
        found = batch_sizes(self.sequences, most)
        if self.device.type == "cuda" and self.recipe.parallel == "ddp":
            found = [find_batch(lambda size: self._trial(self.model, size), found)]
        (most_negative,) = self.world.all_reduce_max(-found[0])
        batch = -most_negative  # the minimum over the processes
        accum = self.sequences // batch
        self.recipe = replace(self.recipe, batch_size=batch, grad_accum=accum, find_batch=False)
        self.notes.append(f"largest micro-batch: --batch-size {batch} --grad-accum {accum}")

    def _trial(self, module: nn.Module, batch: int = 0, precision: Precision | None = None) -> None:
        """Run forward and backward of one micro-batch, and discard the gradients.

        batch: number of sequences; 0 for the recipe's `batch_size`.
        """
        inputs, targets = self.batches.samples(0, batch or self.recipe.batch_size)
        try:
            with (precision or self.precision).autocast():
                loss = module(inputs.to(self.device), targets.to(self.device))
            loss.backward()
        finally:  # a backward that fails midway also leaves gradients
            self.model.zero_grad()


def _load(recipe: Recipe, world: World, origin: Origin | None) -> Corpus:
    """Load the data. Only the main process validates it and trains or loads the tokenizer."""
    if not recipe.data:
        raise UsageError("this recipe needs a text to train on: add --data my.txt")
    load = partial(
        load_corpus,
        recipe.data,
        val_fraction=recipe.val_fraction,
        val_data=recipe.val_data,
        vocab_size=recipe.vocab_size,
    )
    tokenizer = origin.tokenizer if origin else recipe.tokenizer
    sha256 = origin.data_sha256 if origin else None
    corpus = world.on_main(lambda: load(tokenizer=tokenizer, sha256=sha256))
    tokenizer, sha256 = world.broadcast_object(corpus and (corpus.tokenizer, corpus.sha256))
    return corpus or load(tokenizer=tokenizer, sha256=sha256, check=False)


def _with_tokenizer_of(recipe: Recipe, corpus: Corpus) -> Recipe:
    """Return the recipe with the tokenizer and vocabulary size of a folder of token files."""
    folder = Path(recipe.data)
    if recipe.data in PACKAGED or not folder.is_dir():
        return recipe
    name = tokenizer_setting(corpus.tokenizer, str(folder / "tokenizer.json"))
    if is_path(name) and not Path(name).is_file():  # a folder of texts: the setting was used
        return recipe
    return replace(recipe, tokenizer=name, vocab_size=corpus.tokenizer.vocab_size)


def _model_config(recipe: Recipe, corpus: Corpus) -> GPTConfig:
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in names}
    try:
        return GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _backend_name(name: str, device: torch.device, config: GPTConfig) -> str:
    """Return the name of the backend to use; raise UsageError if it is not available."""
    try:
        fit = ops.kernels_fit(config.n_embd, config.n_head, torch.float32)
        return ops.check_device(name, device, fit)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None


def _lora(recipe: Recipe) -> Lora:
    return Lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout, recipe.lora_targets)
