"""Create run folders, read them back for a resume, and check what a resume may change."""

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from fastgpt.checkpoint.load import CheckpointError, read_json
from fastgpt.checkpoint.run_lock import NAME as LOCK
from fastgpt.data.text import PACKAGED
from fastgpt.model import GPTConfig
from fastgpt.training.distributed import launcher
from fastgpt.training.environment import command_line, describe_environment
from fastgpt.training.recipes import Recipe, recipe_from_dict
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import write_json

# Settings that identify a run: a resume must not change them.
FIXED_SETTINGS = (
    *("n_layer", "n_head", "n_embd", "block_size", "bias", "tokenizer", "val_fraction"),
    *("vocab_size", "init", "lora_rank", "lora_alpha", "lora_targets", "seed", "out", "ema"),
)


def check_unoccupied(recipe: Recipe) -> None:
    """Raise UsageError if the folder of a new run (`recipe.out`) exists and is not empty."""
    run = Path(recipe.out or "")
    if not recipe.out or not run.exists():
        return
    if not run.is_dir() or any(file.name != LOCK for file in run.iterdir()):
        raise UsageError(
            f"{run} is not empty; continue it with --resume {run}, or choose another --out"
        )


def new_run_folder(recipe: Recipe, name: str) -> Path:
    """Create the folder of a new run and return its path.

    Raises:
        UsageError: If the folder is not empty or cannot be created.
    """
    check_unoccupied(recipe)
    run = Path(recipe.out) if recipe.out else _unused(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"run folder {run} cannot be created: {error.strerror}") from None
    return run


@contextmanager
def explain_write_errors(run: Path) -> Iterator[None]:
    """Turn an OSError within the block into a UsageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"run folder {run} cannot be written: {error.strerror or error}; fix this, then "
            f"continue with --resume or, if nothing was saved yet, delete the folder and restart"
        ) from None


def link_latest(run: Path) -> None:
    """Make the link `runs/latest` point to a run in `runs`.

    Does nothing where links are not supported: the newest run is then found by its time.
    """
    link, temporary = (run.parent / name for name in ("latest", ".saving-latest"))
    if run.name == link.name or not (run.parent.name == "runs" or link.is_symlink()):
        return
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.name, target_is_directory=True)
        try:
            temporary.replace(link)
        finally:
            temporary.unlink(missing_ok=True)


def describe_run(run: Path, name: str, recipe: Recipe, config: GPTConfig) -> None:
    """Write `config.json` with the recipe, model configuration, command line and environment."""
    write_json(
        run / "config.json",
        {
            "name": name,
            "recipe": asdict(recipe),
            "model": asdict(config),
            "command": command_line(),
            "launcher": launcher(),
            **describe_environment(),
        },
    )


def read_run(run: Path) -> tuple[str, Recipe]:
    """Return the name and the recipe of the run in a folder.

    Raises:
        CheckpointError: If the folder's `config.json` is missing or has no recipe.
    """
    path = run / "config.json"
    config = read_json(path)
    if not isinstance(config.get("recipe"), dict):
        raise CheckpointError(f"{path} contains no recipe")
    return str(config.get("name", "run")), recipe_from_dict(config["recipe"], str(path))


def find_data(run: Path, recipe: Recipe) -> dict[str, str | None]:
    """Return the settings `data` and `val_data` of a run, to be used from the current directory.

    A relative path is resolved against the directory in which the run was started, if the file
    still exists there, and is returned unchanged otherwise.
    """
    directory = read_json(run / "config.json").get("directory")
    found = {"data": recipe.data, "val_data": recipe.val_data}
    if not isinstance(directory, str) or Path.cwd() == Path(directory):
        return found
    for name, path in found.items():
        if path and path not in PACKAGED and (Path(directory) / path).exists():
            found[name] = str(Path(directory) / path)
    return found


def check_resume_settings(before: Recipe, after: Recipe) -> None:
    """Raise CheckpointError if a resume would change the model, the data split or its order."""
    names = list(FIXED_SETTINGS)
    if before.batch_size * before.grad_accum != after.batch_size * after.grad_accum:
        # Steps would cover other sequences, so that parts of the data would be repeated or skipped.
        names += ["batch_size", "grad_accum"]
    changed = [
        f"{name} {getattr(before, name)} → {getattr(after, name)}"
        for name in names
        if getattr(before, name) != getattr(after, name)
    ]
    if changed:
        raise CheckpointError(f"cannot resume with changes: {', '.join(changed)}")


def check_max_steps(step: int, after: Recipe) -> None:
    """Raise CheckpointError if the run is already past the last step, `max_steps`."""
    if after.max_steps < step:
        raise CheckpointError(f"the run is already at step {step:,}: raise --max-steps above it")


def interrupted_run(recipe: Recipe) -> Path | None:
    """Return the run that these processes were training before `torchrun` restarted them.

    None if they were not restarted, or if the run has no checkpoint yet; its folder is deleted
    then. The run is recognized by the launcher's name in its `config.json`.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not (name := launcher()):
        return None
    candidates = [Path(recipe.out)] if recipe.out else sorted(Path("runs").glob("*"))
    for run in reversed([path for path in candidates if not path.is_symlink()]):
        with suppress(CheckpointError):  # not a run folder
            if read_json(run / "config.json").get("launcher") == name:
                if any(run.glob("checkpoints/step-*")):
                    return run
                shutil.rmtree(run)
    return None


def _unused(name: str) -> Path:
    """Return an unused path in `runs`, with a number if runs start within the same second."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(run for run in map(Path("runs").joinpath, names) if not run.exists())
