"""`python -m mohawk` and the installed command: a Ctrl-C among the imports, or at the very end, is one line too."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from mohawk.cli import main as command

        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    finally:
        # all is done: a Ctrl-C while Python takes itself down ends it there, without a word
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if code and "LOCAL_RANK" in os.environ:
        # of a run in several processes: what torch leaves open waits for a process that may answer no more
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
