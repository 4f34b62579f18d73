"""What the program says while it works: on stderr, so that stdout stays data."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]
"""Called as `progress(num_done, num_all, label)`, as often as the work likes."""


@contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """A bar while the block runs; nothing at all where stderr is not a terminal.

    Args:
      title: What is being done, e.g. `measuring`.

    Yields:
      A function that moves the bar.
    """
    if not sys.stderr.isatty():
        yield lambda num_done, num_all, label: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, rate="")

        def advance(num_done: int, num_all: int, label: str) -> None:
            description = f"{title}: {label}" if label else title
            bar.update(task, completed=num_done, total=num_all, description=description)
            speed = bar.tasks[task].speed
            if speed:
                bar.update(task, rate=f"{speed:.3g}/s")

        yield advance


def say(text: str) -> None:
    """Prints a line for the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)
