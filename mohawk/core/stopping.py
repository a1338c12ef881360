"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask a phase to save and stop; elsewhere all of them stop as Ctrl-C does.

SIGTERM comes from `kill` and from batch systems, SIGHUP from a terminal or a connection that is closed, SIGUSR1 from
`#SBATCH --signal=USR1@300`, so many seconds before a job's time is up. One that the caller ignores, as nohup does with
SIGHUP, stays ignored.
"""

import _thread
import errno
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Within this many seconds of the first, another signal is the same one: `timeout` delivers it once to the
# process and once to its group, and so do a terminal and torchrun together.
SAME_SIGNAL = 0.5
SAME_SIGNAL_DISTRIBUTED = 5.0

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SAYING = b"\nsaving a checkpoint after this step, then stopping; once more stops at once\n"


class StopRequest:
    """`number` is the signal that came while `caught()` was active, or None."""

    def __init__(self, same_signal: float = SAME_SIGNAL, says: bool = True):
        self.number: int | None = None
        self.same_signal, self.says = same_signal, says

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within the block a signal of STOPPING sets `number`; a second one does what it did before the block.

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
                leave_dead_terminal()
                if self.says:
                    # not through logging: the signal may have come in the middle of its writing
                    _say(SAYING)
            elif time.monotonic() - first > self.same_signal:
                restore()
                signal.raise_signal(number)

        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                old[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            restore()


@contextmanager
def cleaning_up() -> Iterator[StopRequest]:
    """Within the block a signal of STOPPING raises KeyboardInterrupt, so that half-written folders are removed.

    It also sets `number` of what is yielded. Another one meanwhile stops at once. Where a library swallows the
    exception (in a callback from C), it is raised again. Afterwards the old handlers are back. Outside the main thread,
    where Python takes no handlers, and where someone else handles a signal or ignores it, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    first = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if request.number is None:
            request.number, first = number, time.monotonic()
            leave_dead_terminal()
            raise KeyboardInterrupt
        if time.monotonic() - first > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def unraisable(swallowed: Any) -> None:
        if not issubclass(swallowed.exc_type, KeyboardInterrupt):
            old_hook(swallowed)
            return
        request.number = None  # a moment later, and anew
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    old = {n: h for n in STOPPING if (h := signal.getsignal(n)) in (signal.SIG_DFL, signal.default_int_handler)}
    for number in old:
        signal.signal(number, handle)
    old_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield request
    finally:
        sys.unraisablehook = old_hook
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_with_parent() -> None:
    """From here on the end of the process that started this one is a SIGTERM, where the kernel can tell (Linux).

    torchrun dies of a signal that it does not hand on, such as SIGUSR1, and leaves its workers behind, at work; so does
    accelerate launch, of any, where it has started one process.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def leave_dead_terminal() -> None:
    """Where the terminal is gone, what is printed goes nowhere, instead of ending the program while it saves."""
    for handle in (1, 2):
        try:
            gone = stat.S_ISCHR(os.fstat(handle).st_mode) and _is_hung_up(handle)
        except OSError:
            continue  # closed
        if gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def _is_hung_up(handle: int) -> bool:
    try:
        os.tcgetpgrp(handle)
    except OSError as error:
        return error.errno == errno.EIO  # ENOTTY: another device, such as /dev/null
    return False


def _say(text: bytes) -> None:
    try:
        os.write(2, text)
    except OSError:  # a closed stderr or a full disk: the saving matters more
        return
