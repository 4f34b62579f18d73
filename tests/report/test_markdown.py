import json
import re
from pathlib import Path

import pytest

from moejax.report import ReportData, load_data, report_markdown
from moejax.report._answer import answer
from moejax.report._glossary import GLOSSARY
from moejax.report._numbers import format_constant, format_count, format_factor, markdown_table
from moejax.report._summary import speedup
from moejax.report._tables import latency_table, speedup_table, traffic_table
from moejax.units import format_bytes, format_ratio, format_seconds

from ._factory import plan, results, without_links, write_run


def load(folder: Path, **options) -> ReportData:
    return load_data(write_run(folder, results(**options)))


def cells_of(table: str) -> list[list[str]]:
    lines = without_links(table).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return load(tmp_path_factory.mktemp("run"))


def test_latency_table_equals_the_cells(data: ReportData):
    rows = cells_of(latency_table(data, "batched"))[2:]
    assert len(rows) == 9 * 5
    for row in rows:
        cell = data.summary.cell(row[0].strip("`"), int(row[1]), "batched")
        assert cell is not None
        assert row[3] == format_seconds(cell.latency_s.mean)
        assert row[4] == format_seconds(cell.latency_s.std)
        assert row[5].split(" to ")[1] == format_seconds(cell.latency_s.high)
        assert row[6:9] == [format_seconds(p.mean) for p in (cell.p50_s, cell.p95_s, cell.p99_s)]


def test_traffic_table_equals_the_cells(data: ReportData):
    for row in cells_of(traffic_table(data, "batched"))[2:]:
        cell = data.summary.cell(row[0].strip("`"), int(row[1]), "batched")
        assert cell is not None
        assert row[2] == format_ratio(cell.hit_ratio.mean)
        assert row[5:7] == [
            format_bytes(cell.fetched_bytes.mean),
            format_bytes(cell.wasted_bytes.mean),
        ]
        assert row[9] == format_seconds(cell.stall_s.mean)


def test_speedup_table_equals_the_ratios(data: ReportData):
    header, _, *rows = cells_of(speedup_table(data, "lru", "batched"))
    assert [row[0] for row in rows] == [f"`{n}`" for n in data.run.strategies if n != "lru"]
    assert header[-1] == "batch 16"
    for row in rows:
        found = speedup(data.summary, row[0].strip("`"), "lru", 16, "batched")
        assert found is not None
        assert row[-1].startswith(format_factor(found.mean))


def test_answer_names_the_fastest_and_its_gain(data: ReportData):
    text = without_links(answer(data))
    cell = data.summary.cell("intelligent", 1, "batched")
    assert cell is not None
    assert text.startswith("**Use `intelligent`.**")
    assert f"median step {format_seconds(cell.p50_s.mean)}" in text
    found = speedup(data.summary, "intelligent", "lru", 1, "batched")
    assert found is not None
    assert f"{format_ratio(1 - 1 / found.mean)} less time a step than with `lru`" in text
    assert "with 30 expert slots a layer" in text


def test_equal_strategies_are_called_a_tie(tmp_path: Path):
    content = results(strategies=("lru", "lfu"), batch_sizes=(1,), num_runs=6)
    for row in content["grid"]:
        row["latency_s"]["mean"] = 0.02 + 1e-4 * ((row["run"] * 7 + len(row["strategy"])) % 5)
        row["latency_s"] |= {"p50": 0.019, "p95": 0.03, "p99": 0.04}
    for row in content["grid"][6:]:
        row["latency_s"]["mean"] += 1e-5 * (-1) ** row["run"]
    assert "a tie" in answer(load_data(write_run(tmp_path, content)))


def test_one_run_claims_no_win(tmp_path: Path):
    text = answer(load(tmp_path, num_runs=1))
    assert "one draw of requests" in text
    assert "interval of it" not in text


def test_only_the_future_recommends_nothing(tmp_path: Path):
    assert "recommends nothing" in answer(load(tmp_path, strategies=("oracle",), num_runs=2))


def test_without_lru_the_answer_says_so(tmp_path: Path):
    assert "no `lru`" in answer(load(tmp_path, strategies=("oracle", "top_k"), num_runs=2))


def test_whole_report(data: ReportData):
    text = report_markdown(data, ["latency", "hit_curve"], {"tiers": "there is no plan"})
    images = re.findall(r"!\[[^]]*]\(([^)]*)\)", text)
    assert images == ["figures/latency.png", "figures/hit_curve.png"]
    order = ["do with this card", "Figures", "Tables", "Method", "Limits", "Glossary"]
    places = [text.index(f"{name}\n\n") for name in order]
    assert places == sorted(places)
    assert "- Tier sizes per layer: there is no plan." in text
    assert "calibrated synthetic workload `qwen1.5-moe` (not recorded routing)" in text
    assert "It is no evidence for the ranking of strategies" in text
    assert "**The geometry differs.**" in text
    assert "that are taken from a datasheet, not measured: `vram_bytes`." in text
    assert "moejax bench --seed 0" in text
    for entry in data.claims["known_conflicts"]:
        assert f"- `{entry['id']}`" in text
    assert "nan" not in text.lower().split()
    assert "None" not in text


def test_every_table_is_rectangular(data: ReportData):
    text = report_markdown(data, [], {})
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 10
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_recorded_routing_and_own_geometry(tmp_path: Path):
    data = load(tmp_path, num_runs=2, model="reference-study", workload=None)
    text = report_markdown(data, ["latency"], {})
    assert "on recorded routing (`made up`)" in text
    assert "synthetic" not in text.replace(GLOSSARY["workload"], "")
    assert "This run has the study's own geometry." in text


def test_bare_run(tmp_path: Path):
    content = results(num_runs=1, batch_sizes=(1,)) | {"measured": {}, "hit_curve": {}}
    content["hardware"] = {"name": "a card"}
    text = report_markdown(load_data(write_run(tmp_path, content)), [], {})
    assert "Nothing was timed in this run." in text
    assert "Constants of the clock" not in text
    assert "### Scaling" not in text


def test_both_dispatches_have_their_tables(tmp_path: Path):
    data = load(tmp_path, num_runs=2, dispatches=("batched", "sequential"))
    text = report_markdown(data, ["latency"], {})
    assert "### Step latency, batched dispatch" in text
    assert "### Step latency, sequential dispatch" in text
    assert "Ours is sequential dispatch" in text


def test_plan_has_a_table(tmp_path: Path):
    write_run(tmp_path, results(num_runs=1))
    (tmp_path / "plan.json").write_text(json.dumps(plan()))
    text = without_links(report_markdown(load_data(tmp_path), [], {}))
    experts = sum(plan()["tiers"][0]["experts_per_layer"])
    assert f"| L1 | device | {format_bytes(experts * 17_301_504)} | {experts} | 4 to 6 |" in text


def test_names_stay_in_their_cells():
    assert markdown_table(("a|b",), [("c\nd",)]) == "| a\\|b |\n| --- |\n| c d |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.4796, "2.48"),
        (16, "16.0"),
        (1440, "1,440"),
        (999.9, "1,000"),
        (0, "0"),
        (0.0692, "0.0692"),
    ],
)
def test_counts_have_three_digits(value: float, text: str):
    assert format_count(value) == text


def test_constants_have_their_unit():
    assert format_constant(25.3e9, "B/s") == "25.3 GB/s"
    assert format_constant(76.58e12, "FLOP/s") == "76.6 TFLOP/s"
    assert format_constant(1699, "USD") == "1,699 USD"
