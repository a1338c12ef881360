"""Versions, for the Makefile: what is declared in pyproject.toml, without caps or at its lowest, and what has moved.

    python .ci/versions.py lowest              every declared package at its lower bound, as constraints
    python .ci/versions.py uncapped            what the tests need, without upper bounds, as requirements
    python .ci/versions.py moved CONSTRAINTS   what is installed in another version than the constraints say

Needs packaging, and tomli with Python 3.10.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packaging.requirements import Requirement  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

from mohawk.core.versions import declared, installed  # noqa: E402


def lowest() -> list[str]:
    lines = set()
    for _, requirement in declared():
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1:
            sys.exit(f"{requirement}: one lower bound (>=) is needed, to be tested")
        lines.add(f"{requirement.name}=={bounds[0]}{_marker(requirement)}")
    return sorted(lines)


def uncapped() -> list[str]:
    """All but what has to be compiled."""
    lines = set()
    for extra, requirement in declared():
        if extra != "cuda":
            kept = SpecifierSet(",".join(str(each) for each in requirement.specifier if "<" not in each.operator))
            lines.add(f"{requirement.name}{kept}{_marker(requirement)}")
    return sorted(lines)


def moved(constraints: str) -> list[str]:
    """A line for each package: name, the version in the constraints, the installed one."""
    rows = []
    for line in Path(constraints).read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        now = installed(canonicalize_name(pin.name))
        applies = pin.marker is None or pin.marker.evaluate()
        if applies and now is not None and not pin.specifier.contains(now, prereleases=True):
            rows.append((pin.name, str(pin.specifier).removeprefix("=="), now))
    if not rows:
        return [f"nothing moved: what is installed is what {constraints} says"]
    widths = [max(len(row[column]) for row in [*rows, HEAD]) for column in range(3)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [HEAD, *rows]
    ]


HEAD = ("package", "tested", "newest")


def _marker(requirement: Requirement) -> str:
    return f"; {requirement.marker}" if requirement.marker else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lowest")
    commands.add_parser("uncapped")
    commands.add_parser("moved").add_argument("constraints")
    options = parser.parse_args()
    if options.command == "lowest":
        found = lowest()
    elif options.command == "uncapped":
        found = uncapped()
    else:
        found = moved(options.constraints)
    print(*found, sep="\n")
