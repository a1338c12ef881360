"""The `mohawk` command line: gathers the commands of all folders, and turns errors into lines and exit codes.

Exit codes: 0 done, 1 a bug (with its traceback), 2 a mistake in what the user gave, or a machine that refuses (a full
disk, too little memory), 3 what is watched is not as it should be, 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

import mohawk
from mohawk.core.command import Command
from mohawk.core.extras import explain
from mohawk.core.stopping import cleaning_up
from mohawk.core.terminal import log_to_stderr
from mohawk.errors import Alarm, SaidElsewhere, UserError, line_for, printable, shortened
from mohawk.launchers import hear_mpi

# Each has a `commands` module. What is heavy is imported by the command that needs it.
FOLDERS = (
    "demo",
    "conversion",
    "distillation",
    "pruning",
    "evaluation",
    "generation",
    "export",
    "quantization",
    "inspection",
    "schema",
)
# Progress bars of the libraries below us: where stderr is no terminal, they would fill a log.
BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = None
    try:
        with cleaning_up() as interrupted, _bars_in_terminals_alone():
            try:
                hear_mpi()
                grammar = parser()
                options = grammar.parse_args(argv)
                _check_texts(grammar, options)
                log_to_stderr()
                # torch's; we say what is missing ourselves
                warnings.filterwarnings("ignore", "Failed to initialize NumPy")
                if _processes() > 1:
                    _run_together(options)
                else:
                    options.command.run(options)
                sys.stdout.flush()
            except Exception:
                # what a library makes of a Ctrl-C in the middle of its work is one too
                if interrupted.number is not None:
                    raise KeyboardInterrupt from None
                raise
    except SaidElsewhere:
        return 2
    except UserError as error:
        return _mistake(str(error))
    except Alarm as alarm:
        _say(*(f"alarm: {_line(line)}" for line in str(alarm).splitlines()))
        return 3
    except ImportError as error:
        if options is None or (line := explain(error, f"`mohawk {options.command.name}`")) is None:
            raise
        return _mistake(line)
    except KeyboardInterrupt:
        if _rank() > 0:
            return 130
        resumed = options is not None and options.command.resumes
        _say("stopped" + "; the same command goes on from what was saved" * resumed)
        return 130
    except BrokenPipeError:
        # Whoever read our output has closed it (`| head`); Python would complain again when it exits.
        _drop_output(sys.stdout)
        return 1
    except Exception as error:
        from mohawk.core.folders import Interrupted

        if isinstance(error, Interrupted):
            if _rank() == 0:
                again = f"; to go on: mohawk {shlex.join(argv)}" if _processes() == 1 else ""
                _say(f"{error}{again}{_requeue_hint()}")
            return 130
        line = line_for(error)
        if line is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # that was the file
            _drop_output(sys.stdout)
        return _mistake(line)
    return 0


@contextmanager
def _bars_in_terminals_alone() -> Iterator[None]:
    """Within the block bars are only drawn where somebody sees them move; what the user set stays as it is."""
    ours = [] if sys.stderr.isatty() else [name for name in BARS if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "1"))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _mistake(text: str) -> int:
    _say(*(f"error: {_line(line)}" for line in text.splitlines()))
    return 2


def _say(*lines: str) -> None:
    """Lines on stderr; where that is full or gone, the exit code says enough."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        _drop_output(sys.stderr)


def _line(text: str) -> str:
    """An error's text as it is shown: what it quotes of others may be of any length."""
    return printable(shortened(re.sub(r"\S{300,}", lambda found: shortened(found[0]), text), 2000))


def _drop_output(stream: TextIO) -> None:
    """What a stream still holds goes nowhere: Python would try again to write it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _requeue_hint() -> str:
    """What a batch system's user does next."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"; under Slurm: scontrol requeue {job}, or submit the job again" if job else ""


def _processes() -> int:
    """How many torchrun, accelerate launch or mpirun started of us."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if _processes() > 1 else 0


def _run_together(options: argparse.Namespace) -> None:
    """A command in several processes, of which the first one speaks."""
    from mohawk.core.processes import joined, leave

    with joined():
        if not options.command.together:
            able = [command.name for command in commands().values() if command.together]
            raise UserError(f"only {', '.join(able[:-1])} and {able[-1]} run in several processes; start one")
        options.command.run(options)
    leave()


class _Parser(argparse.ArgumentParser):
    """Keeps what it quotes of an argument short."""

    def error(self, message: str) -> NoReturn:
        super().error(_line(message))


def _check_texts(top: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """UserError for a text argument with a byte that is not UTF-8, which no tokenizer takes; a file's name may have."""
    subparsers = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    for action in subparsers.choices[options.command.name]._actions:
        value = getattr(options, action.dest, None)
        if action.metavar in ("MODEL", "DIR", "FILE", "SOURCE", "RUN", "RECIPE"):
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (odd := re.search("[\ud800-\udfff]", text)):
                raise UserError(
                    f"{action.option_strings[0] if action.option_strings else action.metavar or action.dest}: holds "
                    f"{printable(odd[0])}, a byte that is not UTF-8; give the text as UTF-8 (see the terminal's locale)"
                )


def commands() -> dict[str, Command]:
    """Every command by its name, in the order of `mohawk --help`. ValueError where two folders have one of a name."""
    found: dict[str, Command] = {}
    owners: dict[str, str] = {}
    for folder in FOLDERS:
        for command in importlib.import_module(f"mohawk.{folder}.commands").COMMANDS:
            if command.name in found:
                raise ValueError(
                    f"mohawk/{folder}/commands.py: a command {command.name!r} is in mohawk/{owners[command.name]} too"
                )
            found[command.name], owners[command.name] = command, folder
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(
        prog="mohawk",
        description="Turn a Transformer checkpoint into a hybrid of attention and Mamba-2, Gated DeltaNet or "
        "Kimi Delta layers.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"mohawk {mohawk.__version__}")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    for command in commands().values():
        sub = subparsers.add_parser(command.name, help=command.text, description=command.text, allow_abbrev=False)
        command.add(sub)
        sub.set_defaults(command=command)
    return top
