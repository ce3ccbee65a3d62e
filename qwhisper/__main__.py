"""`python -m qwhisper` is `qwhisper`."""

import sys

from qwhisper.cli import main

if __name__ == "__main__":
    sys.exit(main())
