"""The HTML of a report: whole, strict, and without a way out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moejax.report import load_data, page_html, report_markdown

from ..bench._made_up_study import audited_results
from ._factory import results, write_run

VOID = {"meta", "link", "img", "br", "hr", "wbr", "input"}
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M0 0\nL 9 9"/></svg>'


class Reader(HTMLParser):
    """Elements of a page; what is opened must be closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"{tag} is closed where it is not open"
        self.open.pop()

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


@pytest.fixture(scope="module")
def content() -> dict:
    return audited_results()


@pytest.fixture(scope="module")
def page(content, tmp_path_factory) -> str:
    data = load_data(write_run(tmp_path_factory.mktemp("run"), content))
    drawn = ["latency", "hit_rate", "claims_budget"]
    text = report_markdown(data, drawn, {"tiers": "there is no plan"})
    images = {f"figures/{name}.png": DRAWING for name in drawn}
    return page_html(text, images, {"results.json": content})


@pytest.fixture(scope="module")
def reader(page) -> Reader:
    return Reader(page)


def test_it_is_well_formed_and_ids_are_unique(page, reader):
    assert page.startswith("<!doctype html>")
    ids = reader.values("id")
    assert len(ids) == len(set(ids)) > 200
    assert all(name and " " not in name for name in ids)


def test_it_loads_nothing(page, reader):
    loading = [*reader.values("src"), *reader.values("srcset"), *reader.values("data")]
    loading += [attrs["href"] for attrs in reader.all("link")]
    assert len(loading) >= 4
    assert all(address.startswith("data:") for address in loading)
    assert not {"iframe", "object", "embed", "video", "audio", "base", "form"} & {
        tag for tag, _ in reader.elements
    }
    assert not re.search(r"url\(|@import", page)
    (policy,) = [
        attrs["content"]
        for attrs in reader.all("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for _, attrs in reader.elements for name in attrs if name.startswith("on")]


def test_every_link_inside_it_has_its_end(reader):
    ends = set(reader.values("id"))
    addresses = [attrs["href"] for attrs in reader.all("a")]
    inside = [address[1:] for address in addresses if address.startswith("#")]
    assert len(inside) > 1000
    assert not set(inside) - ends
    others = {address for address in addresses if not address.startswith("#")}
    assert all(address.startswith("https://") for address in others)


def test_a_row_s_link_serves_all_of_its_numbers(page):
    bodies = [body for body in page.split('<table class="sortable">')[1:] if "</thead>" in body]
    rows = [row for body in bodies for row in body[: body.index("</table>")].split("<tr>")]
    linked = [row for row in rows if re.match(r'\s*<th [^>]*><a class="record"', row)]
    assert len(linked) > 177
    for row in linked:
        cells = re.findall(r'<td class="number[^"]*">(.*?)</td>', row)
        numbers = [cell for cell in cells if re.search(r"\d", cell)]
        assert all(cell.startswith('<a class="record"') for cell in numbers)


def test_figures_are_in_it_with_words(reader):
    images = reader.all("img")
    assert [image["alt"] for image in images][:2] == ["Latency", "Hit ratio"]
    assert all("%3Csvg" in image["src"] and "%22M0 0 L 9 9%22" in image["src"] for image in images)
    assert len(reader.all("figure")) == len(reader.all("figcaption")) == 3


def test_records_are_those_of_the_file(page, content):
    record = content["grid"][0]
    entry = page[page.index('id="/grid/0-1"') :]
    entry = entry[: entry.index("</details>")]
    for value in (record["latency_s"]["mean"], record["fetched_bytes"], record["num_demands"]):
        assert f"<td>{json.dumps(value)}</td>" in entry
    # A claim leads on to what it was made from.
    audited = page[page.index('id="/audit/22"') :]
    assert 'href="#/study/grid/' in audited[: audited.index("</details>")]


def test_what_a_run_says_is_shown_and_never_run(tmp_path: Path):
    evil = '<script>alert(1)</script><img src="http://example.org/x.png" onerror="alert(2)">'
    content = results(strategies=("on_demand", "lru"), batch_sizes=(1,), num_runs=2)
    content["trace"] |= {"name": evil, "workload": None, "source": "![x](http://example.org/y)"}
    content["hardware"] |= {"title": evil, "note": "[click](javascript:alert(3)) </details>"}
    content["environment"] |= {"device": f"|{evil}", "more": {"</script>": "<style>*{}</style>"}}
    content["hardware"]["constants"][evil] = dict(content["hardware"]["constants"]["matmul_flops"])
    data = load_data(write_run(tmp_path, content))
    reader = Reader(page_html(report_markdown(data, [], {}), {}, {"results.json": content}))
    assert len(reader.all("script")) == len(reader.all("style")) == 1
    assert reader.all("img") == []
    assert not [name for _, attrs in reader.elements for name in attrs if name.startswith("on")]
    assert not [one for one in reader.values("href") if one.startswith(("java", "http:"))]
    assert "alert(1)" in reader.text


def test_headings_of_one_name_stay_apart_and_are_listed():
    page = page_html("# A <b>\n\n## Same\n\n### Same\n\n## Same\n\n## Records\n", {}, {})
    reader = Reader(page)
    assert {"same", "same-2", "same-3"} <= set(reader.values("id"))
    listed = [attrs["href"] for attrs in reader.all("a")]
    assert listed[1:] == ["#same", "#same-2", "#same-3", "#records-2"]
    assert "<title>A &lt;b&gt;</title>" in page


def test_a_link_to_nowhere_is_no_page():
    with pytest.raises(LookupError):
        page_html("# A\n\n[1](results.json#/grid/3)\n", {}, {"results.json": {"grid": [1]}})
    with pytest.raises(LookupError, match=r"no plan\.json"):
        page_html("# A\n\n[1](plan.json#/tiers/0)\n", {}, {"results.json": {}})


def test_a_number_is_not_parted_from_its_unit():
    page = page_html(
        "# One\n\n28.7 ms, 5.9 % to 7.6 %, 24.9 GB; 3 seconds and `7 ms` typed\n", {}, {}
    )
    for whole in (
        "28.7\xa0ms",
        "5.9\xa0% to 7.6\xa0%",
        "24.9\xa0GB",
        "3 seconds",
        "<code>7 ms</code>",
    ):
        assert whole in page
