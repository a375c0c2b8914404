"""The Python code in the documentation runs, and the API reference lists every public name."""

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import fastgpt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PACKAGES = ("fastgpt", "fastgpt.data", "fastgpt.evaluation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages refer to: my.txt, runs/latest and path/to/gpt2, all small."""
    folder = tmp_path_factory.mktemp("docs")
    text = (Path(fastgpt.__file__).parent / "assets" / "tinyshakespeare.txt").read_text("utf-8")
    (folder / "my.txt").write_text(text[:20_000], encoding="utf-8")
    recipe = replace(fastgpt.Recipe(), max_steps=2, eval_tokens=2000, sample_tokens=10)
    fastgpt.Trainer(replace(recipe, out=str(folder / "runs" / "first"))).fit()
    config = fastgpt.GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)
    gpt2 = folder / "path" / "to" / "gpt2"
    gpt2.parent.mkdir(parents=True)
    fastgpt.GPT(config).save_pretrained(gpt2, fastgpt.Tokenizer.gpt2())
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if PYTHON.search(page.read_text(encoding="utf-8"))],
    ids=lambda page: page.stem,
)
def test_the_python_code_of_a_page_runs(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run in order, as in one notebook."""
    monkeypatch.chdir(folder)
    short = replace(fastgpt.RECIPES["shakespeare-char"], max_steps=4, eval_tokens=2000)
    monkeypatch.setitem(fastgpt.RECIPES, "shakespeare-char", short)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in PYTHON.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], page, "exec"), names)  # with the page's line numbers


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package: str) -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    listed = set(re.findall(r"^\.\. \S+:: ([\w.]+)", "".join(map(Path.read_text, pages)), re.M))
    listed = {name.rpartition(".")[2] for name in listed}
    assert set(import_module(package).__all__) <= listed
