"""Writes what the documentation takes from elsewhere: tables from benchmarks/results/, the reference of recipes from
their schema, that of commands from the command line's grammar, that of Python from docstrings, plans from the planner.

    python docs/generate.py            # write the files
    python docs/generate.py --check    # exit with 1, naming them, if files are not as they would be written

The files are checked in, so that they read well where nothing builds them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import benchmark_tables  # noqa: E402
import reference_commands  # noqa: E402
import reference_plans  # noqa: E402
import reference_python  # noqa: E402
import reference_recipes  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    check = parser.parse_args().check
    changed = [path for path, text in generated().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'is not as docs/generate.py writes it' if check else 'written'}")
        if not check:
            path.write_text(generated()[path], encoding="utf-8")
    return 1 if check and changed else 0


def generated() -> dict[Path, str]:
    """The text that each page with generated parts should have."""
    return benchmark_tables.with_tables() | {
        DOCS / "recipes.md": reference_recipes.recipes(),
        DOCS / "commands.md": reference_commands.commands(),
        DOCS / "python.md": reference_python.python(),
        DOCS / "plans.md": reference_plans.plans(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
