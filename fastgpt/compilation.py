"""torch.compile where it works, and the eager module, with the reason, where it does not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastgpt.distributed import World


def compiled_or_not(
    module: nn.Module, trial: Callable[[nn.Module], None], world: World
) -> tuple[nn.Module, str]:
    """Return `module` compiled, or as it is if that fails on any process, and a line about it.

    trial: does a forward and a backward, in which the compilation happens.
    """
    compiled: Any = torch.compile(module, dynamic=False)
    reason = ""
    try:
        trial(compiled)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, old or wrong: anything may come
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        torch._dynamo.reset()
    if not any(world.agree(bool(reason))):
        return compiled, "compiled by torch.compile"
    where = reason or "in another process"
    return module, f"warning: torch.compile failed, training goes on without it: {where}"
