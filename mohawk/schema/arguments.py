"""The arguments of commands that run a recipe."""

from __future__ import annotations

import argparse

from mohawk.core.command import path
from mohawk.schema.yaml_text import quoted


def add_run(parser: argparse.ArgumentParser, plan: str = "print the plan and exit") -> None:
    """Recipe, plan, folder and values of a command that runs a recipe."""
    parser.add_argument("recipe", type=path, metavar="RECIPE", help="a YAML file")
    parser.add_argument("--dry-run", action="store_true", help=plan)
    parser.add_argument("--output", metavar="DIR", help="the run's folder, instead of the recipe's")
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`, as often as wanted."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the recipe, such as phases.hidden.tokens=2e6; may be repeated",
    )


def overrides(options: argparse.Namespace) -> list[str]:
    """What the command line changes in a recipe."""
    return [*options.set, *([] if options.output is None else [f"output={quoted(options.output)}"])]
