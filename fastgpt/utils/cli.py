"""Run commands with common handling of errors, output, Ctrl-C and exit codes.

Only the standard library is imported here, so that missing packages can be reported.
"""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn

from fastgpt.utils import output
from fastgpt.utils.errors import UsageError
from fastgpt.utils.processor import bfloat16_units

ExitCode = int | str | None


def run(command: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    The exit code is 0 on success, 130 on Ctrl-C, 141 if the reader of the output was closed, and 2
    after an error that the user can fix, which is printed as one line: a UsageError, a missing
    package, or a file or standard output that cannot be read or written. Warnings to the user
    (UserWarning) are printed as one line, too.

    Args:
        command: called with the arguments.
        args: command-line arguments; by default those of the process.
    """
    os.environ.update(environment())
    output.open_closed_streams()
    warnings.formatwarning = _format_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # avoid encoding errors if output is ASCII
        sys.stdout.reconfigure(errors="replace")
    code = _exit_code(command, sys.argv[1:] if args is None else args)
    code = _flush_output() or code
    output.flush(sys.stderr)
    sys.exit(code)


_format_with_place = warnings.formatwarning


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Return the text of a warning, without the place in the code if it is to the user."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _format_with_place(message, category, filename, lineno, line)


def report_import_errors() -> None:
    """Print an ImportError that nothing handles as one line."""
    sys.excepthook = _report_import_error


def _report_import_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, ImportError):
        sys.exit(_fail(_missing_package(error)))
    sys.__excepthook__(kind, error, trace)


def _missing_package(error: ImportError) -> str:
    """Return the message for an ImportError: how to install the package, if one is missing."""
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package != "fastgpt":
        return (
            f"the package {package} is not installed: run `pip install .` in fastgpt's checkout, "
            f"or `pip install {package}`"
        )
    return str(error)


def _exit_code(command: Callable[[Sequence[str]], None], args: Sequence[str]) -> ExitCode:
    """Call a command and return its exit code, after printing its error."""
    try:
        with _ctrl_c_ends_imports():
            command(args)
    except SystemExit as exited:
        return exited.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has exited
        return 141
    except UsageError as error:
        return _fail(str(error))
    except ImportError as error:
        return _fail(_missing_package(error))
    except MemoryError:
        return _fail("out of memory")
    except OSError as error:
        where = error.filename or "reading or writing failed"
        return _flush_output() or _fail(f"{where}: {error.strerror or error}")
    return 0


def _fail(message: str) -> int:
    """Print an error message, and return the exit code of errors."""
    with suppress(OSError):  # standard error cannot be written, either
        print(f"error: {message}", file=sys.stderr)
    return 2


def _flush_output() -> int:
    """Flush standard output; return 0, or the exit code of the failure."""
    error = output.flush(sys.stdout)
    if error is None:
        return 0
    if isinstance(error, BrokenPipeError):
        return 141
    return _fail(f"standard output cannot be written: {error.strerror}")


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
