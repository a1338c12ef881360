"""The files of a folder of answers: claimed for its settings, read, cut where they are whole, and grown by lines."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mohawk
from mohawk.core.folders import sum_file, why_altered, write_file
from mohawk.core.json_files import parse_json
from mohawk.core.lines import byte_lines, missing_lines, sum_of, sums_of, why_sums_unusable
from mohawk.data.generated import FILES, RESPONSES
from mohawk.data.records import Prompt
from mohawk.errors import UserError, is_refusal, naming, shortened
from mohawk.generation.masking import without_secrets

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """What has been written: prompts that are done, answers kept, rejected by reason, tokens of all of them."""

    prompts: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


class _Row(NamedTuple):
    """A line that is as it was written: its prompt's index, where it lies in the file, and what is counted of it."""

    i: int
    sample: int
    start: int
    stop: int
    reason: str | None
    tokens: int


@dataclass
class Found:
    """What the files hold: intact lines, how many prompts were begun and finished, and which of these lack lines."""

    rows: dict[str, list[_Row]]
    done: int
    lost: list[int]

    def broken(self) -> bool:
        """Whether prompts lack lines, or something else lies between the intact ones."""
        kept = ([row for row in rows if row.i < self.done] for rows in self.rows.values())
        return bool(self.lost) or any(sum(r.stop - r.start for r in rows) != rows[-1].stop for rows in kept if rows)


def scan(output: Path, prompts: Sequence[Prompt], samples: int, *, say: bool = False) -> Found:
    """Read both files. say: log what is damaged, lost, or without checksums. Raises UserError where a line that is as
    it was written is not of these prompts, in their order."""
    index = {prompt.id: i for i, prompt in enumerate(prompts)}
    for path in (output / name for name in FILES):
        if (problem := why_sums_unusable(path)) is not None:  # asking for all its answers again would cost too much
            raise UserError(
                f"{sums_of(path)}: damaged ({problem}); put it back from a copy, or delete it to go on with what "
                f"{path.name} has, unverified"
            )
    rows = {name: list(_rows(output / name, index, say)) for name in FILES}
    taken: dict[int, list[int]] = {}
    for row in (row for found in rows.values() for row in found):
        taken.setdefault(row.i, []).append(row.sample)
    whole = {i for i, numbers in taken.items() if sorted(numbers) == list(range(samples))}
    done = max(whole, default=-1) + 1
    lost = [i for i in range(done) if i not in whole]
    if say and (missing := sum(missing_lines(output / name) for name in FILES)) > samples:
        log.warning("%s: %d lines that were written are not there", output, missing)
    if say and lost:
        log.warning("%s: %d prompts lack answers; asking them again, the first: %s", output, len(lost),
                    prompts[lost[0]].id)  # fmt: skip
    return Found(rows, done, lost)


def _rows(path: Path, index: Mapping[str, int], say: bool) -> Iterator[_Row]:
    if not path.exists():
        return
    stop, last, unverified = 0, 0, False
    for number, (line, whole) in enumerate(byte_lines(path), 1):
        start, stop = stop, stop + len(line)
        if not line.endswith(b"\n"):  # cut short by a kill
            break
        unverified |= whole is None
        try:
            if whole is False:
                raise ValueError("another checksum")
            row = parse_json(line)
            identity, sample, tokens = row["prompt_id"], int(row["sample"]), int(row["tokens"] or 0)
            i = index[identity] if whole is None else index.get(identity)
        except (ValueError, KeyError, TypeError, OverflowError):
            if say:
                log.warning("%s:%d: damaged, and passed over", path, number)
            continue
        if i is None:
            raise UserError(f"{path}:{number}: not of these prompts; move {path.parent} away")
        if i < last:
            raise UserError(f"{path}:{number}: out of the prompts' order; move {path.parent} away")
        last = i
        yield _Row(i, sample, start, stop, row.get("reason"), tokens)
    if say and unverified:
        log.warning("%s: has no checksums, as earlier versions wrote it; its lines are not verified", path)


