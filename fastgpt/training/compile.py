"""torch.compile where it works, and the eager module, with the reason, where it does not."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastgpt.training.distributed import World


def compiled_or_not(
    module: nn.Module, trial: Callable[[nn.Module], None], world: World
) -> tuple[nn.Module, str]:
    """Return `module` compiled, or as it is if that fails on any process, and a line about it.

    trial: does a forward and a backward, in which the compilation happens.
    """
    compiled: Any = module
    reason = ""
    try:
        with _compilers_own_warnings_ignored():
            compiled = torch.compile(module, dynamic=False)  # loads the compiler, if nobody has
            trial(compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, old or wrong: anything may come
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
    if not any(world.agree(bool(reason))):
        return compiled, "compiled by torch.compile"
    where = reason or "in another process"
    return module, f"warning: torch.compile failed, training goes on without it: {where}"


@contextmanager
def _compilers_own_warnings_ignored() -> Iterator[None]:
    """Within the block, be silent about what PyTorch deprecates and its compiler itself still uses.

    Nobody who trains can mend that; and where warnings are errors (``python -W error``) it would
    keep the compiler from being loaded at all.
    """
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        yield
