"""metrics.jsonl: what a run's phases log, one object a logged step.

Each has phase, step, steps, tokens (positions trained on so far in the phase), learning_rate, skipped_steps (so far in
the phase), loss (mean over the steps since the last record, but the skipped ones), grad_norm (of the last step, before
clipping), tokens_per_s, parts (the loss by the objective's names), and skipped_at where steps were skipped. A value
that is not finite is null: NaN is not JSON.
"""

import logging
import os
from pathlib import Path
from typing import Any

from mohawk.parsing import parse_json

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of logged steps, in the file's order; none where there is no file. Damaged lines are passed over."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [record for line in lines if (record := _record(line)) and {"tokens", "loss"} <= record.keys()]
    if len(records) < len(lines):
        log.warning("%s: passed over %d damaged lines", path, len(lines) - len(records))
    return records


def drop_after(path: str | os.PathLike, phase: str, step: int) -> None:
    """Drop from a metrics file the lines of `phase` beyond `step`, and lines that a kill cut short.

    The run goes on from `step` and writes those lines again. The file is replaced in one rename.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [(line, _record(line)) for line in lines]
    kept = [line for line, found in records if found and (found["phase"] != phase or found["step"] <= step)]
    if len(kept) == len(lines) and path.read_bytes().endswith(b"\n"):
        return
    beside = path.with_name(f".partial-{path.name}")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"phase", "step"} <= record.keys() else None
