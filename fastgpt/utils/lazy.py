"""Import the public names of a package on first use, so that importing the package is fast."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package.

    homes: each public name and the module that defines it, relative to the package. modules: the
    submodules that can be used as attributes without importing them first.
    """
    found_modules = frozenset(modules)

    def get(name: str) -> Any:
        if name in found_modules:
            return import_module(f"{package}.{name}")
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        own = vars(import_module(package))
        return sorted({*own, *homes, *found_modules})

    return get, names
