"""Check the types and ranges of values from outside, such as the fields of a JSON file.

Each function returns the value, or raises ValueError with one line that names the field, what it
must be and what it is.
"""

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def integer(name: str, value: Any, least: int, most: int) -> int:
    """Return an integer from `least` to `most`; a bool or a float is not one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, "an integer", value)
    if (found := int(value)) < least:
        raise _wrong(name, f"at least {least}", found)
    if found > most:
        raise _wrong(name, f"at most {most}", found)
    return found


def number(name: str, value: Any) -> float:
    """Return a number, which can be an integer, infinite or NaN; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise _wrong(name, "a number of double precision", value) from None


def flag(name: str, value: Any) -> bool:
    """Return a bool; 0 and 1 also are, but not a string such as "false"."""
    if value not in (True, False):
        raise _wrong(name, "true or false", value)
    return bool(value)


def text(name: str, value: Any) -> str:
    """Return a str."""
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a dict, which is what an object becomes in Python."""
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Prefix the message of every ValueError raised in the block with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def json_object(content: bytes) -> dict[str, Any]:
    """Return the object in the content of a JSON file."""
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    return mapping("its content", found)


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {expected}, not {reprlib.repr(value)}")
