"""The versions of other packages that fastgpt supports, as declared in `pyproject.toml`."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def unsupported_version(*packages: str) -> str | None:
    """Return an error message if an installed package is outside its supported versions.

    packages: names as in the dependencies and extras of `pyproject.toml`. The result names the
    first one that does not fit, its version and the supported ones. It is None if all fit, and for
    a package whose version is not known because it was not installed by pip.
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
    """Return what fastgpt's metadata requires of a package, in whichever extra."""
    found = (Requirement(line) for line in requires("fastgpt") or [])
    return [requirement for requirement in found if requirement.name == package]
