"""The user's cache folder: what is fetched or derived once, whole or absent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mohawk.core.folders import MANIFEST, about_of, fsync, seal, why_incomplete
from mohawk.errors import UserError

log = logging.getLogger(__name__)

META = "meta.json"  # of text in tokens: what it is
SUMS = "sums"  # in it: that the folder has a manifest with the sums of its files


@contextlib.contextmanager
def whole_folder(target: Path, about: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` by one rename when the block succeeds: its files
    hashed into MANIFEST.json, which also says what it is `about`, and flushed to the disk.

    If another process finished the same folder first, its result stays and ours is dropped. What killed processes left
    of it is removed. Raises UserError where nothing can be written.
    """
    held: int | None = None
    ours: list[Path] = []
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in target.parent.glob(f".{target.name}-*"):
                if (orphan := _hold(left)) is not None:
                    log.info("removing %s, left by a process that was stopped", left)
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(orphan)
            made = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
            scratch = made.with_name(f".{target.name}-{made.name.removeprefix('.new-')}")
            ours = [made, scratch]
            held = _hold(made)  # before others take it for one of ours
            made.rename(scratch)
        except OSError as error:
            raise unwritable(target.parent, error) from error
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        seal(folder, about)
        try:
            os.rename(folder, target)
            fsync(target.parent)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        for path in ours:
            shutil.rmtree(path, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """A handle that keeps the folder for this process until it is closed or the process ends; None where another one
    has it, or where nobody can tell."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; or it is gone already
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(handle)
        return None
    return handle


def kept_whole(folder: Path, about: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder of `whole_folder` is there as it was written, and about the same.

    A damaged one, or one that has lost its manifest, is said and removed, to be made again. One of an earlier version,
    which had none, is said once and taken as it is.
    """
    if not folder.is_dir():
        return False
    lost = has_lost_manifest(folder)
    if not (folder / MANIFEST).exists() and not lost:
        if folder not in _told:
            _told.add(folder)
            log.warning(
                "%s was kept by an earlier version, without sums: not verified; delete it to have it made again", folder
            )
        return True
    problem = f"has lost its {MANIFEST}" if lost else why_incomplete(folder, remembered=True)
    if problem is None and about_of(folder) != dict(about or {}):
        problem = "is another folder under this name"
    if problem is None:
        return True
    log.warning("%s: %s; making it again", folder, problem)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            os.rename(folder, Path(scratch) / folder.name)  # at once: half removed it would be taken for whole
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    return False


def has_lost_manifest(folder: Path) -> bool:
    """Whether a folder of text in tokens without a manifest had one, as its META says; of one that an earlier version
    wrote it does not."""
    if (folder / MANIFEST).exists():
        return False
    try:
        told = json.loads((folder / META).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get(SUMS) is True


_told: set[Path] = set()


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the cache {folder}: {error.strerror}; set MOHAWK_CACHE to a writable folder, or "
        "data.cache where a recipe has it"
    )
