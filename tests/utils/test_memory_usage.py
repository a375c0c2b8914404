"""Tests of the queries for available and used memory."""

import sys
from pathlib import Path

import pytest
import torch

from fastgpt.utils.memory_usage import available, used

CPU = torch.device("cpu")


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable:  8000000 kB\n"}
LIMITS = (
    "Limit                     Soft Limit           Hard Limit           Units     \n"
    "Max data size             {data}            unlimited            bytes     \n"
    "Max stack size            8388608              unlimited            bytes     \n"
    "Max address space         {space}           unlimited            bytes     \n"
)
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8_192_000_000, id="no control groups"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job/step\n",
                f"{V2}/job/memory.max": "3000000000\n",  # the limit of the parent group
                f"{V2}/job/memory.current": "1000000000\n",
                f"{V2}/job/memory.stat": "anon 5\ninactive_file 400000000\n",
                f"{V2}/job/step/memory.max": "max\n",
                f"{V2}/job/step/memory.current": "1000000000\n",
            },
            2_400_000_000,
            id="version 2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,memory:/docker/abc\n4:pids:/\n",
                f"{V1}/memory.limit_in_bytes": "2000000000",  # in a container, docker/abc is absent
                f"{V1}/memory.usage_in_bytes": "500000000",
            },
            1_500_000_000,
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",  # no limit
                f"{V1}/memory.usage_in_bytes": "500000000",
            },
            8_192_000_000,
            id="version 1 without a limit",
        ),
        pytest.param(
            {
                "proc/self/limits": LIMITS.format(space="3000000000", data="unlimited"),
                "proc/self/status": "VmSize:  1000000 kB\nVmData:  500000 kB\n",
            },
            1_976_000_000,
            id="limited address space",
        ),
        pytest.param(
            {
                "proc/self/limits": LIMITS.format(space="3000000000", data="1000000000"),
                "proc/self/status": "VmSize:  1000000 kB\nVmData:  500000 kB\n",
            },
            488_000_000,
            id="limited data",
        ),
    ],
)
def test_what_is_available_on_a_cpu(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available(CPU, put(tmp_path, MEMINFO | files)) == expected


def test_nothing_known_is_none(tmp_path: Path) -> None:
    assert available(CPU, tmp_path) is None
    assert available(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_a_limit_of_this_process_counts() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 100_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert 50_000_000 < (available(CPU) or 0) <= 100_000_000
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_this_machine_answers() -> None:
    free, taken = available(CPU), used(CPU)
    assert free is None or 10**6 < free < 10**14
    assert taken is None or 10**7 < taken < 10**13
