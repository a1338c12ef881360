"""The commands of distillation."""

from __future__ import annotations

import argparse

from mohawk.conversion.commands import add_hardware, hardware_asked, hardware_of
from mohawk.core.command import Command, number, path
from mohawk.core.extras import need
from mohawk.errors import UserError
from mohawk.generation.arguments import add_requests
from mohawk.schema.arguments import add_run, add_set, overrides

ENDPOINT_K = 20  # tokens that a server says of each place without having been told otherwise (vLLM)


def _add_distill(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_hardware(parser)


def _distill(options: argparse.Namespace) -> None:
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.schema.base import placed

    recipe = DistillRecipe.load(options.recipe, overrides(options))
    planned = hardware_asked(options)

    need("lora" if recipe.has_adapter() else "convert", "`mohawk distill`")
    from mohawk.distillation.run import distill

    with placed(options.recipe, overrides(options)):
        distill(recipe, dry_run=options.dry_run, hardware=hardware_of(planned))


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, metavar="RECIPE", help="a YAML file for distill or convert")
    parser.add_argument(
        "--over", action="append", required=True, metavar="KEY=V,V,...",
        help="values to vary, such as temperature=1,2,4; may be repeated: each with all others",
    )  # fmt: skip
    parser.add_argument("--output", type=path, metavar="DIR", help="folder of the runs; default: runs/NAME-ablation")
    add_set(parser)


def _ablate(options: argparse.Namespace) -> None:
    need("convert", "`mohawk ablate`")
    from mohawk.distillation.ablate import ablate

    ablate(options.recipe, options.over, options.set, options.output)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, metavar="RECIPE", help="a YAML file: of a conversion or a distillation")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="the cache; the same command goes on")
    parser.add_argument(
        "--kind",
        choices=("top-k", "samples", "hidden"),
        default="top-k",
        help="k most probable tokens and the rest's mass (default), random tokens, or hidden states and the head",
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="stage of a distillation; default: the first that learns from the teacher"
    )
    parser.add_argument(
        "--k",
        type=number(int, 1),
        metavar="K",
        help="tokens kept of each position (top-k); default: 64, of --endpoint 20",
    )
    parser.add_argument(
        "--draws", type=number(int, 1), metavar="N", help="tokens drawn for each position (samples); default: 12"
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 1e-3, 1e3),
        metavar="T",
        help="of the teacher (top-k and samples); default: the stage's",
    )
    parser.add_argument(
        "--sequence-length", type=number(int, 2), metavar="N", help="tokens in a row; default: the stage's"
    )
    parser.add_argument(
        "--tokens", type=number(int, 1), metavar="N", help="stop after so many tokens; default: one pass over the text"
    )
    parser.add_argument("--batch-size", type=number(int, 1), metavar="N", help="rows at once; default: the stage's")
    remote = parser.add_argument_group(
        "a server that says how likely a text's tokens are, instead of loading the teacher"
    )
    remote.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    remote.add_argument(
        "--model", metavar="NAME", help="the server's name of the teacher; default: the recipe's teacher"
    )
    remote.add_argument("--key-env", metavar="NAME", help="environment variable with the key; default: OPENAI_API_KEY")
    add_requests(remote)
    add_set(parser)


def _cache(options: argparse.Namespace) -> None:
    kinds = {"k": "top-k", "draws": "samples"}
    for name, kind in kinds.items():
        if getattr(options, name) is not None and options.kind != kind:
            raise UserError(f"--{name} is of --kind {kind}, not of {options.kind}; leave it out")
    if options.temperature is not None and options.kind == "hidden":
        raise UserError("--temperature is of --kind top-k and samples: hidden states serve any; leave it out")
    names = ("stage", "temperature", "sequence_length", "tokens", "batch_size", *kinds)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    asked = ("model", "key_env", "concurrency", "timeout", "retries", "request")
    remote = {name: value for name in asked if (value := getattr(options, name)) is not None}
    if options.endpoint is None and remote:
        raise UserError(f"--{next(iter(remote)).replace('_', '-')} is of --endpoint URL; give one, or leave it out")
    if options.endpoint is not None:
        if options.kind != "top-k":
            raise UserError(f"--kind {options.kind} needs the teacher itself; leave it out with --endpoint")
        if options.batch_size is not None:
            raise UserError("--batch-size is of a teacher that is loaded; with --endpoint give --concurrency")
        given["k"] = given.get("k", ENDPOINT_K)
        given["endpoint"] = {"url": options.endpoint, **remote}
    from mohawk.schema.kinds import kind_of

    recipe = kind_of(options.recipe).load(options.recipe, options.set)
    need("convert", "`mohawk cache`")
    from mohawk.distillation.cache import cache_teacher

    cache_teacher(recipe, options.output, kind=options.kind, **given)


COMMANDS = [
    Command(
        "distill",
        "distil a teacher into a student by a recipe, or go on with a stopped run",
        _add_distill,
        _distill,
        resumes=True,
        together=True,
    ),
    Command("ablate", "run a recipe with values varied, and compare", _add_ablate, _ablate, resumes=True),
    Command(
        "cache",
        "keep what a recipe's teacher says of its text, to train many students without it",
        _add_cache,
        _cache,
        resumes=True,
        together=True,
    ),
]
