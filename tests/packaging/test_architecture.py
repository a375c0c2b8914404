"""Import layers: each package imports only from packages below it."""

import ast
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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


def name_of(path: Path) -> str:
    """Return the full name of a module; the files in kernels/ are modules of fastgpt.kernels."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if path.is_relative_to(ROOT / "fastgpt") else f"fastgpt.{name}"


def lazy_exports(tree: ast.Module) -> dict[str, str]:
    """Return what a package passes to `lazy_names`: its public names and their modules."""
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names":
            homes = node.args[1]
            return ast.literal_eval(assigned.get(ast.unparse(homes), homes))
    return {}


PATHS = [*ROOT.glob("fastgpt/**/*.py"), *ROOT.glob("kernels/**/*.py")]
TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
PACKAGES = {name_of(path) for path in PATHS if path.name == "__init__.py"}
LAZY = {
    f"{package}.{name}": f"{package}.{home}"
    for package in PACKAGES
    for name, home in lazy_exports(TREES[package]).items()
}
MODULES = sorted(TREES.keys() - {"fastgpt"})  # the package itself exports names of all layers


def imports(module: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the full names that statements of a module import from fastgpt.

    Relative names are resolved, and lazily exported names are replaced by the modules that define
    them.
    """
    package = module if module in PACKAGES else module.rpartition(".")[0]
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        yield from (LAZY.get(name, name) for name in names if name.startswith("fastgpt."))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    """This includes imports inside functions and for annotations, except those of `FACADE`."""
    tree = TREES[module]
    own = LEVEL[module.split(".")[1]]
    above = {
        imported
        for imported in imports(module, tree.body if module == FACADE else ast.walk(tree))
        if LEVEL.get(imported.split(".")[1], own) < own
    }
    assert not above, f"{module} imports {', '.join(sorted(above))}"


def test_every_module_has_a_layer() -> None:
    assert {module.split(".")[1] for module in MODULES} <= LEVEL.keys()


def test_lazy_exports_are_in_modules_that_exist() -> None:
    assert {"fastgpt.Trainer", "fastgpt.data.prepare"} <= LAZY.keys()
    assert set(LAZY.values()) <= TREES.keys()


def test_no_module_level_cycles() -> None:
    """Module-level imports form no cycles; imports inside functions are ignored."""
    graph = {
        module: {target(imported) for imported in imports(module, TREES[module].body)}
        for module in MODULES
    }
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] - {name, None} <= done}:
        done |= ready
    assert not graph.keys() - done, f"in a cycle: {sorted(graph.keys() - done)}"


def target(imported: str) -> str | None:
    """Return the module of an imported name: the name itself or its parent."""
    parent = imported.rpartition(".")[0]
    return next((name for name in (imported, parent) if name in MODULES), None)
