"""JSON files that are whole or absent: written with a sum, read back with their types checked; and JSON that others
wrote."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mohawk.core.folders import sum_file, why_altered, write_file

log = logging.getLogger(__name__)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON by one rename. JSON has no infinity and no NaN: they become "inf", "-inf" and "nan"."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file by one rename, making its folder; `why_altered` knows it again."""
    with write_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: Path | str, kind: Any = dict[str, Any]) -> Any | None:
    """What `write_json` wrote, with its numbers back; None where there is no such file, or a damaged one. That one is
    damaged, or was there, is logged.

    kind: a type as pydantic checks it; a value of another one is damage too.

    Raises:
        OSError: the machine refuses to read it, which says nothing of what is in it.
    """
    path = Path(path)
    if not path.is_file():
        if sum_file(path).exists():
            log.warning("%s is missing: making again what was in it", path)
        return None
    content = path.read_bytes()
    problem = why_altered(path, content)
    try:
        if problem is None:
            value = _numbers(parse_json(content.decode("utf-8")))
            TypeAdapter(kind).validate_python(value, strict=True)
            return value
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    except ValueError as error:
        problem = str(error)
    log.warning("%s is damaged (%s): making again what was in it", path, problem)
    return None


def parse_json(text: str | bytes) -> Any:
    """`json.loads` of what others wrote: whatever is wrong with it is a ValueError, as what is nested too deep, or text
    that cannot be written anywhere."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    # \ud800 without its other half is no character: no file takes it and no tokenizer
    if b"\\ud" in text or b"\\uD" in text if isinstance(text, bytes) else "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character, \\u{ord(error.object[error.start]):04x} alone") from None
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value
