"""Choosing under constraints: reading them, the choice, and what the report says of it."""

import dataclasses
from pathlib import Path

import pytest

from moejax.errors import InfeasibleBudgetError, UsageError
from moejax.report import ReportData, load_data, parse_constraints, selection_rows
from moejax.report._constraints import KINDS, Candidate, Constraint
from moejax.report._selection import candidates, choose
from moejax.report._selection_text import selection_section

from ._factory import results, write_run
from ._further import full_results


def candidate(strategy: str, mean_s: float, memory_bytes: float = 1e9, **more) -> Candidate:
    fields = {
        "strategy": strategy, "batch_size": 4, "slots": 2, "p99_s": 2 * mean_s, "hit_ratio": 0.5,
        "latency_s": {run: mean_s * (1 + 0.001 * run) for run in range(5)},
        "memory_bytes": memory_bytes, "complexity": None, "knows_future": False,
        "place": "/grid/0-4",
    }  # fmt: skip
    return Candidate(**fields | more)


AMONG = (
    candidate("slow", 0.09, 1e8, complexity=1.0, hit_ratio=0.1),
    candidate("plain", 0.05, 1e9),
    candidate("clever", 0.04, 2e9, complexity=7.0, hit_ratio=0.8),
    candidate("prophet", 0.01, 1e8, complexity=3.0, hit_ratio=0.9, knows_future=True),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ReportData:
    return load_data(write_run(tmp_path_factory.mktemp("full"), full_results()))


def asking(data: ReportData, *texts: str) -> ReportData:
    return dataclasses.replace(data, constraints=parse_constraints(texts))


def test_constraints_are_read_with_their_units():
    found = parse_constraints(["memory=500MB", "complexity = 4, latency=40ms", "hit=50%"])
    assert found == (
        Constraint("memory", 5e8),
        Constraint("complexity", 4.0),
        Constraint("latency", pytest.approx(0.04)),
        Constraint("hit", 0.5),
    )
    assert [str(one) for one in found] == [
        "memory at most 500 MB",
        "complexity at most 4.00",
        "latency at most 40.0 ms",
        "hit at least 50.0 %",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_can_be_read(kind: str):
    (found,) = parse_constraints([f"{kind}={KINDS[kind].example}"])
    assert found.name == kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory", "'memory' is not known"),
        ("mem=2GB", "'mem=2GB' is not known"),
        ("memory=2XB", "memory: '2XB' is not a size"),
        ("latency=40", "latency: '40' is not a time"),
        ("complexity=-1", "complexity: '-1' is not a number"),
        ("complexity=nan", "complexity: 'nan' is not a number"),
        ("hit=1.5", "hit: '1.5' is more than all"),
        ("future=maybe", "future: 'maybe' is neither"),
        ("memory=1GB,memory=2GB", "memory is limited twice"),
        ("", "'' is not known"),
    ],
)
def test_a_bad_constraint_is_named_with_its_cure(text: str, said: str):
    with pytest.raises(UsageError) as caught:
        parse_constraints([text])
    assert said in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize(
    ("texts", "best", "num_left"),
    [
        ([], "clever", 3),
        (["memory=1GB"], "plain", 2),
        (["memory=500MB"], "slow", 1),
        (["complexity=7"], "clever", 2),
        (["complexity=4"], "slow", 1),
        (["latency=45ms"], "clever", 1),
        (["p99=120ms"], "clever", 2),
        (["hit=0.5", "memory=1GB"], "plain", 1),
        (["throughput=70"], "clever", 2),
        (["future=yes"], "prophet", 4),
        (["future=no", "hit=0.85"], None, 0),
    ],
)
def test_the_fastest_that_meets_all_is_chosen(texts, best, num_left):
    choice = choose(AMONG, parse_constraints(texts))
    assert (choice.best.strategy if choice.best else None) == best
    assert choice.num_left == num_left
    assert choice.num_all == (4 if "future=yes" in texts else 3)


def test_what_has_no_score_meets_no_limit_on_it():
    choice = choose(AMONG, parse_constraints(["complexity=10"]))
    assert choice.num_left == 2
    assert dict(choice.excluded) == {Constraint("complexity", 10.0): 1}


def test_where_nothing_is_left_the_nearest_of_each_is_named():
    memory, hit = limits = parse_constraints(["memory=500MB", "hit=0.7"])
    choice = choose(AMONG, limits)
    assert choice.best is None
    # With enough hits the least memory is the clever one's; within the memory only slow is left.
    assert choice.nearest[memory].strategy == "clever"
    assert choice.nearest[hit].strategy == "slow"


def test_equal_latency_is_a_tie_and_the_smaller_cache_wins():
    twin = candidate("twin", 0.04, 3e9)
    noisy = candidate("noisy", 0.0401, 3e9)._replace(
        latency_s={run: 0.0401 + 0.001 * (-1) ** run for run in range(5)}
    )
    choice = choose((twin, noisy, *AMONG), ())
    assert choice.best is not None
    assert choice.best.strategy == "clever"
    assert [one.strategy for one in choice.ties] == ["twin", "noisy"]


def test_other_cache_sizes_are_candidates_on_the_same_draws(data):
    found = candidates(data, 1)
    assert len(found) == 5 + 4 * 2
    assert {tuple(one.latency_s) for one in found} == {(0, 1)}
    assert [one.slots for one in found if one.strategy == "lru"] == [30, 1, 45]
    assert [one.slots for one in found if one.strategy == "on_demand"] == [0]
    plain = dataclasses.replace(data, run=dataclasses.replace(data.run, further={}))
    assert {tuple(one.latency_s) for one in candidates(plain, 1)} == {(0, 1, 2, 3)}


def test_the_rows_answer_for_every_batch_size(data):
    rows = selection_rows(asking(data, "memory=2GB"))
    assert [row["batch_size"] for row in rows] == [1, 16]
    for row in rows:
        found = [one for one in candidates(data, row["batch_size"]) if not one.knows_future]
        fitting = [one for one in found if one.memory_bytes <= 2e9]
        best = min(fitting, key=lambda one: one.mean_s)
        assert (row["strategy"], row["slots"]) == (best.strategy, best.slots)
        assert row["latency_s"] == best.mean_s
        assert row["num_left"] == len(fitting)
        assert row["excluded_by"] == {"memory at most 2.00 GB": len(found) - len(fitting)}


def test_limits_that_nothing_meets_end_with_the_nearest(data):
    with pytest.raises(InfeasibleBudgetError) as caught:
        selection_rows(asking(data, "memory=1MB"))
    assert "memory at most 1.00 MB" in caught.value.cause
    assert "memory is at least 69.2 MB (`on_demand`)" in caught.value.hint


def test_the_section_says_what_was_asked(data):
    text = "\n\n".join(selection_section(asking(data, "memory=1MB", "complexity=4")))
    assert text.startswith("## Choosing under your constraints")
    assert "Wanted: memory at most 1.00 MB and complexity at most 4.00." in text
    assert "| 1 | nothing |" in text
    assert "with the other limits met, memory is at least 69.2 MB" in text
    assert "the reference study's score" in text


def test_without_constraints_comes_a_matrix(data, tmp_path: Path):
    text = "\n\n".join(selection_section(data))
    rows = [line for line in text.splitlines() if line.startswith("| memory at most 500 MB")]
    assert len(rows) == 1
    assert rows[0].endswith("| `on_demand` |")
    assert "`oracle` with" not in text
    assert "with its own slots and with 1, 45 a layer" in text
    plain = load_data(write_run(tmp_path, results(num_runs=2)))
    assert "`moejax bench --full` adds other cache sizes" in "".join(selection_section(plain))
