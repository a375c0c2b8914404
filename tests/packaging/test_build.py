"""The compiled module exists and was built from the current csrc/."""

import hashlib
import subprocess
import sys
from pathlib import Path

import fastgpt._C

CSRC = Path(__file__).parents[2] / "csrc"
SUFFIXES = {".cpp", ".hpp", ".inc"}
FOLDERS = ("common", "simd", "tokenizer", "training", "engine", "python")  # sources of the module


def test_module_is_not_older_than_its_sources():
    paths = [p for folder in FOLDERS for p in (CSRC / folder).iterdir()]
    files = {p.relative_to(CSRC).as_posix(): p for p in paths if p.suffix in SUFFIXES}
    lines = [
        f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for name, path in sorted(files.items())
    ]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest == fastgpt._C.source_hash, (
        "the compiled module is older than csrc/: run: pip install ."
    )


def test_missing_module_says_what_to_do():
    code = "import sys; sys.modules['fastgpt._C'] = None; import fastgpt.tokenizer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        "ImportError: fastgpt's compiled module is missing; run `pip install .` in the checkout"
    )


def test_tokenizer_does_not_import_torch():
    code = "import sys, fastgpt.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
