"""The commands of conversion."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, number, path
from mohawk.core.extras import need
from mohawk.schema.arguments import add_run, add_set, overrides


def _convert(options: argparse.Namespace) -> None:
    from mohawk.conversion.recipe import Recipe

    recipe = Recipe.load(options.recipe, overrides(options))

    need("convert", "`mohawk convert`")
    from mohawk.conversion.run import convert

    convert(recipe, dry_run=options.dry_run)


def _add_select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=path, metavar="RUN", help="a run's folder, its phases 1 and 2 done for all layers"
    )
    add_by(parser)
    parser.add_argument(
        "--tokens", type=number(int, 2), default=2048, metavar="N", help="tokens of text to measure on; default: 2048"
    )
    parser.add_argument(
        "--lazy", action="store_true", help="measure only layers that could be next: faster, not always the same order"
    )


def _select(options: argparse.Namespace) -> None:
    need("convert", "`mohawk select`")
    from mohawk.conversion.select import select

    select(options.model, by=options.by, tokens=options.tokens, lazy=options.lazy)


def _add_compose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=path, metavar="RUN", help="a run's folder, its phases 1 and 2 done for all layers"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", metavar="B", help="attention layers (8), a share (25%%) or state bytes (40MB@4096)")
    what.add_argument(
        "--attention", type=number(int, 0), nargs="+", metavar="I", help="the attention layers, without a ranking"
    )
    add_by(parser)
    parser.add_argument("--output", type=path, metavar="DIR", help="the new run; default: RUN-N-attention")
    add_set(parser)


def _compose(options: argparse.Namespace) -> None:
    need("convert", "`mohawk compose`")
    from mohawk.conversion.compose import compose

    chosen = {name: getattr(options, name) for name in ("budget", "attention", "by", "output")}
    compose(options.model, **chosen, overrides=options.set)


def add_by(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--by", choices=("kl", "recall", "both", "alone"), default="kl", help="how layers are ranked; default: kl"
    )


COMMANDS = [
    Command(
        "convert",
        "convert a checkpoint by a recipe, or go on with a stopped run",
        add_run,
        _convert,
        resumes=True,
        together=True,
    ),
    Command(
        "select", "rank a run's layers by what it costs to replace their attention", _add_select, _select, resumes=True
    ),
    Command("compose", "assemble a student from a run with mixers in all layers, for phase 3", _add_compose, _compose),
]
