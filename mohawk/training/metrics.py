"""metrics.jsonl: what a run's phases log, one object a logged step.

Each has phase, step, steps, tokens (positions trained on so far in the phase), learning_rate, skipped_steps (so far in
the phase), loss (mean over the steps since the last record, but the skipped ones), grad_norm (of the last step, before
clipping), tokens_per_s, parts (the loss by the objective's names), and skipped_at where steps were skipped. A value
that is not finite is null: NaN is not JSON. `.metrics.jsonl.crc32` has the lines' checksums, by which damage shows.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mohawk.core.json_files import parse_json
from mohawk.core.lines import missing_lines, read_lines, sums_of, write_lines
from mohawk.core.run_folder import has_lost_sum

log = logging.getLogger(__name__)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of logged steps, in the file's order; none where there is no file. Damaged lines are passed over."""
    path = Path(path)
    if not path.is_file():
        if (count := missing_lines(path)) > 1:  # a kill before its first line leaves a checksum
            log.warning("%s is missing, and the %d lines that were in it", path, count)
        return []
    if not sums_of(path).exists() and has_lost_sum(path):
        log.warning("%s has lost the checksums of its lines: they are taken as they are", path)
    found = _records(path)
    records = [record for _, record in found if record and {"tokens", "loss"} <= record.keys()]
    if len(records) < len(found):
        log.warning("%s: passed over %d damaged lines", path, len(found) - len(records))
    return records


def ends(losses: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean of the first and of the last tenth of a phase's losses: one step's loss is as much its batch's as the
    model's. Losses that are not finite are left out; None where a tenth has no other."""
    tenth = max(1, len(losses) // 10)
    parts = [[loss for loss in part if loss is not None] for part in (losses[:tenth], losses[-tenth:])]
    first, last = (math.fsum(part) / len(part) if part else None for part in parts)
    return first, last


def damaged_lines(path: str | os.PathLike) -> int:
    """How many lines of a metrics file are not as they were written, or are not there."""
    lost = missing_lines(Path(path)) - 1
    return max(0, lost) + sum(record is None for _, record in _records(Path(path)))


def drop_after(path: str | os.PathLike, phase: str, step: int) -> None:
    """Drop from a metrics file the lines of `phase` beyond `step`, and damaged ones, as a kill cuts one short.

    The run goes on from `step` and writes those lines again. The file is replaced in one rename.
    """
    path = Path(path)
    if not path.exists():
        return
    found = _records(path)
    kept = [line for line, record in found if record and (record["phase"] != phase or record["step"] <= step)]
    if len(kept) < len(found) or not path.read_bytes().endswith(b"\n") or missing_lines(path):
        write_lines(path, kept)


def copy_without(source: str | os.PathLike, target: str | os.PathLike, phase: str) -> None:
    """Write the records of a metrics file that are not of `phase` to another one."""
    write_lines(Path(target), [line for line, record in _records(Path(source)) if record and record["phase"] != phase])


def _records(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """(line, its record or None where it is damaged) of each line."""
    return [(line, _record(line) if whole else None) for line, whole in read_lines(path)]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("phase"), str) or type(record.get("step")) is not int:
        return None
    numbers = (record[key] for key in ("tokens", "loss", "tokens_per_s", "grad_norm") if key in record)
    return record if all(type(value) in (int, float, type(None)) for value in numbers) else None
