"""The command of pruning."""

from __future__ import annotations

import argparse

from mohawk.conversion.commands import add_hardware, hardware_asked, hardware_of
from mohawk.core.command import Command
from mohawk.core.extras import need
from mohawk.schema.arguments import add_run, overrides


def _add_prune(parser: argparse.ArgumentParser) -> None:
    add_run(parser, plan="print the plan and the sizes and exit")
    add_hardware(parser)


def _prune(options: argparse.Namespace) -> None:
    from mohawk.pruning.recipe import PruneRecipe
    from mohawk.schema.base import placed

    recipe = PruneRecipe.load(options.recipe, overrides(options))
    planned = hardware_asked(options)

    need("convert", "`mohawk prune`")
    from mohawk.pruning.run import prune

    with placed(options.recipe, overrides(options)):
        prune(recipe, dry_run=options.dry_run, hardware=hardware_of(planned))


COMMANDS = [
    Command(
        "prune",
        "cut a checkpoint smaller and heal it by a recipe, or go on with a stopped run",
        _add_prune,
        _prune,
        resumes=True,
        together=True,
    ),
]
