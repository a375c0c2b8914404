"""Run commands with common handling of errors, Ctrl-C and exit codes."""

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
    """Run a command and exit.

    The exit code is 0 on success, 2 after a UsageError, which is printed as one line, 130 on
    Ctrl-C, and 141 if the reader of the output was closed.

    Args:
        command: called with the arguments.
        args: command-line arguments; by default those of the process.
    """
    os.environ.update(environment())
    if isinstance(sys.stdout, io.TextIOWrapper):  # avoid encoding errors if output is ASCII
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
    except BrokenPipeError:  # the reader, for example `head`, has exited
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)


@contextmanager
def _ctrl_c_ends_imports() -> Iterator[None]:
    """Within the block, Ctrl-C during an import ends the process at once.

    A KeyboardInterrupt could be lost there, and the command would continue: torch imports NumPy
    from C++ and ignores exceptions in it, and the callback that removes a module lock cannot raise.
    Outside of imports, KeyboardInterrupt is raised as usual. Nothing is changed if Ctrl-C is
    ignored or has another handler.
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
    """Return environment variables that the commands set before torch is imported.

    `GOMP_SPINCOUNT` (GNU OpenMP) limits how long waiting threads spin before they sleep. The
    default is milliseconds, which is best on idle cores. If another program uses the cores, each
    wait then lasts until the scheduler preempts the thread, and a step of a small model becomes ten
    times slower. 10,000 iterations are a compromise: often as fast as the default on idle cores and
    at worst a third slower, and two to four times the idle step time on busy cores.

    `THP_MEM_ALLOC_ENABLE` (PyTorch) allocates large tensors, such as weights and optimizer state,
    in huge pages. It is set if the processor has bfloat16 instructions, since training in bfloat16
    can be bound by memory bandwidth.

    Variables that the user has set are not included.
    """
    wanted = {}
    if "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = "10000"
    if bfloat16_units():
        wanted["THP_MEM_ALLOC_ENABLE"] = "1"
    return {name: value for name, value in wanted.items() if name not in os.environ}
