"""What the commands share: how mistakes and interruptions end."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fastgpt.errors import UsageError


def run(command: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 when done, 2 after one line on wrong use, 130 on Ctrl-C."""
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
