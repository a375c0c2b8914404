"""Select the device to compute on."""

import torch

from fastgpt.utils.errors import UsageError


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device with a name.

    Args:
        name: a device name such as ``"cpu"`` or ``"cuda:1"``, or ``"auto"``: CUDA or MPS if
            available, otherwise the CPU.
        local_rank: index of this process on the machine. ``"auto"`` and ``"cuda"`` select the GPU
            with this index, which becomes the current CUDA device.

    Raises: UsageError if the device cannot be used.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UsageError(f"{local_rank + 1} processes, but only {n_gpus} GPUs on this machine")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "auto":
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
