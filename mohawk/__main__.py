"""`python -m mohawk` and the installed command: a Ctrl-C from its first import on, or at the very end, is one line too.

What is imported before `main` is what Python itself has by then, so that no moment is left between the two.
"""

import os
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        code = _command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    finally:
        # all is done: a Ctrl-C while Python takes itself down ends it there, without a word
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if code and "LOCAL_RANK" in os.environ:
        # of a run in several processes: what torch leaves open waits for a process that may answer no more
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return code


def _command() -> int:
    if not hasattr(sys.modules["mohawk"], "__version__"):
        # The package registry's `mohawk`, an HTTP authentication library, has put its __init__.py where ours was, or
        # taken ours along when it was uninstalled.
        print(
            f"error: mohawk in {os.path.dirname(os.path.abspath(__file__))} is damaged: another project's package that "
            "is also called mohawk was installed over it or uninstalled; run: pip uninstall mohawk, then install "
            "mohawk-distill again (pip install --force-reinstall --no-deps . in its checkout)",
            file=sys.stderr,
        )
        return 2
    _open_closed_streams()
    import faulthandler

    # what ends the process from below, as a read of a mapped file that a disk has lost (SIGBUS) does, says where it was
    faulthandler.enable()
    from mohawk.cli import main as command

    return command()


def _open_closed_streams() -> None:
    """Standard streams that were closed before we began (`>&-`) go nowhere; else the next file that is opened would
    take a stream's number, and what is printed would go into it."""
    for handle, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != handle:
                os.dup2(opened, handle)
                os.close(opened)
            setattr(sys, name, open(handle, "w" if handle else "r", encoding="utf-8", closefd=False))


if __name__ == "__main__":
    sys.exit(main())
