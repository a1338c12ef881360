"""The commands of inspection."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, number, path, refuse
from mohawk.core.run_folder import has_recipe


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, run, .gguf file or hub id")
    parser.add_argument(
        "--contexts",
        type=number(int, 1),
        nargs="+",
        default=[512, 4096],
        metavar="N",
        help="default: 512 4096",
    )
    drawing = parser.add_argument_group("mixing matrices")
    drawing.add_argument(
        "--matrices",
        metavar="TEXT",
        help="draw every head's mixing matrix on this text file (- for standard input), student beside teacher",
    )
    drawing.add_argument("--teacher", metavar="MODEL", help="to compare with (default: the run's)")
    drawing.add_argument(
        "--output", type=path, metavar="DIR", help="default: plots/matrices in the run, else ./matrices"
    )
    drawing.add_argument("--layers", type=number(int, 0), nargs="+", metavar="I", help="only these")
    drawing.add_argument(
        "--tokens", type=number(int, 2), metavar="N", help="at most, from the text's beginning; default: 256"
    )
    drawing.add_argument(
        "--rows", type=number(int, 0), nargs=2, metavar=("A", "B"), help="only rows A to B - 1, of a long text"
    )


def _inspect(options: argparse.Namespace) -> None:
    drawing = {name: getattr(options, name) for name in ("teacher", "output", "layers", "tokens", "rows")}
    if options.matrices is not None:
        from mohawk.inspection.pictures import inspect_matrices

        inspect_matrices(options.model, options.matrices, **drawing)
        return
    refuse(drawing, "--matrices TEXT; give a text, or leave it out")
    from rich.console import Console

    from mohawk.core.places import home
    from mohawk.inspection.status import print_run
    from mohawk.loading.describe import describe, print_description, student_folder

    console = Console()
    folder = home(options.model)
    if has_recipe(folder):
        print_run(folder, console)
    print_description(describe(student_folder(options.model)), options.contexts, console)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=path, metavar="RUN|CACHE", help="a run's folder, a teacher's cache, cached text")


def _verify(options: argparse.Namespace) -> None:
    from mohawk.inspection.verify import verify

    verify(options.path)


def _doctor(options: argparse.Namespace) -> None:
    from mohawk.inspection.doctor import doctor

    doctor()


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


COMMANDS = [
    Command(
        "inspect", "print a model's layers, mixers and state sizes, or draw its mixing matrices", _add_inspect, _inspect
    ),
    Command("verify", "hash all of a run or a cache again and compare it with what was written", _add_verify, _verify),
    Command(
        "doctor",
        "print versions, devices and which backend each operation will use, and why",
        _no_arguments,
        _doctor,
    ),
]
