"""What a command says on stderr while it works."""

from __future__ import annotations

import logging
import sys

from mohawk.errors import printable

# `log.info(..., extra=SHOWN)`: the user waits for this, or would want to know of it while the command runs
SHOWN = {"shown": True}


class Terminal(logging.Handler):
    """Log lines on stderr, above a progress bar if there is one: warnings, and lines that are marked `SHOWN`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or getattr(record, "shown", False)

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


def log_to_stderr() -> None:
    """Print the log lines of this package that are warnings, or are marked `SHOWN`, on stderr."""
    logger = logging.getLogger("mohawk")
    if not any(isinstance(handler, Terminal) for handler in logger.handlers):
        logger.addHandler(Terminal())
    logger.setLevel(logging.INFO)
