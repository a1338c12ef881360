"""The files of a folder that `mohawk generate-data` or `purify` writes, and how many of their lines may be missing."""

from __future__ import annotations

from pathlib import Path

from mohawk.core.json_files import parse_json
from mohawk.errors import is_refusal

RESPONSES = "responses.jsonl"
REJECTED = "rejected.jsonl"
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
FILES = (RESPONSES, REJECTED)


def spare_lines(folder: Path) -> int:
    """How many lines a process that was killed in this folder may have left out; 0 where the answers are all there."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        done = parse_json((folder / SUMMARY).read_bytes())["prompts"]
        samples = int(manifest["settings"]["decoding"].get("samples") or 1)
        return 0 if done == manifest["prompts"]["count"] else samples
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if is_refusal(error):
            raise
        return 0
