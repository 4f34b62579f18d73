"""The section on statistics says what its tests found."""

from pathlib import Path

import numpy as np
import pytest

from moejax.report import ReportData, load_data
from moejax.report._statistics_text import analyse, compare, statistics_section
from moejax.report.statistics import compare_paired, holm
from moejax.units import format_seconds

from ._factory import results, without_links, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return load_data(write_run(tmp_path_factory.mktemp("run"), results()))


@pytest.fixture(scope="module")
def text(data) -> str:
    return without_links("\n\n".join(statistics_section(data)))


def latencies_s(data: ReportData, strategy: str, batch_size: int) -> np.ndarray:
    rows = [r for r in data.run.records if (r.strategy, r.batch_size) == (strategy, batch_size)]
    return np.array([row.latency_s.mean for row in rows])


def test_comparisons_are_one_family(data):
    pairs = [("intelligent", "lru"), ("lfu", "lru")]
    found = compare(data, pairs, (1, 16))
    assert [(one.strategy, one.batch_size) for one in found] == [
        ("intelligent", 1), ("lfu", 1), ("intelligent", 16), ("lfu", 16),
    ]  # fmt: skip
    alone = [
        compare_paired(latencies_s(data, own, size), latencies_s(data, base, size))
        for size in (1, 16)
        for own, base in pairs
    ]
    assert [one.p_t for one in found] == holm([one.p_t for one in alone if one is not None])
    assert found[0].verdict == "faster"


def test_the_table_of_differences_is_the_comparisons(data, text):
    one = compare(data, [(n, "lru") for n in data.run.strategies if n != "lru"], (1, 2, 4, 8, 16))
    chosen = next(c for c in one if (c.strategy, c.batch_size) == ("top_k", 4))
    row = next(line for line in text.splitlines() if line.startswith("| `top_k` | 4 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"+{format_seconds(chosen.paired.mean)}"
    assert cells[-1] == chosen.verdict == "slower"
    assert "over the 40 comparisons of this table" in text
    # 40 comparisons of ten pairs: twice 40 / 1024.
    assert "it cannot get below 0.0781 here" in text


def test_strategies_that_cannot_be_told_apart_are_tied(tmp_path: Path):
    content = results(strategies=("lru", "lfu", "on_demand"), batch_sizes=(1, 2), num_runs=6)
    for row in content["grid"]:
        if row["strategy"] == "lfu":
            twin = next(
                one
                for one in content["grid"]
                if one["strategy"] == "lru"
                and (one["batch_size"], one["run"]) == (row["batch_size"], row["run"])
            )
            latency_s = twin["latency_s"]["mean"] * (1 + 1e-4 * (-1) ** row["run"])
            row["latency_s"] = row["latency_s"] | {"mean": latency_s}
    text = "\n".join(statistics_section(load_data(write_run(tmp_path, content))))
    assert "`lru` ≈ `lfu` < `on_demand`" in text or "`lfu` ≈ `lru` < `on_demand`" in text


def test_the_interaction_is_that_of_the_grid(data, text):
    found, names, sizes = analyse(data)
    assert names == data.run.strategies
    assert [one.num_degrees for one in found.sources] == [8, 4, 32]
    assert f"| strategy x batch size | 32, {32 * 9} |" in text
    assert sizes == (1, 2, 4, 8, 16)


def test_spread_and_throughput_have_intervals(data, text):
    cell = data.summary.cell("lru", 16, "batched")
    assert cell is not None
    row = next(
        line
        for line in text[text.index("### Variation") :].splitlines()
        if line.startswith("| `lru` | 16 |")
    )
    assert f"{format_seconds(cell.p95_s.mean)} ({format_seconds(cell.p95_s.low)} to" in row
    assert "### Throughput" in text
    assert "would be 16.0\N{MULTIPLICATION SIGN} in the last column" in text


def test_one_draw_has_throughput_and_nothing_to_test(tmp_path: Path):
    text = "\n".join(statistics_section(load_data(write_run(tmp_path, results(num_runs=1)))))
    assert "### Throughput" in text
    for heading in ("Paired differences", "Ranking", "Variation", "Strategy and batch"):
        assert f"### {heading}" not in text
    assert "nan" not in text
