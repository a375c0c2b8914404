"""The supported versions of torch, Triton and Python are declared in one place and consistent."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement

from fastgpt import ops
from fastgpt.utils.requirements import unsupported_version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TESTED = PROJECT["tool"]["fastgpt"]["tested"]


def requirement(lines: list[str], name: str) -> Requirement:
    return next(r for r in map(Requirement, lines) if r.name == name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return a dict of versions that override those of the installed packages."""
    versions: dict[str, str] = {}
    real = importlib.metadata.version
    monkeypatch.setattr(
        "fastgpt.utils.requirements.version", lambda name: versions.get(name) or real(name)
    )
    return versions


def test_the_oldest_tested_versions_are_the_oldest_accepted() -> None:
    project = PROJECT["project"]
    oldest_torch, oldest_triton = next(iter(TESTED["torch"].items()))
    extra = project["optional-dependencies"]["triton"]
    for line, name, oldest in [
        (project["dependencies"], "torch", oldest_torch),
        (extra, "triton", oldest_triton),
    ]:
        (specifier,) = requirement(line, name).specifier
        assert specifier.operator == ">="
        assert oldest.removesuffix(".0") == specifier.version
    assert project["requires-python"] == f">={TESTED['python'][0]}"


def test_the_table_in_the_documentation_is_that_of_the_project() -> None:
    script = load(ROOT / "docs" / "supported_versions.py")
    assert script.PAGE.read_text(encoding="utf-8") == script.updated_page()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_installed_versions_are_supported() -> None:
    assert unsupported_version("torch", "triton") is None


@pytest.mark.parametrize(
    ("package", "version", "fits"),
    [
        ("torch", "2.10.1", False),
        ("torch", "2.11.0+cu128", True),
        ("torch", "2.16.0.dev20261201+cu130", True),
        ("torch", "3.0.0", True),
        ("triton", "3.5.1", False),
        ("triton", "3.6.0", True),
        ("triton", "3.10.0+gitabcdef", True),
    ],
)
def test_versions_outside_are_named(
    package: str, version: str, fits: bool, installed: dict[str, str]
) -> None:
    installed[package] = version
    fault = unsupported_version("torch", "triton")
    if fits:
        assert fault is None
    else:
        oldest = {"torch": "2.11", "triton": "3.6"}[package]
        assert fault == (
            f"{package} {version} is installed, but fastgpt requires {package}>={oldest}"
        )


def test_packages_that_pip_did_not_install_are_accepted(installed: dict[str, str]) -> None:
    assert unsupported_version("no-such-package") is None


def test_kernels_with_an_old_triton_are_one_clear_line() -> None:
    """This runs in a separate process, because modules stay imported."""
    code = """if True:
        from fastgpt.utils import requirements
        real = requirements.version
        requirements.version = lambda name: "3.1.0" if name == "triton" else real(name)
        import fastgpt.kernels.gelu
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: triton 3.1.0 is installed, but fastgpt requires triton>=3.6. Each release of "
        "torch installs the Triton that fits it: pip install --upgrade torch. Without the kernels, "
        'use ops="native".'
    )


def test_auto_goes_without_an_old_triton(installed: dict[str, str]) -> None:
    pytest.importorskip("triton")
    installed["triton"] = "3.5.0"
    assert ops._triton_error() == (
        "triton 3.5.0 is installed, but fastgpt requires triton>=3.6; pip install --upgrade torch "
        "installs the Triton that fits it"
    )


def test_this_torch_has_its_own_triton() -> None:
    """The kernels are tested with the pairs of versions that pip installs for CUDA builds."""
    if torch.version.cuda is None:
        pytest.skip("a CPU build of torch takes any Triton")
    release = torch.__version__.partition("+")[0]
    if release not in TESTED["torch"]:
        pytest.skip(f"torch {release} is newer than the table")
    pinned = requirement(importlib.metadata.requires("torch") or [], "triton").specifier
    assert pinned.contains(TESTED["torch"][release])
    assert pinned.contains(importlib.metadata.version("triton"))
