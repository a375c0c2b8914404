"""What a run was made with: versions, hardware, the state of the sources, and the command.

Written into the run folder, so that a result can be explained, and made again, years later.
"""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgpt

PACKAGES = ("triton", "numpy", "safetensors")  # those that results or files may depend on
GIT_SECONDS = 1.0  # a checkout on a slow disk must not hold up the start


def describe_environment() -> dict[str, Any]:
    """Return versions, machine, threads and sources as plain JSON values; it never fails.

    ``git`` says for the current directory, and ``fastgpt_git`` for fastgpt's own sources where they
    are another checkout, which commit it is and whether anything tracked was changed since; both
    are None outside a checkout or without git. It takes some 20 ms.
    """
    here, sources = Path.cwd(), Path(fastgpt.__file__).parent
    checkout, own_checkout = _checkout(here), _checkout(sources)
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **_gpus(),
        "directory": str(here),
        "git": _git_state(checkout),
        "fastgpt_git": None if own_checkout == checkout else _git_state(own_checkout),
    }


def command_line() -> str:
    """Return the command of this process, quoted for a shell, to be pasted in its directory.

    A process of a distributed run (RANK is set) was started by torchrun; what comes back is then
    torchrun's command, on several machines that of this one.
    """
    words = list(sys.orig_argv)
    if "RANK" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        added = 2 if words[1:2] == ["-u"] else 1  # what torchrun puts before the script
        words[:added] = _torchrun()
    return shlex.join(words)


def _versions() -> dict[str, str]:
    """Return the versions, without importing what was not."""
    found = {
        "fastgpt": fastgpt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _gpus() -> dict[str, Any]:
    """Return names, CUDA's version and the driver's; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {"gpus": names, "cuda": torch.version.cuda or torch.version.hip}
    try:  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..."
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        facts["driver"] = next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        pass
    return facts


def _checkout(folder: Path) -> Path | None:
    """Return the top of the git checkout that a folder lies in."""
    folder = folder.resolve()
    return next((up for up in (folder, *folder.parents) if (up / ".git").exists()), None)


def _git_state(checkout: Path | None) -> dict[str, Any] | None:
    """Return the commit of a checkout, and whether tracked files differ from it."""
    if checkout is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"],  # no tag: the commit alone
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    commit = done.stdout.strip()
    if done.returncode or not commit:  # no commit yet, or the folder of another user
        return None
    return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}


def _torchrun() -> list[str]:
    """Return the torchrun command that this process's environment tells of."""
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
