"""What a command is, and the kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawk.core.places import home
from mohawk.errors import UserError, shortened


@dataclass(frozen=True)
class Command:
    """A command of `mohawk`.

    name, text: as `mohawk --help` shows them. add: gives its parser the arguments. run: does it, with what was parsed;
    what is heavy is imported there. resumes: stopped, the same command goes on from what was saved. together: several
    processes (torchrun, accelerate launch) do it together.
    """

    name: str
    text: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    resumes: bool = False
    together: bool = False


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def refuse(given: dict[str, object], of: str) -> None:
    """Options that only mean something beside another one."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} is of {of}")


def path(text: str) -> Path:
    """An argparse type: a path in which `~` is the home folder, as in `--output=~/run`, which shells leave alone."""
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty path; allowed: a file or a folder")
    try:
        return home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


MOST = 10**15  # of a whole number that has no bound of its own, as in recipes


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type that also checks the range; a whole number is at most MOST."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        over = kind is int and value is not None and value > MOST
        if value is None or not low <= value <= high or value == float("inf") or over:
            words = "a whole number" if kind is int else "a number"
            most = min(high, MOST) if over else high
            upto = f"from {low} to {most}" if most != float("inf") else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"got {shortened(repr(text), 60)}; allowed: {words} {upto}")
        return value

    return parse
