"""Check that installed packages have versions supported according to `pyproject.toml`."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def unsupported_version(*packages: str) -> str | None:
    """Return an error message if the version of an installed package is not supported.

    The message names the first such package, its version and the supported versions. The result is
    None if all versions are supported. A package whose version is unknown, because it was not
    installed by pip, is skipped.

    packages: names as in the dependencies and extras of `pyproject.toml`.
    """
    for package in packages:
        try:
            installed, supported = version(package), _specifiers(package)
        except PackageNotFoundError:
            continue
        if not all(s.specifier.contains(installed, prereleases=True) for s in supported):
            wanted = " and ".join(f"{package}{s.specifier}" for s in supported)
            return f"{package} {installed} is installed, but fastgpt requires {wanted}"
    return None


def _specifiers(package: str) -> list[Requirement]:
    """Return fastgpt's requirements on a package according to its metadata, including extras."""
    found = (Requirement(line) for line in requires("fastgpt") or [])
    return [requirement for requirement in found if requirement.name == package]
