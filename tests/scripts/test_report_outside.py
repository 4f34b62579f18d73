"""The committed report on outside truth is what the cost model says today."""

import sys
from pathlib import Path

import pytest

from moejax.results import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import outside_page
import report_outside


@pytest.fixture(scope="module")
def results() -> dict:
    return read_json(report_outside.FOLDER / "results.json")


def test_the_page_is_that_of_its_results(results):
    shown = (report_outside.FOLDER / "report.md").read_text(encoding="utf-8")
    assert outside_page.page(results) == shown


def test_results_are_those_of_the_shipped_profiles(results):
    ours = report_outside.compare()
    assert ours["rigs"] == results["rigs"]
    assert _close(ours["profiles"], results["profiles"])
    assert _close(ours["explanations"], results["explanations"])


def test_the_figure_has_a_panel_for_each_source_that_can_be_predicted(results):
    figure = report_outside.decode(results)
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    sources = results["profiles"]["rtx-3090"]["decode_sources"]
    assert titles == [one["source"] for one in sources if one["num_predicted"]]


def test_the_summary_counts_what_meets_the_target(results):
    found = outside_page.summary(results)
    target = results["target_ratio"]
    assert found["num_sources"] == len(found["medians"]) == len(found["medians_with_terms"])
    assert found["num_met"] == sum(ratio <= target for ratio in found["medians"])
    assert max(found["medians_with_terms"]) <= target


def _close(ours, theirs) -> bool:
    """Equal but for the last digits of numbers, which differ between machines."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_close(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    if isinstance(ours, float):
        return ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    return ours == theirs
