"""The report opened in a real browser: no error, no request, light and dark, wide and narrow."""

import json
from pathlib import Path

import numpy as np
import pytest

from moejax.report import FIGURES, write_report
from moejax.report._places import fragment

from ._browser import BROWSER, browse
from ._factory import plan, results, write_run

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")

LATENCIES = """
  [...document.querySelector("#step-latency + .scroll table").tBodies[0].rows]
    .map((row) => [row.cells[0].textContent, row.cells[3].textContent, row.cells[4].textContent])
"""
HEADER = 'document.querySelector("#step-latency + .scroll table").tHead.rows[0].cells[{}]'


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    names = ("on_demand", "oracle", "lru", "intelligent")
    folder = write_run(
        tmp_path_factory.mktemp("run"), results(strategies=names, batch_sizes=(1, 16), num_runs=3)
    )
    (folder / "plan.json").write_text(json.dumps(plan()))
    # Two figures tell as much as all of them, and are drawn sooner.
    few = {name: FIGURES[name] for name in ("latency", "tiers")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moejax.report._write.FIGURES", few)
        return write_report(folder).with_suffix(".html")


@pytest.fixture(scope="module")
def tab():
    with browse() as page:
        yield page


def brightness(tab, selector: str) -> float:
    """Of the background of an element, from black (0) to white (1)."""
    code = f"getComputedStyle(document.querySelector({json.dumps(selector)})).backgroundColor"
    numbers = tab.run(code).split("(")[1].rstrip(")").split(",")[:3]
    return float(np.mean([float(number) for number in numbers])) / 255


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit]


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_error_or_request(tab, report, width, height, scheme):
    tab.open(report, width=width, height=height, scheme=scheme)
    assert tab.run("document.readyState") == "complete"
    assert tab.complaints == []
    assert tab.requests == []
    images = "[...document.images].filter((image) => image.complete && image.naturalWidth > 100)"
    assert tab.run(f"{images}.length") == tab.run("document.images.length") == 2
    # Wide tables scroll in their own box; the page never does.
    assert tab.run("document.documentElement.scrollWidth") == width
    is_dark = scheme == "dark"
    assert (brightness(tab, "body") < 0.2) == is_dark
    assert (brightness(tab, "body") > 0.9) == (not is_dark)
    assert brightness(tab, "figure img") > 0.9


def test_the_browser_would_have_told(tab, tmp_path: Path):
    """What the checks above rest on: a page that does all of it wrong."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><meta http-equiv="Content-Security-Policy" content="style-src \'none\'">'
        '<img src="http://127.0.0.1:9/x.png"><p style="color: red">x</p>'
        '<div style="width: 3000px">wide</div><script>console.log("hm"); nothing.at.all;</script>'
    )
    tab.open(bad, width=390)
    said = " ".join(tab.complaints)
    assert "hm" in said
    assert "ReferenceError" in said
    assert "Content Security Policy" in said
    assert tab.requests == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("column", [3, 4])
def test_numbers_sort_by_their_value_in_any_unit(tab, report, column):
    tab.open(report)
    before = tab.run(LATENCIES)
    found = [seconds(row[column - 2]) for row in before]
    assert found != sorted(found)
    assert len({row[column - 2].split()[1] for row in before}) > 1 or column == 3
    for order, state in ((sorted(found), "ascending"), (sorted(found)[::-1], "descending")):
        tab.run(f"{HEADER.format(column)}.querySelector('button').click()")
        assert [seconds(row[column - 2]) for row in tab.run(LATENCIES)] == order
        assert tab.run(f"{HEADER.format(column)}.getAttribute('aria-sort')") == state
    assert tab.complaints == []


def test_names_sort_by_keyboard_alone(tab, report):
    tab.open(report)
    tab.run(f"{HEADER.format(0)}.querySelector('button').focus()")
    tab.press("Enter")
    names = [row[0] for row in tab.run(LATENCIES)]
    assert names == sorted(names)
    assert tab.run(f"{HEADER.format(3)}.getAttribute('aria-sort')") is None
    tab.press("Enter")
    assert [row[0] for row in tab.run(LATENCIES)] == sorted(names, reverse=True)


def test_what_is_missing_sorts_last_both_ways(tab, report):
    tab.open(report)
    # The constants have values with and without a standard error.
    table = 'document.querySelector("#constants-of-the-clock + .scroll table")'
    cells = f"[...{table}.tBodies[0].rows].map((row) => row.cells[2].textContent)"
    assert "\N{EN DASH}" in tab.run(cells)
    for _ in range(2):
        tab.run(f"{table}.tHead.rows[0].cells[2].querySelector('button').click()")
        shown = [text == "\N{EN DASH}" for text in tab.run(cells)]
        assert shown == sorted(shown)


def test_a_number_leads_to_its_records(tab, report):
    tab.open(report)
    link = 'document.querySelector("#step-latency + .scroll td a.record")'
    target = tab.run(f"{link}.hash.slice(1)")
    assert target == "/grid/0-2"
    entry = f"document.getElementById({json.dumps(target)})"
    assert tab.run(f"{entry}.closest('details').open") is False
    tab.run(f"{link}.click()")
    tab.run("new Promise((done) => setTimeout(done, 100))")
    assert tab.run(f"{entry}.closest('details').open") is True
    box = tab.run(f"(({{ top, bottom }}) => [top, bottom])({entry}.getBoundingClientRect())")
    assert 0 <= box[0] < 900
    assert fragment(target) in tab.run("location.href")
    assert tab.complaints == []


def test_contents_are_folded_on_a_phone(tab, report):
    for width, is_open in ((390, False), (1440, True)):
        tab.open(report, width=width)
        assert tab.run("document.querySelector('details.contents').open") is is_open
