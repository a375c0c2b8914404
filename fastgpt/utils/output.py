"""Standard output and error that are closed, on a full disk, or whose reader has exited."""

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO


class OptionalOutput(io.TextIOBase):
    """A text stream that forwards to another one until that fails.

    The first failure is a warning, and the text after it is discarded.

    stream: the other stream; None discards everything.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failed = stream is None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in the base class
        """The encoding of the other stream."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        """Return whether the text is shown on a terminal."""
        return self._stream is not None and not self.failed and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write a text."""
        self._forward("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush the other stream."""
        self._forward("flush")

    def close(self) -> None:
        """Discard further text; the other stream stays open."""
        self.failed = True
        super().close()

    def _forward(self, method: str, *args: str) -> None:
        if self.failed:
            return
        try:
            getattr(self._stream, method)(*args)
        except (OSError, ValueError) as error:  # ValueError: it was closed by the program
            self.failed = True
            reason = getattr(error, "strerror", None) or error
            warnings.warn(
                f"the output cannot be written ({reason}): continuing without it", stacklevel=3
            )


@contextmanager
def optional_output() -> Iterator[None]:
    """Within the block, discard text that standard output does not accept."""
    output = OptionalOutput(sys.stdout)
    try:
        with redirect_stdout(output):
            yield
    finally:
        output.flush()
        if output.failed:
            discard(sys.stdout)


def open_closed_streams() -> None:
    """Open the null device in place of standard streams that are closed; Python has None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def flush(stream: TextIO) -> OSError | None:
    """Flush a stream; if that fails, discard its text and return the error."""
    try:
        stream.flush()
    except OSError as error:
        discard(stream)
        return error
    return None


def discard(stream: Any) -> None:
    """Redirect a stream that cannot be written to the null device.

    Python flushes the standard streams at exit, and ends with another exit code if that fails.
    """
    with suppress(OSError, AttributeError):  # it is not a file, for example in a notebook
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
