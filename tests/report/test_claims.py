from pathlib import Path

import pytest

from moejax.claims import load_claims
from moejax.report import audit, load_data
from moejax.report._claims import QUANTITIES, audit_dispatch

from ._factory import results, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return load_data(write_run(tmp_path_factory.mktemp("run"), results(num_runs=3)))


def test_claims_say_that_they_are_claims():
    assert "claims, not results" in load_claims()["note"]


def test_reasons_name_known_conflicts():
    known = {entry["id"] for entry in load_claims()["known_conflicts"]}
    named = {name for quantity in QUANTITIES for name in quantity.conflicts}
    assert named <= known


def test_every_claimed_strategy_has_a_row(data):
    rows = audit(data)
    claims = load_claims()
    assert len(rows) == 5 + 5 + 5 + 4 + 5 + 5 + 5 + 4 + 2 + 2
    claimed = {(row.quantity.title, row.strategy): row.claimed for row in rows}
    latency = claims["latency_ms"]
    assert claimed["latency, batch 16", "oracle"] == pytest.approx(latency["oracle"][2] * 1e-3)
    assert claimed["hit ratio, mean over batches", "top_k"] == pytest.approx(0.712)
    assert claimed["device memory for experts", "intelligent"] == pytest.approx(1710e6)


def test_ours_come_from_the_run(data):
    rows = {(row.quantity.title, row.strategy): row.ours for row in audit(data)}
    ours = {name: one.estimate for name, one in rows.items() if one is not None}
    cell = data.summary.cell("intelligent", 1, "batched")
    assert ours["latency, batch 1", "intelligent"] == cell.latency_s
    assert ours["device memory for experts", "intelligent"] == cell.memory_bytes
    tail = ours["p99 / p50, batch 1", "intelligent"]
    assert tail.mean == pytest.approx(cell.p99_s.mean / cell.p50_s.mean)
    spread = ours["coefficient of variation over runs, batch 1", "intelligent"]
    assert spread.mean == pytest.approx(cell.latency_s.std / cell.latency_s.mean)


def test_what_the_run_lacks_stays_empty(tmp_path: Path):
    content = results(strategies=("lru", "oracle"), batch_sizes=(2,), num_runs=2)
    rows = audit(load_data(write_run(tmp_path, content)))
    found = {row.quantity.title for row in rows if row.ours is not None}
    assert found == {"hit ratio, mean over batches"}


def test_sequential_is_the_study_s_assumption(tmp_path: Path):
    both = results(num_runs=2, dispatches=("batched", "sequential"))
    assert audit_dispatch(load_data(write_run(tmp_path, both))) == "sequential"
