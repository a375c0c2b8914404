"""Generate unicode_tables.inc: the letters, numbers and white space of GPT-2's pattern.

The classes follow Unicode 16.0, the version used by the regex engine of tiktoken 0.14, so that both
split every text into the same pieces. Run this script again when tiktoken changes the version
(tests/tokenizer then fails)::

    pip install "unicodedata2==16.*" && python csrc/tokenizer/generate_unicode_tables.py
"""

from itertools import groupby
from pathlib import Path

import unicodedata2

UNICODE_VERSION = "16.0.0"
RANGES_PER_LINE = 3

HEADER = f"""\
// Unicode {UNICODE_VERSION}: all code points of the general categories L (letters) and N (numbers)
// and of the property White_Space, as {{first, last, class}}, in ascending order.
// Written by generate_unicode_tables.py; do not edit.
// clang-format off
"""


def main() -> None:
    """Write the table to the folder of this script."""
    if unicodedata2.unidata_version != UNICODE_VERSION:
        raise SystemExit(
            f"unicodedata2 holds Unicode {unicodedata2.unidata_version}, not {UNICODE_VERSION}: "
            'run: pip install "unicodedata2==16.*"'
        )
    entries = [f"{{0x{a:05X}, 0x{b:05X}, CharClass::{name}}}," for a, b, name in class_ranges()]
    rows = (entries[i : i + RANGES_PER_LINE] for i in range(0, len(entries), RANGES_PER_LINE))
    lines = "\n".join(" ".join(row) for row in rows)
    path = Path(__file__).with_name("unicode_tables.inc")
    path.write_text(f"{HEADER}{lines}\n// clang-format on\n", encoding="utf-8")
    print(f"{path}: {len(entries)} ranges")


def class_ranges() -> list[tuple[int, int, str]]:
    """Return (first, last, class name) for each run of code points with the same class."""
    ranges = []
    for name, run in groupby(range(0x110000), key=class_name):
        points = list(run)
        if name:
            ranges.append((points[0], points[-1], name))
    return ranges


def class_name(code_point: int) -> str:
    """Return the name of the code point's CharClass, or "" if it has none."""
    category = unicodedata2.category(chr(code_point))
    if category[0] == "L":
        return "kLetter"
    if category[0] == "N":
        return "kNumber"
    # The property White_Space consists of the separators (Z) and these control characters.
    if category[0] == "Z" or 0x09 <= code_point <= 0x0D or code_point == 0x85:
        return "kSpace"
    return ""


if __name__ == "__main__":
    main()
