"""The commands of conversion."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.core.command import Command, given, number, path, refuse
from mohawk.core.extras import need
from mohawk.errors import UserError
from mohawk.schema.arguments import add_run, add_set, overrides

if TYPE_CHECKING:
    from mohawk.conversion.footprint import Hardware

# What --dry-run plans for where nothing else is said: an H100
DEVICE_MEMORY, PEAK, UTILISATION = 80 * 10**9, 989.0, 0.4


def _convert(options: argparse.Namespace) -> None:
    from mohawk.conversion.recipe import Recipe
    from mohawk.schema.base import placed

    recipe = Recipe.load(options.recipe, overrides(options))
    planned = hardware_asked(options)

    need("convert", "`mohawk convert`")
    from mohawk.conversion.run import convert

    with placed(options.recipe, overrides(options)):
        convert(recipe, dry_run=options.dry_run, hardware=hardware_of(planned))


def hardware_asked(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_hardware` say, those that were given. Raises UserError without --dry-run."""
    asked = given(options, "processes", "device_memory", "peak", "utilisation")
    if asked and not options.dry_run:
        refuse(asked, "--dry-run")
    return asked


def hardware_of(asked: dict[str, Any]) -> Hardware | None:
    """The hardware that a plan is for; None: what there is."""
    from mohawk.conversion.footprint import Hardware

    if not asked:
        return None
    flops, share = asked.get("peak", PEAK), asked.get("utilisation", UTILISATION)
    return Hardware(asked.get("processes", 1), asked.get("device_memory", DEVICE_MEMORY), 1e12 * flops, share)


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Options of a run's command that make its dry run a plan for other hardware."""
    plan = parser.add_argument_group("with --dry-run, a plan for other hardware, in bfloat16")
    plan.add_argument("--processes", type=number(int, 1, 2**20), metavar="N", help="how many devices; default: 1")
    plan.add_argument(
        "--device-memory", type=_memory, metavar="BYTES", help="of one, such as 80GB or 24GiB; default: 80GB"
    )
    plan.add_argument(
        "--peak",
        type=number(float, 1e-3, 1e6),
        metavar="TFLOPS",
        help="of one, dense bfloat16; default: 989, an H100's",
    )
    plan.add_argument(
        "--utilisation", type=number(float, 0.001, 1), metavar="SHARE", help="of the peak that is reached; default: 0.4"
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_hardware(parser)


def _memory(text: str) -> int:
    """An argparse type: bytes with a unit."""
    units = {"MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|MiB|GiB)", text.strip())
    size = 0.0 if found is None else float(found[1]) * units[found[2]]
    if not 1 <= size < 2**60:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number with MB, GB, MiB or GiB, such as 80GB")
    return int(size)


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
    parser.add_argument(
        "--interval",
        type=number(int, 2),
        nargs="+",
        metavar="N",
        help="no ranking: measure attention at every N-th layer, as some runtimes ask for",
    )


def _select(options: argparse.Namespace) -> None:
    need("convert", "`mohawk select`")
    if options.interval is not None:
        if options.lazy or options.by != "kl":
            raise UserError("--by and --lazy are of a ranking, layer by layer; --interval measures whole patterns")
        from mohawk.conversion.patterns import measure_intervals

        measure_intervals(options.model, options.interval, tokens=options.tokens)
        return
    from mohawk.conversion.select import select

    select(options.model, by=options.by, tokens=options.tokens, lazy=options.lazy)


def _add_compose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=path, metavar="RUN", help="a run's folder, its phases 1 and 2 done for all layers"
    )
    parser.add_argument(
        "--mixers-of",
        action="append",
        nargs="+",
        default=[],
        metavar=("RUN", "I"),
        help="another run of the same teacher, and the layers whose mixers come from it; no layers: in each layer the "
        "mixer that alone leaves the least KL, by `mohawk select` in each run",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", metavar="B", help="attention layers (8), a share (25%%) or state bytes (40MB@4096)")
    what.add_argument(
        "--attention",
        type=number(int, 0),
        nargs="*",
        metavar="I",
        help="the attention layers, without a ranking; none: a mixer wherever there is one",
    )
    what.add_argument(
        "--interval", type=number(int, 2), metavar="N", help="attention at every N-th layer, as some runtimes ask for"
    )
    add_by(parser)
    parser.add_argument("--output", type=path, metavar="DIR", help="the new run; default: RUN-N-attention")
    add_set(parser)


def _compose(options: argparse.Namespace) -> None:
    need("convert", "`mohawk compose`")
    from mohawk.conversion.compose import compose

    chosen = {name: getattr(options, name) for name in ("budget", "attention", "interval", "by", "output")}
    compose(
        options.model,
        **chosen,
        mixers_of=[_run_and_layers(*given) for given in options.mixers_of],
        overrides=options.set,
    )


def _run_and_layers(run: str, *layers: str) -> tuple[Path, list[int]]:
    """What one --mixers-of says. Raises UserError."""
    try:
        return path(run), [int(number(int, 0)(layer)) for layer in layers]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--mixers-of: {error}") from error


def add_by(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--by", choices=("kl", "recall", "both", "alone"), default="kl", help="how layers are ranked; default: kl"
    )


COMMANDS = [
    Command(
        "convert",
        "convert a checkpoint by a recipe, or go on with a stopped run",
        _add_convert,
        _convert,
        resumes=True,
        together=True,
    ),
    Command(
        "select", "rank a run's layers by what it costs to replace their attention", _add_select, _select, resumes=True
    ),
    Command("compose", "assemble a student from a run with mixers in all layers, for phase 3", _add_compose, _compose),
]
