"""The versions that this package is tested with, as pyproject.toml declares them, and what is installed."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

DISTRIBUTION = "mohawk-distill"  # what pip calls this package; `mohawk` there is an HTTP authentication library
COMMAND = "mohawk"  # what it installs, and another project's package of that name does not
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # there in a source checkout alone


class Outside(NamedTuple):
    """An installed package that is not in the range that is tested."""

    name: str
    version: str
    range: SpecifierSet


def declared() -> list[tuple[str, Requirement]]:
    """(extra, requirement), the extra empty for what every use needs; `mohawk-distill[...]` within extras left out.

    From pyproject.toml in a source checkout, since an editable install knows only what it said when it was made; else,
    and where nothing here reads TOML (Python 3.10 without tomli), from the installed package, without the extra of
    the tests, which are not installed. Raises importlib.metadata.PackageNotFoundError where there is neither.
    """
    table = _checkout()
    if table is not None:
        found = [("", text) for text in table["dependencies"]]
        found += [(extra, text) for extra, texts in table["optional-dependencies"].items() for text in texts]
        requirements = [(extra, Requirement(text)) for extra, text in found]
    else:
        extras = ["", *(importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [])]
        requirements = []
        for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or []):
            # an extra's requirements hold under the marker `extra == ...`, those of every use without any extra too
            holds = [extra for extra in extras if _holds(requirement, extra)]
            requirements += [(extra, requirement) for extra in holds[:1] if extra != "test"]
    return [(extra, requirement) for extra, requirement in requirements if requirement.name != DISTRIBUTION]


def ranges() -> dict[str, SpecifierSet]:
    """Package ("python" for the interpreter) -> the versions that are tested on this machine."""
    table = _checkout()
    pythons = table["requires-python"] if table else importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    found = {"python": SpecifierSet(pythons)}
    for extra, requirement in declared():
        if _holds(requirement, extra):
            name = canonicalize_name(requirement.name)
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def outside() -> list[Outside]:
    """What is installed in a version outside its range, by name. What is missing is not in it."""
    found = []
    for name, tested in sorted(ranges().items()):
        version = installed(name)
        if version is not None and not tested.contains(version, prereleases=True):
            found.append(Outside(name, version, tested))
    return found


def installed(name: str) -> str | None:
    """The installed version of a package ("python" for the interpreter), None where there is none."""
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def foreign() -> list[str]:
    """Other projects' installed packages that are called `mohawk`, as "mohawk 1.1.0 (its summary)".

    Their files lie in the same folder as ours, `mohawk/__init__.py` among them, so one of the two packages is broken.
    This project was once installed under that name itself; such an installation is not counted, since it brings our
    command.
    """
    found = []
    for each in importlib.metadata.distributions(name="mohawk"):
        if not any(entry.name == COMMAND for entry in each.entry_points):
            found.append(f"mohawk {each.version} ({each.metadata['Summary'] or 'without a summary'})")
    return found


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _checkout() -> dict[str, Any] | None:
    """The project table of pyproject.toml beside this package, None where there is none or nothing to read it with."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            return None
    if not PYPROJECT.is_file():
        return None
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8")).get("project", {})
    return project if project.get("name") == DISTRIBUTION else None
