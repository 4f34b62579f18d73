"""Every number of a result table leads to records, and the records say that number."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from moejax.report import load_data, report_markdown
from moejax.report._places import resolve
from moejax.report._summary import estimate

from ..bench._made_up_study import audited_results
from ._factory import plan, results, without_links, write_run
from ._further import full_results

LINK = re.compile(r"\[(?:[^]]*)]\(((?:results|plan)\.json)#([^)]*)\)")
UNITS = {
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "%": 1e-2, "TFLOP": 1e12,
}  # fmt: skip
# Quoted from elsewhere, or said in words.
NOT_OURS = (
    "claimed",
    "strategy",
    "wanted",
    "quantity",
    "why they differ",
    "complexity (the study's score)",
)

Records = Sequence[dict[str, Any]]


def mean_of(*way: str) -> Callable[[Records], float]:
    def value(record: Any) -> float:
        for name in way:
            record = record[name]
        return record

    return lambda records: statistics.fmean(value(record) for record in records)


def latencies(records: Records) -> list[float]:
    return [record["latency_s"]["mean"] for record in records]


def interval(records: Records) -> tuple[float, float]:
    return estimate(latencies(records))[2:]


LATENCY = mean_of("latency_s", "mean")
CELL: dict[str, Callable[[Records], Any]] = {
    "batch": lambda records: records[0]["batch_size"],
    "runs": len,
    "mean": LATENCY,
    "mean step": LATENCY,
    "std over runs": lambda records: statistics.stdev(latencies(records)),
    "95 % interval of the mean": interval,
    "p50": mean_of("latency_s", "p50"),
    "p95": mean_of("latency_s", "p95"),
    "p99": mean_of("latency_s", "p99"),
    "std / mean over steps": lambda records: statistics.fmean(
        record["latency_s"]["std"] / record["latency_s"]["mean"] for record in records
    ),
    "hit ratio": mean_of("hit_ratio"),
    "late": mean_of("late_ratio"),
    "fetched": mean_of("fetched_bytes"),
    "wasted": mean_of("wasted_bytes"),
    "compute": mean_of("compute_s"),
    "transfer": mean_of("transfer_s"),
    "stall": mean_of("stall_s"),
    "device memory": mean_of("memory_bytes"),
}
TRAFFIC = CELL | {
    "std over runs": lambda records: statistics.stdev(record["hit_ratio"] for record in records)
}
TIMED: dict[str, Callable[[Records], Any]] = {
    "size": lambda records: records[0]["num_bytes"],
    "weights": lambda records: records[0]["num_bytes"],
    "samples": lambda records: len(records[0]["samples_s"]),
    "median": lambda records: statistics.median(records[0]["samples_s"]),
    "rate at the median": lambda records: (
        records[0]["num_bytes"] / statistics.median(records[0]["samples_s"])
    ),
}
TIER: dict[str, Callable[[Records], Any]] = {
    "capacity": lambda records: records[0]["capacity_bytes"],
    "experts": lambda records: sum(records[0]["experts_per_layer"]),
    "experts a layer, fewest to most": lambda records: (
        min(records[0]["experts_per_layer"]),
        max(records[0]["experts_per_layer"]),
    ),
}
CONSTANT: dict[str, Callable[[Records], Any]] = {
    "value": lambda records: records[0]["value"],
    "standard error": lambda records: records[0]["standard_error"],
}
AUDITED = {
    "claimed": "claimed",
    "ours": "ours",
    "interval": "interval",
    "assumption lifted": "ours_otherwise",
    "this run's model": "ours_real",
}
SAID = {
    "Step latency": CELL,
    "Hits, traffic, time and memory": TRAFFIC,
    "Trade-offs at the smallest batch": CELL,
    "Copies": TIMED,
    "Expert compute": TIMED,
    "Tiers": TIER,
    "Constants of the clock": CONSTANT,
}


class Row(dict[str, str]):
    """Cells by column, with the files' content to look into."""

    def __init__(self, cells: dict[str, str], files: dict[str, Any]) -> None:
        super().__init__(cells)
        self._files = files

    @property
    def first(self) -> str:
        return next(iter(self.values()))

    def records(self, column: str) -> Records:
        """What the cell leads to, else what its row does."""
        found = LINK.search(self[column]) or LINK.search(self.first)
        assert found, f"{self[column]} leads nowhere"
        return [one.value for one in resolve(self._files[found[1]], unquote(found[2]))]


