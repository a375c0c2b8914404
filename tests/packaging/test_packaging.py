"""The package consists of two source folders and a compiled module and is importable anywhere."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
import fastgpt._C

ROOT = Path(__file__).parents[2]
ASSETS = {
    "LICENSE.gpt2",
    "LICENSE.tinyshakespeare",
    "tinyshakespeare.txt",
    "vocab.bpe",
}


def run_python(code, folder):
    """Run `code`, which prints one line of JSON, in a fresh interpreter started in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["checkout", "elsewhere"])
def folder(request, tmp_path):
    return ROOT if request.param == "checkout" else tmp_path


def test_kernels_folder_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_works_in_the_checkout():
    """transformers looks for Hugging Face's package `kernels`: the folder must not match it."""
    pytest.importorskip("transformers")
    code = """if True:
        import importlib.util, json
        import transformers.models.gpt2.modeling_gpt2
        spec = importlib.util.find_spec("kernels")
        print(json.dumps([transformers.utils.is_kernels_available(), spec and spec.origin]))
    """
    available, origin = run_python(code, ROOT)
    assert origin is None or not Path(origin).is_relative_to(ROOT)
    assert available is False or origin is not None


@pytest.mark.parametrize(
    "statement", ["import fastgpt", "import fastgpt.train, fastgpt.generate, fastgpt.evaluate"]
)
def test_nothing_heavy_is_imported_unasked(statement, tmp_path):
    code = f"""if True:
        {statement}, json, sys
        print(json.dumps([name for name in ("torch", "triton", "numpy") if name in sys.modules]))
    """
    assert run_python(code, tmp_path) == []


def test_model_needs_no_kernels_until_they_are_asked_for(tmp_path):
    pytest.importorskip("triton")
    code = """if True:
        import json, sys
        import fastgpt.model
        early = "fastgpt.kernels" in sys.modules
        import fastgpt.kernels.gelu
        print(json.dumps([early, callable(fastgpt.kernels.gelu.gelu_forward)]))
    """
    assert run_python(code, tmp_path) == [False, True]


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_help_does_not_wait_for_torch(command, tmp_path):
    code = f"""if True:
        import json, runpy, sys
        sys.argv = ["fastgpt.{command}", "--help"]
        try:
            runpy.run_module("fastgpt.{command}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            print("\\n" + json.dumps([end.code, "torch" in sys.modules]))
    """
    assert run_python(code, tmp_path) == [0, False]


def test_every_part_is_found(folder):
    code = """if True:
        import json
        from importlib.util import find_spec
        import fastgpt._C
        found = [find_spec(f"fastgpt.{name}").origin for name in ("model", "kernels.gelu")]
        print(json.dumps([fastgpt.__file__, fastgpt._C.__file__, *found]))
    """
    package, native, model, kernel = map(Path, run_python(code, folder))
    # Always true when started in the checkout; elsewhere only for editable installations.
    in_checkout = package.parents[1] == ROOT
    assert in_checkout or folder != ROOT
    assert native.suffix in {".so", ".pyd"}
    assert model.parent == package.parent
    assert kernel == (ROOT if in_checkout else package.parent) / "kernels" / "gelu.py"


def test_stub_names_what_the_compiled_module_offers():
    stub = ast.parse((ROOT / "fastgpt" / "_C.pyi").read_text(encoding="utf-8"))
    assert stubbed_names(stub) == public_names(fastgpt._C)
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            assert stubbed_names(node) == public_names(getattr(fastgpt._C, node.name))


def stubbed_names(node):
    defined = {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    annotated = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return {name for name in defined | annotated if not name.startswith("_")}


def public_names(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_data_files_are_beside_the_package():
    package = Path(fastgpt.__file__).parent
    assert (package / "py.typed").is_file()
    assert {path.name for path in (package / "assets").iterdir()} >= ASSETS
    assert all((package / "assets" / name).stat().st_size for name in ASSETS)


def test_metadata():
    installed = importlib.metadata.metadata("fastgpt")
    assert installed["Version"] == fastgpt.__version__, "reinstall: pip install ."
    licences = {Path(name).name for name in installed.get_all("License-File", [])}
    assert licences == {"LICENSE", "LICENSE.gpt2", "LICENSE.tinyshakespeare"}
