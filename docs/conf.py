"""Configuration of the documentation: sphinx-build -W -n -c docs . build/docs.

The source folder is the root of the repository, so that README, CONTRIBUTING and the results of the
benchmarks are pages too, and the relative links of all pages work on the code host and on the site.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fastgpt  # noqa: E402

project, release = "fastgpt", fastgpt.__version__
author = copyright = "The fastgpt authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("docs/*.md", "docs/*/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("benchmarks/README.md", "benchmarks/results/*.md"),
]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "fastgpt"
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # from the root of the site to root_doc

default_role = "literal"  # docstrings have code in single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
# Types in signatures are links only if they are documented; references in texts are all checked.
nitpick_ignore_regex = [("py:(class|mod|obj)", ".*"), ("py:meth", "bytes.decode")]


def setup(app: Sphinx) -> None:
    """Register the conversion of docstrings."""
    app.connect("autodoc-process-docstring", to_fields, priority=100)  # before napoleon


def to_fields(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Convert the short forms of docstrings, in place, to sections that napoleon knows.

    These are ``name: description`` for an argument, and ``Raises: ...`` or ``Returns: ...`` on one
    line. A description continues up to the next one or an empty line, indented or not.
    """
    known = "|".join(_parameters(thing)) or "(?!)"
    argument = rf"\*{{0,2}}(?:{known})(?:, (?:{known}))*: "
    text = re.sub(rf"(?m)^(\S.*[.,;]) (?={argument})", r"\1\n", "\n".join(lines))  # one per line
    lines.clear()
    field = None  # the kind of the description that the last line is a part of
    for line in text.split("\n"):
        if found := re.match(rf"(Raises|Returns): (.*)|{argument}", line):
            kind = found[1] or "Args"
            if kind == "Args":
                lines += [] if field == kind else ["", "Args:"]
                lines.append(f"    {line}")
            else:
                lines += ["", f":{kind.lower()}: {found[2]}"]
            field = kind
        elif field and line:
            lines.append(f"        {line.strip()}")
        else:
            lines.append(line)
            field = None


def _parameters(thing: Any) -> set[str]:
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):  # a module, or a builtin
        return set()
