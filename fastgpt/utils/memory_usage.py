"""Query the memory that is available and in use on a device."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch


def available(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated on a device; None if unknown.

    On CUDA, this is the free memory plus what the caching allocator of this process holds unused.
    On a CPU, it is the available memory of the system, or less if a control group (of a container
    or batch job) or the process (`ulimit -v`, `ulimit -d`) has a lower limit.

    root: the folder that contains `proc` and `sys`.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type != "cpu":
        return None
    system = (1024 * kilobytes for kilobytes in _values(root / "proc/meminfo", "MemAvailable:"))
    return min((*system, *_cgroups(root), *_process_limits(root)), default=None)


def used(device: torch.device) -> int | None:
    """Return the peak bytes of tensors on a GPU, or the current resident memory of the process.

    None if unknown. The call takes a few microseconds on a CPU, and a few hundred on CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # exists on Linux only
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _values(path: Path, *names: str) -> Iterator[int]:
    """Yield the number after one of `names` in each line of a file that starts with it."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text(encoding="utf-8").splitlines():
            for name in names:
                if line.startswith(name):
                    yield int(line.removeprefix(name).split()[0])


def _process_limits(root: Path) -> Iterator[int]:
    """Yield the memory left by the limits of this process: the address space, and its data."""
    for limit, usage in (("Max address space", "VmSize:"), ("Max data size", "VmData:")):
        for most in _values(root / "proc/self/limits", limit):  # none if "unlimited"
            taken = next(_values(root / "proc/self/status", usage), 0)
            yield max(0, most - 1024 * taken)


def _cgroups(root: Path) -> Iterator[int]:
    """Yield the memory left by the control groups of this process and their ancestors."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            top = root / "sys/fs/cgroup"
            if controllers == "":  # cgroup version 2
                yield from _levels(top, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                yield from _levels(top / "memory", path, *names)


def _levels(top: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    """Yield the limit minus the usage of a control group and of each of its ancestors.

    In a container, `path` may not exist; missing levels are skipped. The usage includes cached
    files, which the system can drop at any time: they are counted as available.
    """
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # the group does not exist, or the limit is "max"
            most = int((folder / limit).read_text(encoding="utf-8"))
            taken = int((folder / usage).read_text(encoding="utf-8"))
            cached = _values(folder / "memory.stat", "inactive_file ", "total_inactive_file ")
            yield max(0, most - taken + next(cached, 0))
        if folder == top:
            return
