"""Writing a report beside the results it tells of."""

import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.errors import BadFileError, UsageError
from moejax.results import read_json, write_bytes, write_text

from ._constraints import Constraint
from ._data import NotDrawnError, load_data
from ._markdown import report_markdown
from ._money import check_prices
from ._places import PLAN_FILE, RESULTS_FILE
from .figures import FIGURES, STYLE
from .page import page_html

PAGES = ("report.md", "report.html")
PNG_DOTS_PER_INCH = 200

_TO_DRAWING = re.compile(r"\s*\(\[SVG]\(figures/[^)]*\)\)")

Progress = Callable[[int, int, str], None]


def write_report(
    folder: Path,
    *,
    constraints: tuple[Constraint, ...] = (),
    prices_usd: Mapping[str, float] = MappingProxyType({}),
    progress: Progress | None = None,
) -> Path:
    """Writes `figures/`, `report.md` and `report.html` into the folder of a bench run.

    Figures come first and the text last, each whole or not at all, so that the text never names
    a figure that is not there. `report.html` is the same text as one file that needs no other.
    The same `results.json` gives the same bytes.

    Args:
      folder: What `moejax bench --out` wrote; `plan.json` in it adds the tiers.
      constraints: What a strategy must meet to be chosen; none gives a matrix of typical ones.
      prices_usd: What cards cost, by profile; before what their profiles say.
      progress: Told how many of how many files are done, and which comes next.

    Returns:
      The path of `report.md`.

    Raises:
      BadFileError: `results.json` or `plan.json` is missing, damaged or inconsistent.
      UsageError: The folder cannot be written to, or a price is that of a card not in the run.
    """
    folder = Path(folder)
    data = dataclasses.replace(load_data(folder), constraints=constraints, prices_usd=prices_usd)
    check_prices(data)
    drawn: list[str] = []
    not_drawn: dict[str, str] = {}
    for index, (name, draw) in enumerate(FIGURES.items()):
        if progress is not None:
            progress(index, len(FIGURES) + len(PAGES), name)
        base = folder / "figures" / name
        try:
            with style.context(dict(STYLE), after_reset=True):
                _save(draw(data), base)
            drawn.append(name)
        except NotDrawnError as reason:
            not_drawn[name] = str(reason)
            _remove(base)
    text = report_markdown(data, drawn, not_drawn)
    page = _page(folder, text, drawn)
    path = write_text(folder / PAGES[0], text)
    write_text(folder / PAGES[1], page)
    if progress is not None:
        progress(len(FIGURES) + len(PAGES), len(FIGURES) + len(PAGES), PAGES[1])
    return path


def write_page(folder: Path) -> Path:
    """Writes `report.html` from the `report.md` and the figures that lie in a folder.

    For the reports that scripts write. The same files give the same bytes.

    Args:
      folder: Holds `report.md`; every PNG in its `figures/` that has an SVG beside it is shown.

    Returns:
      The path of `report.html`.

    Raises:
      BadFileError: `report.md` cannot be read, or leads to a record that is not there.
      UsageError: The folder cannot be written to.
    """
    return write_text(folder / PAGES[1], page_of(folder))


def page_of(folder: Path) -> str:
    """What `write_page` writes."""
    path = folder / PAGES[0]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(
            f"{path} cannot be read: {error}", "Write it first, by the script that makes it."
        ) from error
    drawn = sorted(one.stem for one in (folder / "figures").glob("*.svg"))
    # The drawing itself is in the page.
    return _page(folder, _TO_DRAWING.sub("", text), drawn)


def _page(folder: Path, text: str, drawn: Sequence[str]) -> str:
    drawings = {name: folder / "figures" / f"{name}.svg" for name in drawn}
    images = {
        f"figures/{name}.png": path.read_text(encoding="utf-8") for name, path in drawings.items()
    }
    files = [name for name in (RESULTS_FILE, PLAN_FILE) if (folder / name).is_file()]
    try:
        return page_html(text, images, {name: read_json(folder / name) for name in files})
    except (LookupError, ValueError) as error:
        raise BadFileError(
            f"{folder / RESULTS_FILE} names a place that is not in it: {error}",
            "Run `moejax bench` again to make a new one.",
        ) from error


def _save(figure: Figure, base: Path) -> None:
    FigureCanvasAgg(figure)
    # Neither date nor version: the bytes depend on the data only.
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    for kind, words in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=words)
        write_bytes(base.with_suffix(f".{kind}"), buffer.getvalue())


def _remove(base: Path) -> None:
    """Takes away what an earlier report drew, so that no old figure is taken for a new one."""
    for kind in ("png", "svg"):
        path = base.with_suffix(f".{kind}")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be removed: {error.strerror or error}",
                "It is from an earlier report; make the folder writable or name another one.",
            ) from error
