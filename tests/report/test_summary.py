import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.report import read_run, summarise
from moejax.report._summary import estimate, pareto_front, scaling_factor, speedup

from ._factory import results, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    return read_run(write_run(tmp_path_factory.mktemp("run"), results(batch_sizes=(1, 16))))


def rows_of(run, strategy: str, batch_size: int) -> list:
    return [row for row in run.records if (row.strategy, row.batch_size) == (strategy, batch_size)]


def test_cells_are_means_of_their_records(run):
    summary = summarise(run)
    assert len(summary.cells) == 9 * 2
    for key, cell in summary.cells.items():
        rows = rows_of(run, key.strategy, key.batch_size)
        assert cell.num_runs == len(rows) == 10
        means = [row.latency_s.mean for row in rows]
        assert cell.latency_s.mean == pytest.approx(np.mean(means))
        assert cell.latency_s.std == pytest.approx(np.std(means, ddof=1))
        assert cell.p99_s.mean == pytest.approx(np.mean([row.latency_s.p99 for row in rows]))
        assert cell.fetched_bytes.mean == pytest.approx(np.mean([r.fetched_bytes for r in rows]))
        rates = [key.batch_size / mean for mean in means]
        assert cell.throughput_tokens_per_s.mean == pytest.approx(np.mean(rates))
        assert cell.latency_s.low < cell.latency_s.mean < cell.latency_s.high


def test_hidden_transfer_is_what_no_stall_shows(run):
    cell = summarise(run).cell("lru", 1, "batched")
    assert cell is not None
    assert cell.hidden_transfer_s == pytest.approx(cell.transfer_s.mean - cell.stall_s.mean)


def test_interval_narrows_with_runs_and_matches_theory():
    draws = np.random.default_rng(3).normal(10.0, 1.0, size=400)
    one = estimate(draws.tolist())
    half_width = 1.96 * draws.std(ddof=1) / math.sqrt(len(draws))
    assert one.high - one.mean == pytest.approx(half_width, rel=0.1)
    assert one.mean - one.low == pytest.approx(half_width, rel=0.1)


def test_one_run_has_no_spread():
    one = estimate([2.0])
    assert one.mean == 2.0
    assert all(math.isnan(value) for value in one[1:])


def test_speedup_pairs_runs(run):
    summary = summarise(run)
    found = speedup(summary, "intelligent", "lru", 1, "batched")
    own = [row.latency_s.mean for row in rows_of(run, "intelligent", 1)]
    base = [row.latency_s.mean for row in rows_of(run, "lru", 1)]
    assert found is not None
    assert found.mean == pytest.approx(np.mean(base) / np.mean(own))
    assert found.low < found.mean < found.high
    itself = speedup(summary, "lru", "lru", 1, "batched")
    assert itself is not None
    assert itself[:4] == (1.0, 0.0, 1.0, 1.0)
    assert speedup(summary, "lru", "unknown", 1, "batched") is None


def test_scaling_factor_is_largest_over_smallest(run, tmp_path: Path):
    found = scaling_factor(summarise(run), run, "lru", "batched")
    low, high = (
        np.mean([row.latency_s.mean for row in rows_of(run, "lru", size)]) for size in (1, 16)
    )
    assert found is not None
    assert found.mean == pytest.approx(high / low)
    single = read_run(write_run(tmp_path, results(batch_sizes=(4,), num_runs=2)))
    assert scaling_factor(summarise(single), single, "lru", "batched") is None


POINTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@given(POINTS)
def test_pareto_front_is_what_nothing_beats(points: list[tuple[int, int]]):
    costs, gains = np.array(points, float).T
    expected = [
        not any(other[0] <= cost and other[1] >= gain and other != (cost, gain) for other in points)
        for cost, gain in points
    ]
    assert pareto_front(costs, gains).tolist() == expected


def test_costs_that_read_the_same_are_the_same():
    front = pareto_front(np.array([12.521e9, 12.534e9]), np.array([2.0, 3.0]))
    assert front.tolist() == [False, True]
