"""Compile the model with torch.compile, with a fallback to eager mode if compilation fails."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastgpt.training.distributed import World


def compile_or_fallback(
    module: nn.Module, trial: Callable[[nn.Module], None], world: World
) -> tuple[nn.Module, str]:
    """Return `module` compiled, or unchanged if that fails in any process, and a status message.

    Out-of-memory errors are raised. Any other error of the compiler becomes a warning in the
    message. All processes must call it.

    Args:
        module: The module to compile.
        trial: Runs a forward and a backward pass, which triggers the compilation.
        world: The processes, which all use the compiled module or all the eager one.
    """
    compiled: Any = module
    reason = ""
    try:
        with warnings.catch_warnings():
            # PyTorch's compiler itself uses deprecated functions. Users cannot fix this, and if
            # warnings are errors (``python -W error``), it could not be imported at all.
            for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            compiled = torch.compile(module, dynamic=False)  # imports the compiler if necessary
            trial(compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing, old or broken compiler may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
    if not any(world.all_reduce_max(bool(reason))):
        return compiled, "compiled by torch.compile"
    where = reason or "in another process"
    return module, f"warning: torch.compile failed, training continues without it: {where}"
