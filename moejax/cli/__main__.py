"""Runs the command line as `python -m moejax.cli`."""

import sys

from ._app import main

if __name__ == "__main__":
    sys.exit(main())
