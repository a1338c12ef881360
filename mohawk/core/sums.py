"""sha256 of files, hashed once: a sum is remembered as long as its file keeps its size and its times.

What is remembered lies in the cache folder (`mohawk.core.places.cache_dir`), a small file for each folder that was
looked at, so that nothing is written beside what is read; where the cache cannot be written, files are hashed each
time. A disk that loses bits changes neither size nor times: `mohawk verify` hashes all again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from mohawk.core.places import cache_dir

log = logging.getLogger(__name__)

SETTLED_NS = 100_000_000  # a file as young as this may change again without its time telling: clocks tick in jiffies
Entry = tuple[int, int, int, str]  # size, time of its content, time of its inode, sha256


def sha256_of(paths: Sequence[Path], *, again: bool = False) -> list[str]:
    """sha256, hex, of each file; again: hash it even where its sum is remembered. Raises OSError."""
    found: dict[Path, str] = {}
    for folder, files in itertools.groupby(sorted(set(paths)), key=lambda path: path.parent):
        memory = _recall(folder)
        known = dict(memory)
        for path in files:
            stamp = _stamp(path)
            entry = memory.get(path.name)
            if entry is not None and entry[:3] == stamp and not again:
                found[path] = entry[3]
                continue
            found[path] = hashed(path)
            known.pop(path.name, None)
            if time.time_ns() - max(stamp[1:]) > SETTLED_NS and _stamp(path) == stamp:
                known[path.name] = (*stamp, found[path])
        if known != memory:
            _remember(folder, known)
    return [found[path] for path in paths]


def hashed(path: Path) -> str:
    """sha256, hex, of a file. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()  # hashlib.file_digest is new in Python 3.11
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _memory(folder: Path) -> Path:
    return cache_dir() / "sums" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _recall(folder: Path) -> dict[str, Entry]:
    try:
        read = json.loads(_memory(folder).read_bytes())
        return {name: (int(size), int(content), int(inode), str(digest)) for name, (size, content, inode, digest)
                in read["files"].items()}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or damaged: everything is hashed
        return {}


def _remember(folder: Path, known: dict[str, Entry]) -> None:
    path = _memory(folder)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"folder": str(folder.resolve()), "files": known}) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        log.debug("sums of %s are not remembered: %s", folder, error)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
