"""The command of export."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, path, refuse
from mohawk.export.targets import TARGETS


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN", help="a run's folder, or a student's")
    parser.add_argument(
        "--to",
        choices=tuple(TARGETS),
        help="; ".join(f"{name}: {target.text}" for name, target in TARGETS.items()),
    )
    parser.add_argument(
        "--list", action="store_true", help="write nothing; say which --to and which runtimes it can have, and why not"
    )
    parser.add_argument("--output", type=path, metavar="DIR", help="default: RUN/export/bamba, or what --to names")
    parser.add_argument(
        "--pad-expand", action="store_true", help="pad mixers with zeros to twice the width (llama.cpp)"
    )
    parser.add_argument(
        "--fold-bias", action="store_true", help="move in_proj's biases on x, B, C behind the convolution"
    )
    parser.add_argument(
        "--outtype",
        choices=[name for target in TARGETS.values() for name in target.outtypes],
        help="of the matrices in a GGUF file: float32 (default), bfloat16, or 8 bits and a scale for every 32 weights",
    )


def _export(options: argparse.Namespace) -> None:
    if options.list:
        asked = {
            name: getattr(options, name) or None for name in ("to", "output", "pad_expand", "fold_bias", "outtype")
        }
        refuse(asked, "an export; --list writes none")
        from rich.console import Console

        from mohawk.export.listing import print_choices

        print_choices(options.model, Console())
        return
    from mohawk.export.run import export

    to = options.to or "bamba"
    asked = {name: getattr(options, name) for name in ("pad_expand", "fold_bias", "outtype")}
    export(options.model, to, options.output, **asked)


COMMANDS = [
    Command("export", "write a student that runs where mohawk is not installed, and check it", _add_export, _export),
]
