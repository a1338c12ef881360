"""Files that grow by lines, with a checksum for each line in `.NAME.crc32` beside them, by which damage shows."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path


def append_line(path: Path, line: str) -> None:
    """Add a line. Its checksum comes first, so that a kill leaves no line without one; a file that an earlier version
    began goes on without."""
    files = [(path, line)]
    if _sums_of(path).exists() or not path.exists():
        files.insert(0, (_sums_of(path), _sum(line)))
    # Opened anew each time: appending stays right when another program rotated or edited the file.
    for file, text in files:
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(text + "\n")


def read_lines(path: Path) -> list[tuple[str, bool]]:
    """(line, whether it is as it was written) of each line; of a file without checksums, all are."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    known = _known(path)
    return [(line, known is None or _sum(line) in known) for line in lines]


def missing_lines(path: Path) -> int:
    """How many more lines were written than are there. A kill leaves one at most: its checksum came first."""
    sums = _sums_of(path)
    if not sums.exists():
        return 0
    written, there = (len(file.read_bytes().splitlines()) if file.exists() else 0 for file in (sums, path))
    return max(0, written - there)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A file of these lines, replaced in one rename."""
    sums = [_sum(line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _known(path)
    if known is None and path.exists():  # begun by an earlier version
        _replace(path, lines)
        return
    _replace(_sums_of(path), [*sums, *sorted(known or ())])  # until the next statement both are right
    _replace(path, lines)
    _replace(_sums_of(path), sums)


def _replace(path: Path, lines: Sequence[str]) -> None:
    beside = path.with_name(f".partial-{path.name}")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _known(path: Path) -> set[str] | None:
    try:
        return set(_sums_of(path).read_text(encoding="utf-8", errors="replace").split())
    except FileNotFoundError:
        return None


def _sums_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.crc32")


def _sum(line: str) -> str:
    return f"{zlib.crc32(line.encode('utf-8', 'surrogatepass')):08x}"
