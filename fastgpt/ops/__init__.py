"""The operations that have more than one implementation.

A backend is a module with one function per operation, the same name and signature in each:

- `reference`: the formulas in plain PyTorch, the truth that every other backend is held against;
- `native`: PyTorch's own fused operators, and C++ where PyTorch is slow on a CPU.
"""

from importlib import import_module
from types import ModuleType

BACKENDS = ("reference", "native")


def check(name: str) -> str:
    """Return `name` if it is a backend or ``"auto"``; ValueError names the choices if not."""
    if name != "auto" and name not in BACKENDS:
        choices = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"ops must be one of {choices}, not {name!r}")
    return name


def get(name: str) -> ModuleType:
    """Return the backend called `name`; ``"auto"`` is the fastest one that there is."""
    return import_module(f"{__name__}.{'native' if check(name) == 'auto' else name}")
