"""Import layers: each package imports only from packages below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fastgpt"

# From top to bottom. The first layer are the modules of fastgpt/ that are commands.
LAYERS = [
    {"__main__", "convert", "evaluate", "generate", "lm_eval", "plot", "prepare", "train"},
    {"training"},
    {"evaluation"},
    {"inference"},
    {"interop"},
    {"checkpoint"},
    {"data"},
    {"tokenizer"},
    {"model", "lora"},
    {"ops"},
    {"kernels"},
    {"utils"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The methods of GPT that load, save, quantize and generate are shortcuts to packages above it.
FACADE = "fastgpt.model"

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = ("fastgpt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Yield the full names that a module imports from fastgpt, including inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastgpt."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastgpt"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    name = name_of(path)
    own = name.split(".")[1]
    above = {
        imported
        for imported in imports(path)
        if LEVEL.get(imported.split(".")[1], len(LAYERS)) < LEVEL[own]
    }
    if name == FACADE:
        above -= set(inner_imports(path))
    assert not above, f"{name} imports {', '.join(sorted(above))}"


def inner_imports(path: Path) -> Iterator[str]:
    """Yield the names that are imported inside functions or for annotations only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outer = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in outer and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_layer() -> None:
    assert {name_of(path).split(".")[1] for path in MODULES} <= LEVEL.keys()


def test_no_module_level_cycles() -> None:
    """Module-level imports form no cycles; imports inside functions are ignored."""
    names = {name_of(path): path for path in MODULES}
    graph = {name: {target(i, names) for i in top_level(path)} for name, path in names.items()}
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] - {name, None} <= done}:
        done |= ready
    assert not graph.keys() - done, f"in a cycle: {sorted(graph.keys() - done)}"


def top_level(path: Path) -> Iterator[str]:
    """Yield the names that a module imports at module level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastgpt."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastgpt"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def target(imported: str, names: dict[str, Path]) -> str | None:
    """Return the module of an imported name: the name itself or its parent."""
    return (
        imported
        if imported in names
        else next((name for name in (imported.rpartition(".")[0],) if name in names), None)
    )
