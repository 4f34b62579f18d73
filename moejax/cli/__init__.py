"""The command line: one file a command; whatever is slow to import is imported inside it."""

from ._app import main as main
from ._app import run as run
