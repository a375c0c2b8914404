"""Write the table of supported versions in docs/installation.md, from pyproject.toml.

python docs/supported_versions.py
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "installation.md"
START = "<!-- made from pyproject.toml by `python docs/supported_versions.py`; do not edit -->\n"
END = "<!-- end -->\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(updated_page(), encoding="utf-8")


def updated_page() -> str:
    """Return the page with the table that pyproject.toml gives."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return before + START + table() + END + after


def table() -> str:
    """Return the supported pairs of torch and Triton as a Markdown table, and the Pythons."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tested = settings["tool"]["fastgpt"]["tested"]
    lines = ["| torch | Triton, as installed with it |", "|---|---|"]
    for torch, triton in tested["torch"].items():
        lines.append(f"| {torch} | {triton} |")
    pythons = f"{', '.join(tested['python'][:-1])} and {tested['python'][-1]}"
    return "\n".join(lines) + f"\n\nPython {pythons}.\n"


if __name__ == "__main__":
    main()
