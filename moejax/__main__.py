"""Runs the command line as `python -m moejax`."""

import sys

from moejax.cli import main

if __name__ == "__main__":
    sys.exit(main())
