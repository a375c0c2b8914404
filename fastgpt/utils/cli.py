"""What the commands share: how mistakes and interruptions end."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from fastgpt.utils.errors import UsageError
from fastgpt.utils.processor import bfloat16_units


def run(command: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 when done, 2 after one line on wrong use, 130 on Ctrl-C."""
    os.environ.update(environment())
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII pipe must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        with _ctrl_c_ends_imports():
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


@contextmanager
def _ctrl_c_ends_imports() -> Iterator[None]:
    """Within the block, Ctrl-C during an import ends the process at once.

    A KeyboardInterrupt could be lost there, and the command go on: torch imports NumPy from C++ and
    forgets what goes wrong in it, and the callback that clears a module's lock cannot raise.
    Elsewhere it is raised as ever. Who ignores or handles Ctrl-C already goes on doing so.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            try:
                sys.stdout.flush()
            finally:
                os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def environment() -> dict[str, str]:
    """Return what the commands set for the libraries under them, before torch is imported.

    GNU's OpenMP: threads that wait for each other sleep soon. By default they spin for
    milliseconds. That is best on idle cores, but beside another busy program each wait then lasts
    until the system takes the core away, and a step of a small model becomes ten times as slow.
    10,000 turns are the compromise: up to a third slower than the default on idle cores at worst,
    often equal, and two to four times a quiet step beside others.

    PyTorch: large tensors, the weights and the optimizer's, lie in huge pages, where training may
    be in bfloat16 and so as fast as memory.

    What the user has set already is left out.
    """
    wanted = {}
    if "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = "10000"
    if bfloat16_units():
        wanted["THP_MEM_ALLOC_ENABLE"] = "1"
    return {name: value for name, value in wanted.items() if name not in os.environ}
