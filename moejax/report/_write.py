"""Writing a report beside the results it tells of."""

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.errors import UsageError
from moejax.results import write_bytes, write_text

from ._constraints import Constraint
from ._data import NotDrawnError, load_data
from ._markdown import report_markdown
from ._money import check_prices
from .figures import FIGURES, STYLE

PNG_DOTS_PER_INCH = 200

Progress = Callable[[int, int, str], None]


def write_report(
    folder: Path,
    *,
    constraints: tuple[Constraint, ...] = (),
    prices_usd: Mapping[str, float] = MappingProxyType({}),
    progress: Progress | None = None,
) -> Path:
    """Writes `report.md` and `figures/` into the folder of a bench run.

    Figures come first and the text last, each whole or not at all, so that the text never names
    a figure that is not there. The same `results.json` gives the same bytes.

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
            progress(index, len(FIGURES) + 1, name)
        base = folder / "figures" / name
        try:
            with style.context(dict(STYLE), after_reset=True):
                _save(draw(data), base)
            drawn.append(name)
        except NotDrawnError as reason:
            not_drawn[name] = str(reason)
            _remove(base)
    path = write_text(folder / "report.md", report_markdown(data, drawn, not_drawn))
    if progress is not None:
        progress(len(FIGURES) + 1, len(FIGURES) + 1, "report.md")
    return path


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