def cut_to_whole(output: Path, found: Found) -> Tally:
    """How far the files came; what lies behind that, unfinished lines and prompts that lack answers, is cut off."""
    tally = Tally(prompts=found.done)
    for name, rows in found.rows.items():
        path = output / name
        rows = [row for row in rows if row.i < found.done]
        for row in rows:
            tally.tokens += row.tokens
            if name == RESPONSES:
                tally.kept += 1
            else:
                tally.rejected[row.reason or "unknown"] += 1
        if path.exists():
            os.truncate(path, rows[-1].stop if rows else 0)
        if sums_of(path).exists():  # a line each, of equal length
            os.truncate(sums_of(path), len(rows) * len(f"{sum_of(b'')}\n"))
    return tally


def open_answers(path: Path, stack: ExitStack) -> tuple[Any, Any]:
    """A file to append to, and that of its checksums; none for what an earlier version began."""
    begun = path.exists() and path.stat().st_size > 0
    names = [path] if begun and not sums_of(path).exists() else [path, sums_of(path)]
    files = [stack.enter_context(open(name, "ab", buffering=0)) for name in names]
    return files[0], files[1] if len(files) > 1 else None


def claim(path: Path, settings: dict[str, Any], prompts: Sequence[Prompt], endpoint: str | None) -> None:
    """Write the folder's manifest, or check that the one that is there says the same."""
    asked = {"count": len(prompts), "sha256": _digest(prompts)}
    made = {"mohawk": mohawk.__version__, "settings": settings, "prompts": asked, "endpoint": endpoint}
    if (problem := why_altered(path)) is not None:
        # what this command would write may be just what is lost
        if hashlib.sha256(as_json(made)).hexdigest() not in sum_file(path).read_text(errors="replace").split():
            raise UserError(
                f"output: {path} is damaged ({problem}), so that what made the answers is not known; put it back from "
                "a copy, or run the very command that wrote it, which makes it again; the answers are as they were. To "
                f"take it as it is, delete {sum_file(path)}"
            )
        log.warning("%s %s; made again, as this command wrote it", path, problem)
    elif path.exists():
        if not sum_file(path).exists():
            log.warning("%s: has no checksum, as earlier versions wrote it; it is not verified", path)
        try:
            old = parse_json(path.read_bytes())
            # one that an earlier version wrote may hold a secret of --request
            old_settings, count = without_secrets(old["settings"]), old["prompts"]["count"]
            digest = old["prompts"]["sha256"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"output: {path} cannot be read; move {path.parent} away, or choose another folder"
            ) from None
        settings = without_secrets(json.loads(json.dumps(settings)))
        if changed := _changed(old_settings, settings):
            raise UserError(
                f"output: {path.parent} holds answers made with other settings ({'; '.join(changed)}); choose another "
                "folder, or give the same settings to go on"
            )
        if count > len(prompts) or digest != _digest(prompts[:count]):
            raise UserError(
                f"output: {path.parent} holds answers to other prompts ({count}, here {len(prompts)}); choose another "
                "folder, or give the same prompts (more may follow them)"
            )
    write_object(path, made)


def _changed(old: Any, new: Any, at: str = "") -> list[str]:
    """`name: then, now` of the settings that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{at}: {shortened(repr(old))} then, {shortened(repr(new))} now"]
    names = sorted(old.keys() | new.keys())
    return [c for name in names for c in _changed(old.get(name), new.get(name), f"{at}.{name}" if at else name)]


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(" ".join(prompt.id for prompt in prompts).encode()).hexdigest()


def append(file: Any, lines: bytes) -> None:
    """One write, so that a kill leaves whole lines; what a full disk took of it is cut off by the next start."""
    try:
        while lines:
            lines = lines[file.write(lines) :]
    except OSError as error:
        raise unwritable(file.name, error) from error


def flush(opened: Mapping[str, tuple[Any, Any]]) -> None:
    for file in (file for data, sums in opened.values() for file in (sums, data) if file is not None):
        with naming(file.name):
            os.fsync(file.fileno())


def unwritable(path: Path | str, error: OSError) -> UserError:
    return UserError(f"output: {path} cannot be written ({error.strerror}); the same command goes on")


def seconds_spent(path: Path) -> float | None:
    """What earlier starts of the command took; None where the folder does not say."""
    try:
        spent = math.inf if why_altered(path) else float(parse_json(path.read_bytes())["seconds"])
        return spent if math.isfinite(spent) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if is_refusal(error):
            raise
        return None


def write_object(path: Path, value: Any) -> None:
    with write_file(path) as beside:
        beside.write_bytes(as_json(value))


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
