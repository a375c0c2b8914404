"""Write the files of a run: configuration, checkpoints, metrics and logs.

Only the main process writes. The other processes call the same methods, which synchronize with it
and re-raise its errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fastgpt.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from fastgpt.checkpoint.run_lock import RunLock
from fastgpt.checkpoint.save import Checkpointer, TrainingState
from fastgpt.model import GPTConfig
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.training.distributed import World, restarted_by
from fastgpt.training.loggers import Loggers, open_loggers
from fastgpt.training.metrics import truncate_metrics
from fastgpt.training.recipes import Recipe
from fastgpt.training.run_folder import (
    check_unoccupied,
    describe_run,
    interrupted_run,
    new_run_folder,
    writing,
)


class RunWriter:
    """Writes the run folder `path`; `begin` and `take` lock it for this process.

    All processes must call each method, except `record`, `text` and `close`, which do not
    communicate.
    """

    def __init__(self, world: World) -> None:
        self.path = Path()
        self._world = world
        self._lock: RunLock | None = None
        self._checkpointer: Checkpointer | None = None
        self._loggers: Loggers | None = None

    # --- before training -----------------------------------------------------------------------

    def interrupted(self, recipe: Recipe) -> Path | None:
        """Return the run that these processes were training before `torchrun` restarted them.

        None if they were not restarted, or if the run has no checkpoint yet.
        """
        before = restarted_by()
        if before is None:
            return None
        with self._world.only_main() as main:
            run = interrupted_run(before, recipe) if main else None
        shared: Path | None = self._world.broadcast_object(run)
        return shared

    def check_unoccupied(self, recipe: Recipe) -> None:
        """Raise UsageError if the folder of a new run (`recipe.out`) exists and is not empty."""
        with self._world.only_main() as main:
            if main:
                check_unoccupied(recipe)

    def begin(self, name: str, recipe: Recipe, config: GPTConfig, tokenizer: BaseTokenizer) -> None:
        """Create and lock the folder of a new run, and write its tokenizer and `config.json`."""
        run = Path()
        with self._world.only_main() as main:
            if main:
                run = new_run_folder(recipe, name)
                self._own(run, recipe.keep)
                with writing(run):
                    tokenizer.save(run / "tokenizer.json")
                    describe_run(run, name, recipe, config)
        self.path = self._world.broadcast_object(run)

    def take(self, run: Path, keep: int, notes: list[str]) -> Checkpoint:
        """Lock an existing run, and return its newest valid checkpoint as found by rank 0.

        Reports about damaged checkpoints are appended to `notes`.
        """
        self.path, found = run, None
        with self._world.only_main() as main:
            if main:
                self._own(run, keep)
                found = find_checkpoint(run, report=notes.append)
        path = self._world.broadcast_object(found and found.path)
        return found or open_checkpoint(path)

    def go_on(self, name: str, recipe: Recipe, config: GPTConfig, step: int) -> None:
        """Rewrite `config.json` for the resumed run, and drop metrics logged after `step`."""
        with self._world.only_main() as main:
            if main:
                with writing(self.path):
                    describe_run(self.path, name, recipe, config)
                    truncate_metrics(self.path / "metrics.jsonl", step)

    def _own(self, run: Path, keep: int) -> None:
        """Lock the folder for this process, before anything in it is read or changed."""
        self._lock = RunLock(run)
        self._checkpointer = Checkpointer(run, keep)

    # --- while training ------------------------------------------------------------------------

    @contextmanager
    def opened(self, recipe: Recipe, step: int) -> Iterator[None]:
        """Accept records and checkpoints within the block.

        At the end of the block, the last checkpoint has been written to disk. If the block ends
        with KeyboardInterrupt or SystemExit, a checkpoint that is still being written is abandoned.
        """
        with self._world.only_main() as main:
            if main:
                self._lock_again()
                self._loggers = open_loggers(recipe.log, self.path, asdict(recipe), step)
        if self._checkpointer is None:
            yield
        else:
            with self._checkpointer:
                yield

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log named values of a step."""
        if self._loggers is not None:
            self._loggers.log(step, values)

    def text(self, step: int, text: str) -> None:
        """Log a text of a step."""
        if self._loggers is not None:
            self._loggers.text(step, text)

    def save(self, state: TrainingState) -> None:
        """Save a checkpoint."""
        with self._world.only_main():
            if self._checkpointer is not None:
                self._checkpointer.save(state)

    def close(self) -> None:
        """Close the loggers and release the lock of the folder. May be called repeatedly."""
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None
        if self._lock is not None:
            self._lock.release()

    def _lock_again(self) -> None:
        """Lock the folder again, if an earlier call of `fit` has released the lock."""
        if self._lock is not None and not self._lock.held:
            self._lock = RunLock(self.path)
