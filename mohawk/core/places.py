"""Paths as users write them, and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from mohawk.errors import UserError


def home(path: str | os.PathLike) -> Path:
    """A path in which `~` is the home folder. Raises UserError for `~name` of nobody here."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).rstrip('.').lower()}; write the folder out") from error


def cache_dir() -> Path:
    """The folder for everything fetched or derived: `MOHAWK_CACHE`, else the user's cache folder + mohawk."""
    if given := os.environ.get("MOHAWK_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "mohawk"
