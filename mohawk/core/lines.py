"""Files that grow by lines, with a checksum for each line in `.NAME.crc32` beside them, by which damage shows."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mohawk.errors import naming


def append_line(path: Path, line: str) -> None:
    """Add a line. Its checksum comes first, so that a kill leaves no line without one; a file that an earlier version
    began goes on without."""
    files = [(path, line)]
    if sums_of(path).exists() or not path.exists():
        files.insert(0, (sums_of(path), _sum(line)))
    # Opened anew each time: appending stays right when another program rotated or edited the file.
    for file, text in files:
        with naming(file), open(file, "a", encoding="utf-8") as opened:
            opened.write(text + "\n")


def read_lines(path: Path) -> list[tuple[str, bool]]:
    """(line, whether it is as it was written) of each line; of a file without checksums, all are."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    known = _known(path)
    return [(line, known is None or _sum(line) in known) for line in lines]


def byte_lines(path: Path) -> Iterator[tuple[bytes, bool | None]]:
    """(line with its end, whether it is as it was written) of each line, read one by one; None where there are no
    checksums. A last line without its end is as a kill left it: not as it was written."""
    known = _known(path)
    with open(path, "rb") as file:
        for line in file:
            yield line, None if known is None else line.endswith(b"\n") and sum_of(line[:-1]) in known


def damage(path: Path, spare: int = 0) -> str | None:
    """What is wrong with a file of lines, in a few words; None where it is as written, or has no checksums.

    spare: how many lines at its end a process that was killed, or that is at work, may have left out.
    """
    if not sums_of(path).exists():
        return None
    if not path.exists():
        return "is missing" if missing_lines(path) > spare else None
    numbers = [i for i, (line, whole) in enumerate(byte_lines(path), 1) if not whole and line.endswith(b"\n")]
    if numbers:
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        return f"line {numbers[0]}{more}: not as written"
    lost = missing_lines(path)
    return f"{lost} of its lines are not there" if lost > spare else None


def why_sums_unusable(path: Path) -> str | None:
    """What is wrong with the checksums themselves of a file of lines; None where they are well, or there are none."""
    sums = sums_of(path)
    if not sums.exists():
        return None
    if not all(re.fullmatch(rb"[0-9a-f]{8}", line) for line in sums.read_bytes().split(b"\n")[:-1]):
        return "not eight hex digits a line"
    written, there = (file.read_bytes().count(b"\n") if file.exists() else 0 for file in (sums, path))
    return f"{written} sums of {there} lines" if written < there else None


def missing_lines(path: Path) -> int:
    """How many more lines were written than are there. A kill leaves one at most: its checksum came first."""
    sums = sums_of(path)
    if not sums.exists():
        return 0
    written, there = (file.read_bytes().count(b"\n") if file.exists() else 0 for file in (sums, path))
    return max(0, written - there)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A file of these lines, replaced in one rename."""
    sums = [_sum(line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _known(path)
    if known is None and path.exists():  # begun by an earlier version
        _replace(path, lines)
        return
    _replace(sums_of(path), [*sums, *sorted(known or ())])  # until the next statement both are right
    _replace(path, lines)
    _replace(sums_of(path), sums)


def _replace(path: Path, lines: Sequence[str]) -> None:
    beside = path.with_name(f".partial-{path.name}")
    try:
        with naming(path), open(beside, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _known(path: Path) -> set[str] | None:
    try:
        return set(sums_of(path).read_text(encoding="utf-8", errors="replace").split())
    except FileNotFoundError:
        return None


def sums_of(path: Path) -> Path:
    """Where the checksums of a file's lines are, eight hex digits a line."""
    return path.with_name(f".{path.name}.crc32")


def _sum(line: str) -> str:
    return sum_of(line.encode("utf-8", "surrogatepass"))


def sum_of(line: bytes) -> str:
    """CRC-32 of a line without its end, in eight hex digits."""
    return f"{zlib.crc32(line):08x}"
