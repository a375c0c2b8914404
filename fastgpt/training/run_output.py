"""Write the files of a run: configuration, checkpoints, metrics and logs.

Only the main process writes. The other processes call the same methods, which synchronize with it
and re-raise its errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from fastgpt.checkpoint.load import Checkpoint, find_checkpoint
from fastgpt.checkpoint.run_lock import RunLock
from fastgpt.checkpoint.save import Checkpointer, TrainingState
from fastgpt.model import GPTConfig
from fastgpt.tokenizer import BaseTokenizer
from fastgpt.training.distributed import World
from fastgpt.training.loggers import Loggers, open_loggers
from fastgpt.training.metrics import truncate_metrics
from fastgpt.training.recipes import Recipe
from fastgpt.training.run_folder import (
    describe_run,
    explain_write_errors,
    link_latest,
    new_run_folder,
)


class RunWriter:
    """Writes the run folder `path`; `create` and `reopen` lock it for this process.

    All processes must call each method, except `close`. `loggers` record metrics and texts in the
    main process, and nothing in the others.
    """

    def __init__(self, world: World) -> None:
        self.path = Path()
        self._world = world
        self._lock: RunLock | None = None
        self._checkpointer: Checkpointer | None = None
        self.loggers = Loggers()

    def create(
        self, name: str, recipe: Recipe, config: GPTConfig, tokenizer: BaseTokenizer
    ) -> None:
        """Create and lock the folder of a new run, and write its tokenizer and `config.json`."""

        def create() -> Path:
            run = new_run_folder(recipe, name)
            self._take(run, recipe.keep)
            with explain_write_errors(run):
                tokenizer.save(run / "tokenizer.json")
                describe_run(run, name, recipe, config)
            link_latest(run)
            return run

        self.path = self._world.from_main(create)

    def reopen(self, run: Path, keep: int, notes: list[str]) -> Checkpoint:
        """Lock an existing run, and return its newest valid checkpoint as found by rank 0.

        Reports about damaged checkpoints are appended to `notes`.
        """

        def reopen() -> Checkpoint:
            self._take(run, keep)
            return find_checkpoint(run, report=notes.append)

        self.path = run
        return self._world.from_main(reopen)

    def rewind(self, name: str, recipe: Recipe, config: GPTConfig, step: int) -> None:
        """Rewrite `config.json` for the resumed run, and drop the results after `step`."""

        def rewind() -> None:
            with explain_write_errors(self.path):
                describe_run(self.path, name, recipe, config)
                truncate_metrics(self.path / "metrics.jsonl", step)
                (self.path / "summary.json").unlink(missing_ok=True)
            link_latest(self.path)

        self._world.on_main(rewind)

    def _take(self, run: Path, keep: int) -> None:
        """Lock the folder for this process, before anything in it is read or changed."""
        self._lock = RunLock(run)
        self._checkpointer = Checkpointer(run, keep)

    @contextmanager
    def opened(self, recipe: Recipe, step: int) -> Iterator[None]:
        """Accept records and checkpoints within the block.

        At the end of the block, the last checkpoint has been written to disk. If the block ends
        with KeyboardInterrupt or SystemExit, a checkpoint that is still being written is abandoned.
        """

        def open_files() -> None:
            if self._lock is not None and not self._lock.held:  # released by an earlier `close`
                self._lock = RunLock(self.path)
            self.loggers = open_loggers(recipe.log, self.path, asdict(recipe), step)

        self._world.on_main(open_files)
        with self._checkpointer or nullcontext():
            yield

    def save(self, state: TrainingState) -> None:
        """Save a checkpoint."""

        def save() -> None:
            assert self._checkpointer is not None
            self._checkpointer.save(state)

        self._world.on_main(save)

    def close(self) -> None:
        """Close the loggers and release the lock of the folder. May be called repeatedly."""
        self.loggers.close()
        self.loggers = Loggers()
        if self._lock is not None:
            self._lock.release()
