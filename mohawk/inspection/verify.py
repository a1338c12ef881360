"""`mohawk verify`: every file of a run or a cache hashed again and compared with what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.core.folders import MANIFEST, PARTIAL, is_made_of_others, sum_file, why_altered, why_incomplete
from mohawk.core.lines import damage, missing_lines, sums_of
from mohawk.core.places import home
from mohawk.core.run_folder import (
    ADAPTER,
    BASE,
    MEASURED,
    METRICS_FILE,
    PHASES,
    STUDENT,
    has_lost_sum,
    has_recipe,
    summed_files,
    summed_folders,
)
from mohawk.core.user_cache import has_lost_manifest
from mohawk.data.generated import FILES, SUMMARY, spare_lines
from mohawk.data.generated import MANIFEST as GENERATED_BY
from mohawk.errors import UserError
from mohawk.loading.describe import why_outdated
from mohawk.training.metrics import damaged_lines

if TYPE_CHECKING:
    from rich.console import Console

SUMS = ".sha256"


@dataclass(frozen=True)
class Finding:
    """problem: None for what is as it was written; one of UNVERIFIED for what has no sums to compare with."""

    path: Path
    problem: str | None


NO_SUMS = "was written without sums, by an earlier version"
NO_MANIFEST = f"has no {MANIFEST}: an earlier version wrote it without sums, or it was deleted"
UNVERIFIED = (NO_SUMS, NO_MANIFEST)


def findings(folder: Path) -> Iterator[Finding]:
    """All that was written below a folder: folders with a manifest, files with a sum, files whose lines have one, and
    what a run or a cache of an earlier version has without either. Reads every byte."""
    inside: set[Path] = set()
    for manifest in sorted(folder.rglob(MANIFEST)):
        place = manifest.parent
        if _passing(place, folder) or any(parent in inside for parent in place.parents):
            continue
        inside.add(place)
        yield Finding(place, _whole(place))
    for sums in sorted(folder.rglob(f".*{SUMS}")):
        path = sums.with_name(sums.name.removesuffix(SUMS).removeprefix("."))
        if not _passing(path, folder):
            yield Finding(path, _altered(path))
    for path in _of_lines(folder, METRICS_FILE):
        yield Finding(path, _records(path, damaged_lines))
    for sums in sorted(folder.rglob(".*.crc32")):
        path = sums.with_name(sums.name.removesuffix(".crc32").removeprefix("."))
        if path.name not in (METRICS_FILE, Path(MEASURED).name) and not _passing(path, folder):
            yield Finding(path, damage(path, spare_lines(path.parent)))
    for path in sorted(path for name in FILES for path in folder.rglob(name)):
        if not sums_of(path).exists() and path.stat().st_size and not _passing(path, folder):
            yield Finding(path, NO_SUMS)
    for path in _of_lines(folder, Path(MEASURED).name):
        from mohawk.conversion.probe import damaged_measurements

        yield Finding(path, _records(path, damaged_measurements))
    yield from _of_runs(folder, inside)


def verify(path: str | Path, console: Console | None = None) -> list[Finding]:
    """Check a run's folder or a cache's and say what was found.

    path: of a run, a student, a teacher's answers, its cache, or of tokenised text (one text's folder, or all of them).

    Raises:
        UserError: nothing there is mohawk's, or something is damaged, a line for each.
    """
    from rich.console import Console

    console, folder = console or Console(), home(path)
    if not folder.is_dir():
        raise UserError(f"{path} is no folder; give a run's, or a cache's")
    found = list(findings(folder))
    if not found:
        raise UserError(f"{path} holds nothing with sums of mohawk's; give a run's folder, a student's, or a cache's")
    whole = sum(one.problem is None for one in found)
    for one in found:
        if one.problem in UNVERIFIED:
            console.print(f"{one.path}: {one.problem}; not verified", highlight=False, soft_wrap=True, markup=False)
    if damaged := [one for one in found if one.problem not in (None, *UNVERIFIED)]:
        lines = [f"{one.path}: {one.problem}; {_remedy(one.path)}" for one in damaged]
        raise UserError("\n".join([*lines, f"{len(damaged)} of {len(found)} parts of {path} are damaged"]))
    if not whole:
        raise UserError(f"nothing of {path} is verified, as it has no sums; delete it to have it made again with them")
    console.print(f"{path}: {whole} parts, each as it was written", highlight=False, soft_wrap=True, markup=False)
    return found


def _remedy(path: Path) -> str:
    if path.name in (ADAPTER, BASE) or path.name == STUDENT and path.parent.parent.name == PHASES:
        return "the command that wrote it makes it again of the last checkpoint beside it, or says how"
    return "the command that wrote it makes again what it needs of it"


def _whole(place: Path) -> str | None:
    """What is wrong with a folder that has a manifest, which a teacher's cache hashes too."""
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
        if isinstance(manifest, dict) and "format" in manifest:
            from mohawk.teacher_cache.reader import read_manifest

            read_manifest(place)
    except UserError as error:
        return str(error).partition(": ")[2].partition("; ")[0]
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    try:
        return why_incomplete(place)
    except OSError as error:
        return f"{Path(error.filename or place).name} cannot be read ({error.strerror})"


