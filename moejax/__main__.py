"""Runs the command line as `python -m moejax`."""

from moejax.cli import run

if __name__ == "__main__":
    run()
