"""What a command says on stderr while it works."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TextIO

from mohawk.errors import printable

# `log.info(..., extra=SHOWN)`: the user waits for this, or would want to know of it while the command runs
SHOWN = {"shown": True}
PLAIN_SECONDS = 15.0  # between plain lines, where there is no terminal for a bar
FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"


class Terminal(logging.Handler):
    """Log lines on stderr, above a progress bar if there is one: warnings, and lines that are marked `SHOWN`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or getattr(record, "shown", False)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with suppress(OSError):  # as `say` does
                tqdm.write(text, file=sys.stderr)
        else:
            say(text)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


def say(text: str, stream: TextIO | None = None) -> None:
    """A line on stderr, or on another stream of which nothing depends: where it is full or closed, work goes on."""
    with suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)


# transformers imports torchao where it is installed, which then names each of its GPU kernels that a CPU cannot load
QUIET = ("torchao", "torch.utils._pytree")


def quiet_torchao() -> None:
    """Before it is imported, by us or by transformers."""
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def log_to_stderr() -> None:
    """Print the log lines of this package that are warnings, or are marked `SHOWN`, on stderr, and not what importing
    torchao says of the machine."""
    quiet_torchao()
    logger = logging.getLogger("mohawk")
    if not any(isinstance(handler, Terminal) for handler in logger.handlers):
        logger.addHandler(Terminal())
    logger.setLevel(logging.INFO)


class Bar:
    """A bar with the time left; a plain line now and then where stderr is no terminal.

    name: in front of it. total: how many there are to do; done: of these, how many already are. at_most: the work may
    end earlier.
    """

    def __init__(self, name: str, total: int, done: int = 0, *, at_most: bool = False):
        from tqdm import tqdm

        self.name, self.total, self.at_most = name, total, "at most " * at_most
        self.done, self.worked = done, 0
        self.started = self.said_at = time.monotonic()
        plain = not sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=done, desc=name, disable=plain, dynamic_ncols=True, bar_format=FORMAT
        )  # fmt: skip

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def skip(self, count: int) -> None:
        """Count so many as there already: they took no time, so the estimate leaves them out."""
        self.done += count
        if not self.bar.disable:
            self.bar.update(count)
            self.bar.initial += count

    def add(self, count: int) -> None:
        """Count so many more as done."""
        self.done += count
        self.worked += count
        self.bar.update(count)

    def say(self, line: str, beside: str = "") -> None:
        """How far the work is: `beside` stands beside a bar; without one, `line` is printed now and then."""
        if not self.bar.disable:
            self.bar.set_postfix_str(beside, refresh=False)
        elif self.worked and time.monotonic() - self.said_at >= PLAIN_SECONDS:
            self.said_at = time.monotonic()
            left = self.bar.format_interval(self.seconds / self.worked * max(self.total - self.done, 0))
            say(f"{line}, {self.at_most}{left} left")
