"""Where to compute."""

import torch

from fastgpt.errors import UsageError


def find_device(name: str) -> torch.device:
    """Return the device called `name`; ``"auto"`` is a GPU if there is one. UsageError if none."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is not cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}; try --device auto") from None
    return device
