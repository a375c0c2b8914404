"""Check the spelling of README, the other pages and all docstrings, by Hunspell's dictionary en_US.

    python docs/check_spelling.py

Code is left out: code blocks and spans, links, names with digits, underscores or inner capitals,
and the names of arguments and variables. docs/words.txt lists further words, one per line, in
alphabetical order.
"""

import ast
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from spylls.hunspell import Dictionary

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT / "docs" / "words.txt"
PAGES = ("*.md", "docs/**/*.md", "benchmarks/*.md")
SOURCES = ("fastgpt/**/*.py", "kernels/**/*.py", "benchmarks/*.py", "docs/*.py")
CODE = re.compile(
    r"(?ms)^```.*?^```$|<!--.*?-->|``.*?``|`[^`]*`|\]\([^)]*\)|https?://\S+|<\|.*?\|>|:\w+:"
    r"|^>>>.*?(?:^$|\Z)|(?<=\n\n) {4}.*?(?:^$|\Z)"  # in docstrings: doctests, indented blocks
)
WORD = re.compile(r"(?<![\w.<>/])[^\W\d_]+(?:'[^\W\d_]+)*(?![\w>/])")


def main() -> None:
    """Print each unknown word with the files that contain it, and exit with 1 if there are any."""
    listed = WORDS.read_text(encoding="utf-8").split()
    dictionary = Dictionary.from_files("en_US")
    found = defaultdict(set)
    for path, text, names in texts():
        for word in WORD.findall(CODE.sub(" ", text)):
            word = word.removesuffix("'s")
            if not (word in names or re.search(r".[A-Z]", word) or len(word) == 1):
                found[word].add(path.relative_to(ROOT).as_posix())
    unknown = {word for word in found if not dictionary.lookup(word)}
    wrong = sorted(word for word in unknown if not {word, word.lower()} & set(listed))
    for word in wrong:
        print(f"{word}: {', '.join(sorted(found[word])[:5])}")
    if listed != sorted(set(listed), key=str.lower):
        print(f"{WORDS.name} must be sorted, without repetitions")
        wrong.append(WORDS.name)
    sys.exit(bool(wrong))


def texts() -> Iterator[tuple[Path, str, set[str]]]:
    """Yield each file's path, its text or one of its docstrings, and the names in the code."""
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        yield path, path.read_text(encoding="utf-8"), set()
    for path in (path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.arg for node in nodes if isinstance(node, ast.arg)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        for node in nodes:
            match node:
                case ast.Expr(ast.Constant(str(docstring))):
                    yield path, inspect.cleandoc(docstring), names


if __name__ == "__main__":
    main()
