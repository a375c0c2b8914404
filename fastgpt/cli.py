"""What the commands share: how mistakes and interruptions end."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fastgpt.errors import UsageError
from fastgpt.processor import bfloat16_units


def run(command: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 when done, 2 after one line on wrong use, 130 on Ctrl-C."""
    _wait_briefly()
    _use_huge_pages()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII pipe must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        command(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, say `head`, has gone
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)


def _use_huge_pages() -> None:
    """Have PyTorch lay large tensors in huge pages on a CPU where it trains in bfloat16.

    PyTorch reads this before its first tensor. In float32 training's large tensors come from a pool
    that has them anyway (see `fastgpt.host_memory`).
    """
    if bfloat16_units():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _wait_briefly() -> None:
    """Have OpenMP's threads sleep soon when they wait for each other (before torch is imported).

    GNU's library spins for milliseconds by default. That is best on idle cores, but beside another
    busy program each wait then lasts until the system takes the core away, and a step of a small
    model becomes ten times as slow. 10,000 turns are the compromise: up to a third slower than the
    default on idle cores at worst, often equal, and two to four times a quiet step beside others.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
