"""The notebooks in examples/ as files; `pytest --nbmake examples` runs them, as CI does.

They are stored with their outputs, for reading them online. After a change, run in their folder:
``jupyter nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False``.
"""

import ast
import json
import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_BYTES = 1_000_000  # limit of their total size
EXTRA = re.compile(r"pip install '?\.(?:\[(\w+)\])?'? jupyter`, then `jupyter lab examples/`")
# An absolute path on someone's machine; after a letter or a dot it is part of a longer path.
ABSOLUTE = re.compile(r"(?<![\w.~/])/(?:home|root|Users|tmp|work|usr|opt|var|mnt)/|\b[A-Z]:\\")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code(notebook: dict[str, Any]) -> list[str]:
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_two_and_they_are_small():
    assert [path.stem for path in PATHS] == ["gpt2_from_scratch", "kernels"]
    assert sum(path.stat().st_size for path in PATHS) < MOST_BYTES


def test_valid(path):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


def test_any_python_3_opens_it(notebook):
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_every_cell_was_run_in_order_and_none_failed(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_nothing_tells_where_or_when_it_was_run(path, notebook):
    text = path.read_text(encoding="utf-8")
    assert not ABSOLUTE.findall(re.sub(r'"image/png": "[^"]*"', "", text))
    assert not any("execution" in cell["metadata"] for cell in notebook["cells"])


def test_imports_what_its_first_cell_has_one_install(notebook):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    how = EXTRA.search(source(notebook["cells"][0]).replace("\n", " "))
    assert how, "the first cell must say how to install and open it"
    required = project["dependencies"] + project["optional-dependencies"].get(how[1], [])
    known = {re.match(r"\w+", line)[0] for line in required} | {"fastgpt"} | sys.stdlib_module_names
    used = {module for cell in code(notebook) for module in imported(cell)}
    assert used <= known


def imported(cell: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(cell)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_names_commands_and_files_that_there_are(path, notebook):
    text = "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert find_spec(module), module
    files = re.findall(r"`((?:fastgpt|kernels|docs|benchmarks)/[\w./]*)`", text)
    files += re.findall(r"python (benchmarks/\w+\.py)", text)
    assert all((ROOT / name).exists() for name in files), files
    links = re.findall(r"\]\((?!https://)([^)]+)\)", text)
    assert all((path.parent / name).is_file() for name in links), links


def test_code_cells_check_what_the_text_says(notebook):
    assert sum("assert" in cell for cell in code(notebook)) >= len(code(notebook)) // 3
