"""Writes reports/outside-truth: results.json, the page and its figure.

python scripts/report_outside.py

Predicts again everything that models/hardware/measurements marks as a check, published decode
steps, and our own runs in reports/; nothing is fitted and nothing is drawn.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import outside_page
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moejax.bench.outside import (
    TARGET_RATIO,
    compare_profile,
    explain_decode,
    predict_decode,
    read_decode,
)
from moejax.cards import HARDWARE, models_dir
from moejax.errors import MoejaxError
from moejax.report._palette import FAINT, INK, look
from moejax.report.figures import STYLE
from moejax.report.figures._canvas import new_figure
from moejax.results import capture_environment, read_json, to_plain, write_json, write_text

FOLDER = models_dir().parent / "reports" / "outside-truth"
SCHEMA = "moejax.outside-truth/1"
PNG_DOTS_PER_INCH = 160

Row = dict[str, Any]


def main() -> int:
    """Predicts and writes everything anew; 0 when it is written."""
    try:
        write_json(FOLDER / "results.json", compare())
        write(FOLDER)
    except MoejaxError as error:
        print(f"error: {error.cause}\n\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {FOLDER / 'report.md'}")
    return 0


def compare() -> Row:
    """Every profile beside its checks, and every explanation of the decode steps' errors."""
    steps = read_decode()
    explanations = [
        {
            **{key: getattr(explanation, key) for key in ("name", "what", "source")},
            "sources": [found._asdict() for found in summaries],
            "predicted_s": [row.predicted_s for row in predict_decode(steps, explanation.adjust)],
        }
        for explanation, summaries in explain_decode(steps)
    ]
    results = {
        "schema": SCHEMA,
        "environment": capture_environment(),
        "target_ratio": TARGET_RATIO,
        "rigs": [rig._asdict() for rig in dict.fromkeys(step.rig for step in steps)],
        "profiles": {name: compare_profile(name) for name in HARDWARE},
        "explanations": explanations,
    }
    return to_plain(results)


def write(folder: Path) -> None:
    """Writes page and figure beside the results.json of a folder.

    Raises:
      BadFileError: There is none, or it cannot be read.
    """
    results = read_json(folder / "results.json")
    draw(results, folder / "figures")
    write_text(folder / "report.md", outside_page.page(results))


def draw(results: Row, folder: Path) -> None:
    """Writes the figure as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with style.context(dict(STYLE), after_reset=True):
        figure = decode(results)
        for kind, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            path = folder / f"decode.{kind}"
            figure.savefig(path, dpi=PNG_DOTS_PER_INCH, metadata=metadata)


def decode(results: Row) -> Figure:
    """Predicted against published step time, a panel for each source."""
    profile = results["profiles"]["rtx-3090"]
    explained = next(e for e in results["explanations"] if e["name"] == outside_page.BEST)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row, with_terms_s in zip(profile["decode"], explained["predicted_s"], strict=True):
        if row["predicted_s"] is not None:
            times_s = (row["published_s"], row["predicted_s"], with_terms_s)
            points.setdefault(row["source"], []).append(times_s)
    figure = new_figure(height_inches=5.6)
    panels = figure.subplots(2, (len(points) + 1) // 2).ravel()
    for axes, (source, times_s) in zip(panels, points.items(), strict=True):
        _panel(axes, times_s)
        axes.set_title(source)
    for axes in panels[-2:]:
        axes.set_xlabel("published, ms a token")
    for axes in panels[::2]:
        axes.set_ylabel("predicted, ms a token")
    panels[0].legend(loc="upper left")
    return figure


def _panel(axes: Axes, times_s: list[tuple[float, float, float]]) -> None:
    published, shipped, with_terms = 1e3 * np.array(times_s).T
    limit = 1.08 * max(*published, *shipped, *with_terms)
    axes.plot([0, limit], [0, limit], color=INK, linewidth=0.8)
    low, high = 1 - TARGET_RATIO, 1 + TARGET_RATIO
    axes.fill_between([0, limit], [0, low * limit], [0, high * limit], color=FAINT, alpha=0.15)
    ours, other = look("multi_look"), look("gate_look")
    axes.plot(published, shipped, "o", color=ours.colour, label="as shipped")
    axes.plot(
        *(published, with_terms, "D"),
        color=other.colour,
        markerfacecolor="none",
        label="best explanation",
    )
    axes.set(xlim=(0, limit), ylim=(0, limit))


if __name__ == "__main__":
    sys.exit(main())
