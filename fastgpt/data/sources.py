"""Find the files that contain texts: the given files, and the text files of the given folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.data.documents import JSON_LINES_SUFFIXES, PARQUET_SUFFIXES, uncompressed_suffix
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import contents

# In a folder. Not .json, which often contains other data than texts.
TEXT_SUFFIXES = (".txt", *JSON_LINES_SUFFIXES, *PARQUET_SUFFIXES)


@dataclass(frozen=True)
class Sources:
    """The files with texts, in the order in which they are read.

    skipped: paths that are not used, and the reason for each.
    """

    files: list[Path] = field(default_factory=list)
    skipped: dict[Path, str] = field(default_factory=dict)


def find_sources(
    inputs: str | Path | Iterable[str | Path], exclude: Iterable[Path] = ()
) -> Sources:
    """Return the given files, and the text files in the given folders sorted by path.

    Folders are searched with all folders in them, including those that are symbolic links. Hidden
    files and folders, other files, files that are found twice, and files that are also in
    `exclude` (the validation texts) are skipped.

    Raises: UsageError for a path that does not exist, a folder that cannot be read, or a folder
        without text files.
    """
    sources, found = Sources(), {path.resolve() for path in exclude}
    excluded = frozenset(found)
    for path in map(Path, [inputs] if isinstance(inputs, str | Path) else inputs):
        n_files = 0
        for file, reason in _candidates(path):
            real = file.resolve()
            n_files += reason is None
            if reason is None and real in found:
                reason = "used for validation" if real in excluded else "already included"
            if reason is None:
                sources.files.append(file)
                sources.skipped.pop(file, None)  # if it is also in a folder
                found.add(real)
            else:
                sources.skipped[file] = reason
        if not n_files:
            raise UsageError(f"folder {path} contains no *{', *'.join(TEXT_SUFFIXES)} file")
    return sources


def _candidates(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield a file itself, or the contents of a folder, each with a reason to skip it or None."""
    if path.is_dir():
        yield from _walk(path, set())
    elif path.exists():
        yield path, None
    else:
        raise UsageError(f"{path} does not exist")


def _walk(folder: Path, visited: set[Path]) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of a folder. visited: real paths of folders, which are not entered again."""
    if (real := folder.resolve()) in visited:
        yield folder, "already included"
        return
    visited.add(real)
    try:
        paths = sorted(contents(folder))
    except OSError as error:
        raise UsageError(f"folder {folder} cannot be read: {error.strerror}") from None
    for path in paths:
        if path.name.startswith("."):
            yield path, "hidden"
        elif path.is_dir():
            yield from _walk(path, visited)
        else:
            yield path, _reason_to_skip(path)


def _reason_to_skip(path: Path) -> str | None:
    if not path.is_file():
        return "not a regular file" if path.exists() else "a broken link"
    if uncompressed_suffix(path) not in TEXT_SUFFIXES:
        return "not *" + ", *".join(TEXT_SUFFIXES)
    return None