def tables_of(text: str, files: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows of every table by the heading above it."""
    tables: dict[str, list[Row]] = {}
    heading, header = "", []
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif not line.startswith("|"):
            header = []
        elif not header:
            header = cells_of(line)
        elif not line.startswith("| ---"):
            cells = dict(zip(header, cells_of(line), strict=True))
            tables.setdefault(heading, []).append(Row(cells, files))
    return tables


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def numbers_in(text: str) -> list[tuple[float, float]]:
    """Numbers as they are written, each with what its last digit leaves open."""
    found = re.findall(r"(-?\d[\d,]*)(\.\d+)?\s*([A-Za-z%]*)", without_links(text))
    numbers = []
    for whole, digits, unit in found:
        scale = UNITS.get(unit, 1)
        value = float(whole.replace(",", "") + digits) * scale
        numbers.append((value, 0.51 * scale * 10.0 ** -max(len(digits) - 1, 0)))
    return numbers


def assert_says(text: str, wanted: float | Sequence[float]) -> None:
    shown = numbers_in(text)
    values = wanted if isinstance(wanted, Sequence) else [wanted]
    # Both ends of an interval that agree in their digits are written once.
    assert len(shown) == len(values) or len({round(one, 9) for one, _ in shown}) == 1, text
    for (number, slack), value in zip(shown, values, strict=False):
        assert number == pytest.approx(value, abs=slack), text


@pytest.fixture(scope="module")
def files() -> dict[str, Any]:
    content = audited_results()
    grid = content["grid"]
    # As in a real run, the baseline lies apart from the strategies.
    content["baseline"] = [row for row in grid if row["strategy"] == "lru"]
    content["grid"] = [row for row in grid if row["strategy"] != "lru"]
    return {"results.json": content, "plan.json": plan()}


@pytest.fixture(scope="module")
def tables(files, tmp_path_factory) -> dict[str, list[Row]]:
    folder = write_run(tmp_path_factory.mktemp("run"), files["results.json"])
    (folder / "plan.json").write_text(json.dumps(files["plan.json"]))
    return tables_of(report_markdown(load_data(folder), [], {}), files)


@pytest.fixture(scope="module")
def full_tables(tmp_path_factory) -> dict[str, list[Row]]:
    content = full_results()
    folder = write_run(tmp_path_factory.mktemp("full"), content)
    return tables_of(report_markdown(load_data(folder), [], {}), {"results.json": content})


@pytest.mark.parametrize("of_run", ["tables", "full_tables"])
def test_every_number_of_a_table_leads_to_records(of_run: str, request):
    num_checked = 0
    for rows in request.getfixturevalue(of_run).values():
        for row in rows:
            for column, cell in row.items():
                if not re.search(r"\d", without_links(cell)) or column in NOT_OURS:
                    continue
                if "arxiv.org" in row.first:
                    continue
                assert row.records(column)
                num_checked += 1
    assert num_checked > 500


def test_a_hybrid_leads_to_its_cells_on_both_hosts(full_tables):
    num_cautious = 0
    for row in full_tables["Hybrid strategies"]:
        stated = row.records("hybrid")[0]
        assert (f"`{stated['strategy']}`", stated["host"]) == (without_links(row.first), "stated")
        assert_says(row["mean step"], statistics.fmean(stated["latency_s"]))
        if LINK.search(row["on a cautious host"]):
            (cautious,) = row.records("on a cautious host")
            assert cautious["host"] == "cautious"
            assert_says(row["on a cautious host"], statistics.fmean(cautious["latency_s"]))
            num_cautious += 1
    assert num_cautious == 2


@pytest.mark.parametrize("heading", SAID)
def test_the_records_say_what_a_row_shows(tables, heading):
    columns = SAID[heading]
    num_checked = 0
    for row in tables[heading]:
        for column in columns.keys() & row.keys():
            wanted = columns[column](row.records(column))
            if isinstance(wanted, str) or wanted is None or isinstance(wanted, bool):
                continue
            assert_says(row[column], wanted)
            num_checked += 1
    assert num_checked >= len(tables[heading])


@pytest.mark.parametrize("baseline", ["on_demand", "lru"])
def test_a_speedup_leads_to_both_lists_of_runs(tables, baseline):
    for row in tables[f"Speedup over `{baseline}`"]:
        for column in list(row)[1:]:
            records = row.records(column)
            base, own = records[: len(records) // 2], records[len(records) // 2 :]
            assert {record["strategy"] for record in base} == {baseline}
            assert {f"`{record['strategy']}`" for record in own} == {row.first}
            assert {f"batch {record['batch_size']}" for record in records} == {column}
            text = row[column].partition(" (")[0] + "]"
            assert_says(text, LATENCY(base) / LATENCY(own))


def test_scaling_leads_to_both_ends(tables):
    for row in tables["Scaling"]:
        growth = list(row)[1]
        records = row.records(growth)
        largest, smallest = (
            [record for record in records if record["batch_size"] == size] for size in (16, 1)
        )
        assert len(largest) + len(smallest) == len(records)
        assert_says(row[growth].partition(" (")[0], LATENCY(largest) / LATENCY(smallest))
        for column in list(row)[2:]:
            found = row.records(column)
            assert_says(row[column], statistics.fmean(
                record["batch_size"] / record["latency_s"]["mean"] for record in found
            ))  # fmt: skip


def test_the_curve_leads_to_the_curve(tables):
    for row in tables["Hit ratio (warm) against slots per layer"]:
        if "published" in row.first:
            assert "https://arxiv.org/abs/" in row.first
            continue
        (curve,) = row.records("slots per layer")
        ours = dict(zip(map(str, curve["slots"]), curve["hit_ratio_warm"], strict=True))
        for slots in list(row)[1:]:
            assert_says(row[slots], ours[slots])


def test_a_row_of_the_audit_leads_to_the_row_of_the_file(tables):
    rows = tables["The study's claims"]
    assert len(rows) == 177
    for row in rows:
        (record,) = row.records("claim")
        assert f"`{record['claim']}`" == without_links(row.first)
        for column, field in AUDITED.items():
            value = record[field]
            if value is None or isinstance(value, str):
                continue
            # These numbers are in the unit of the claim, in the file as in the table.
            shown = row[column] if field == "interval" else re.match(r"[-\d,.]+", row[column])[0]
            assert_says(shown, value)


def test_the_answer_leads_to_its_records(files, tmp_path: Path):
    content = results(strategies=("on_demand", "oracle", "lru", "intelligent"), num_runs=3)
    data = load_data(write_run(tmp_path, content))
    text = report_markdown(data, [], {})
    opening = text[: text.index("## How to read")]
    found = re.findall(r"\[([^]]*)]\(results\.json#([^)]*)\)", opening)
    assert len(found) >= 6
    says = {shown: [one.value for one in resolve(content, unquote(way))] for shown, way in found}
    latency = next(shown for shown in says if shown.endswith("ms"))
    assert {record["strategy"] for record in says[latency]} == {"intelligent"}
    assert_says(latency, LATENCY(says[latency]))
    factor = next(shown for shown in says if shown.endswith("\N{MULTIPLICATION SIGN}"))
    base, own = says[factor][:3], says[factor][3:]
    assert [record["strategy"] for record in (base[0], own[0])] == ["on_demand", "intelligent"]
    assert_says(factor, LATENCY(base) / LATENCY(own))
