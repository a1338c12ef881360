"""The command of schema."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, path, refuse


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the recipe to copy")
    parser.add_argument("--output", type=path, metavar="FILE", help="a new file; default: NAME.yaml")


def _recipes(options: argparse.Namespace) -> None:
    from mohawk.schema.kinds import copy_shipped, print_shipped

    if options.name is not None:
        copy_shipped(options.name, options.output)
        return
    refuse({"output": options.output}, "a NAME; name a recipe, or leave it out")
    print_shipped()


COMMANDS = [
    Command("recipes", "list the recipes that come along, or copy one to change it", _add_recipes, _recipes),
]
