"""Describe the environment of a run: versions, hardware, git commits and the command line.

The description is saved in the run folder, so that results can be explained and reproduced later.
"""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.utils.processor import processor_name

PACKAGES = ("triton", "numpy", "safetensors")  # packages that may affect results or files
GIT_SECONDS = 1.0  # timeout, so that a checkout on a slow disk does not delay the start


def describe_environment() -> dict[str, Any]:
    """Return versions, platform, hardware, threads and git state as JSON-compatible values.

    ``git`` holds the commit of the current directory's checkout, and whether tracked files were
    modified since. ``fastgpt_git`` holds the same of fastgpt's own sources, if these are in another
    checkout. Both are None outside a checkout or without git. The call never fails and takes about
    20 ms.
    """
    here, sources = Path.cwd(), Path(fastgpt.__file__).parent
    checkout, own_checkout = _checkout(here), _checkout(sources)
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        **_gpus(),
        "directory": str(here),
        "git": _git_state(checkout),
        "fastgpt_git": None if own_checkout == checkout else _git_state(own_checkout),
    }


def command_line() -> str:
    """Return the command line of this process, quoted for a shell.

    It can be pasted in the directory in which the process was started. For a process of a
    distributed run (RANK is set), this is the torchrun command, on several machines the one of this
    machine.
    """
    words = list(sys.orig_argv)
    if "RANK" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        added = 2 if words[1:2] == ["-u"] else 1  # torchrun inserts "python -u" or "python"
        words[:added] = _torchrun()
    return shlex.join(words)


def _versions() -> dict[str, str]:
    """Return the versions of Python and packages, without importing packages."""
    found = {
        "fastgpt": fastgpt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _gpus() -> dict[str, Any]:
    """Return GPU names and the versions of CUDA (or ROCm) and the driver; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {"gpus": names, "cuda": torch.version.cuda or torch.version.hip}
    with suppress(OSError, StopIteration):
        # The file has "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..."
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        facts["driver"] = next(word for word in words if word[0].isdigit() and "." in word)
    return facts


def _checkout(folder: Path) -> Path | None:
    """Return the root of the git checkout that contains a folder, None outside a checkout."""
    folder = folder.resolve()
    return next((up for up in (folder, *folder.parents) if (up / ".git").exists()), None)


def _git_state(checkout: Path | None) -> dict[str, Any] | None:
    """Return the commit of a checkout, and whether tracked files differ from it ("dirty").

    None without a checkout, without git, or if git fails or exceeds the timeout.
    """
    if checkout is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"],  # exclude all tags, so that only the commit hash is printed
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    commit = done.stdout.strip()
    if done.returncode or not commit:  # no commit yet, or a folder owned by another user
        return None
    return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}


def _torchrun() -> list[str]:
    """Return the torchrun command, reconstructed from the environment variables it has set."""
    per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ.get("WORLD_SIZE", per_machine)) // per_machine
    if machines == 1:
        return ["torchrun", "--standalone", f"--nproc-per-node={per_machine}"]
    return [
        "torchrun",
        f"--nnodes={machines}",
        f"--node-rank={os.environ.get('GROUP_RANK', '0')}",
        f"--nproc-per-node={per_machine}",
        f"--master-addr={os.environ.get('MASTER_ADDR', 'localhost')}",
        f"--master-port={os.environ.get('MASTER_PORT', '29500')}",
    ]
