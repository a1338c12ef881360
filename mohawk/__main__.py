"""`python -m mohawk` is the `mohawk` command."""

import sys

from mohawk.cli import main

if __name__ == "__main__":
    sys.exit(main())
