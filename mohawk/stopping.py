"""Ctrl-C and SIGTERM ask a phase to save and stop, instead of stopping it; elsewhere SIGTERM stops as Ctrl-C does."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Within this many seconds of the first, another signal is the same one: `timeout` delivers it once to the
# process and once to its group, and so do a terminal and torchrun together.
SAME_SIGNAL = 0.5
SAME_SIGNAL_DISTRIBUTED = 5.0

SAYING = b"\nsaving a checkpoint after this step, then stopping; once more stops at once\n"


class StopRequest:
    """`number` is the signal that came while `caught()` was active, or None."""

    def __init__(self, same_signal: float = SAME_SIGNAL, says: bool = True):
        self.number: int | None = None
        self.same_signal, self.says = same_signal, says

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within the block SIGINT and SIGTERM set `number`; a second one does what it did before the block.

        Afterwards the old handlers are back. Outside the main thread, where Python takes no handlers, nothing
        changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old: dict[int, Any] = {}
        first = 0.0

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

        def handle(number: int, frame: Any) -> None:
            nonlocal first
            if self.number is None:
                self.number, first = number, time.monotonic()
                if self.says:
                    os.write(2, SAYING)  # not through logging: the signal may have come in the middle of its writing
            elif time.monotonic() - first > self.same_signal:
                restore()
                signal.raise_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            restore()


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that half-written folders are removed.

    Another one meanwhile stops at once. Afterwards the old handler is back. Outside the main thread, where Python takes
    no handlers, and where SIGTERM is ignored, nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    first: float | None = None

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - first > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