def _altered(path: Path) -> str | None:
    try:
        problem, sums = why_altered(path), sum_file(path)
        if problem is None and sums.exists():  # right, but for the name behind it
            named = [line.endswith(f"  {path.name}\n".encode()) for line in sums.read_bytes().splitlines(keepends=True)]
            problem = None if all(named) else "has a damaged sum beside it"
        return problem
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _of_lines(folder: Path, name: str) -> list[Path]:
    """The files of this name, and those whose checksums are there."""
    sums = (path.with_name(name) for path in folder.rglob(sums_of(Path(name)).name))
    return sorted(path for path in {*folder.rglob(name), *sums} if not _passing(path, folder))


def _records(path: Path, damaged: Callable[[Path], int]) -> str | None:
    """What is wrong with a file of records, of which `damaged` counts the lines that are not as they were written."""
    if not path.exists():
        return "is missing" if missing_lines(path) > 1 else None  # a kill before its first line leaves a checksum
    if count := damaged(path):
        return f"{count} damaged lines"
    if sums_of(path).exists():
        return None
    return "has lost the checksums of its lines" if has_lost_sum(path) else NO_SUMS


def _of_runs(folder: Path, inside: set[Path]) -> Iterator[Finding]:
    """A final student that is not of the last step's, what has no sum where an earlier version wrote it (a run's files,
    tokenised text and pairs), and a teacher's answers that are not finished."""
    if has_recipe(folder):
        if (problem := why_outdated(folder)) is not None:
            yield Finding(folder / STUDENT, problem)
        for path in (*folder.glob("export/[!.]*"), *folder.glob("quantized/[!.]*")):
            if is_made_of_others(path, folder / STUDENT):
                yield Finding(path, f"was made of another student than {folder / STUDENT} is now")
        for path in summed_files(folder):
            if not sum_file(path).exists():
                yield Finding(path, _altered(path) or NO_SUMS)
        for path in summed_folders(folder):
            if path not in inside:
                yield Finding(path, f"has no {MANIFEST}")
    answers = {path.parent for name in FILES for path in folder.rglob(name)}
    for path in sorted(place / name for place in answers for name in (GENERATED_BY, SUMMARY)):
        if path.is_file() and not sum_file(path).exists() and not _passing(path, folder):
            yield Finding(path, NO_SUMS)
    for path in sorted({*folder.rglob("offsets.npy"), *folder.rglob("spans.npy")}):
        if path.parent not in inside and not _passing(path, folder):
            lost = has_lost_manifest(path.parent)
            yield Finding(path.parent, f"has lost its {MANIFEST}" if lost else NO_MANIFEST)
    for place in sorted({path.parent for path in folder.rglob("shard-*.bin")} - inside):
        from mohawk.teacher_cache.writer import SETTINGS

        if not _passing(place, folder) and (place / SETTINGS).is_file():
            yield Finding(place, f"has no {MANIFEST}, so its answers are not finished")


def _passing(path: Path, folder: Path) -> bool:
    """Whether a path lies in what a process is writing, or left half written."""
    return any(part.startswith((PARTIAL, ".")) for part in path.relative_to(folder).parts)
