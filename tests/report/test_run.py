import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moejax.errors import BadFileError
from moejax.report import read_run

from ._factory import ALL, plan, results, write_run


def small(**changes: Any) -> dict[str, Any]:
    return results(strategies=("lru", "oracle"), batch_sizes=(1, 2), num_runs=2) | changes


def test_reads_every_record(tmp_path: Path):
    content = small()
    run = read_run(write_run(tmp_path, content))
    assert len(run.records) == len(content["grid"]) == 8
    for record, row in zip(run.records, content["grid"], strict=True):
        assert record.strategy == row["strategy"]
        assert record.latency_s.p99 == row["latency_s"]["p99"]
        assert record.fetched_bytes == row["fetched_bytes"]
    assert run.strategies == ("oracle", "lru")
    assert run.batch_sizes == (1, 2)
    assert run.tiers == ()


def test_strategies_in_display_order_and_unknown_last(tmp_path: Path):
    content = results(strategies=tuple(reversed(ALL)), batch_sizes=(1,), num_runs=1)
    content["grid"][0]["strategy"] = "pinned(lru, 0.3)"
    assert read_run(write_run(tmp_path, content)).strategies == (*ALL[:-1], "pinned(lru, 0.3)")


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one]])
def test_plan_beside_the_run(tmp_path: Path, wrap: Callable):
    write_run(tmp_path, small())
    (tmp_path / "plan.json").write_text(json.dumps(wrap(plan())))
    tiers = read_run(tmp_path).tiers
    assert [tier.name for tier in tiers] == ["L1", "L2", "L3"]
    assert tiers[0].experts_per_layer == tuple(plan()["tiers"][0]["experts_per_layer"])


def test_plan_inside_the_results(tmp_path: Path):
    assert len(read_run(write_run(tmp_path, small(tune=plan()))).tiers) == 3


def change(*path: Any, to: Any) -> Callable[[dict], None]:
    def apply(content: dict) -> None:
        holder = content
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = to

    return apply


def drop(*path: Any) -> Callable[[dict], None]:
    def apply(content: dict) -> None:
        holder = content
        for step in path[:-1]:
            holder = holder[step]
        del holder[path[-1]]

    return apply


def repeat_a_record(content: dict) -> None:
    content["grid"].append(content["grid"][0])


BAD = {
    "another schema": (change("schema", to="moejax.bench/0"), "schema"),
    "no grid": (drop("grid"), "grid"),
    "empty grid": (change("grid", to=[]), "grid is empty"),
    "grid of numbers": (change("grid", to=[1]), "grid[0]"),
    "no model": (drop("model"), "model"),
    "model without expert size": (drop("model", "expert_bytes"), "model.expert_bytes"),
    "nameless hardware": (drop("hardware", "name"), "hardware.name"),
    "hardware constant without unit": (
        drop("hardware", "constants", "vram_bytes", "unit"),
        "vram_bytes.unit",
    ),
    "no latency": (drop("grid", 3, "latency_s"), "grid[3].latency_s"),
    "no p95": (drop("grid", 3, "latency_s", "p95"), "p95"),
    "latency null": (change("grid", 2, "latency_s", "mean", to=None), "missing"),
    "latency text": (change("grid", 2, "latency_s", "mean", to="1 ms"), "1 ms"),
    "latency boolean": (change("grid", 2, "latency_s", "mean", to=True), "True"),
    "latency zero": (change("grid", 2, "latency_s", "mean", to=0.0), "grid[2]"),
    "latency beyond floats": (change("grid", 2, "latency_s", "std", to=10**320), "std"),
    "percentiles out of order": (change("grid", 2, "latency_s", "p50", to=9e9), "percentiles"),
    "hit ratio above 1": (change("grid", 1, "hit_ratio", to=1.5), "hit_ratio"),
    "negative bytes": (change("grid", 1, "fetched_bytes", to=-1), "fetched_bytes"),
    "half a run": (change("grid", 1, "run", to=0.5), "run"),
    "batch 0": (change("grid", 1, "batch_size", to=0), "batch"),
    "unknown dispatch": (change("grid", 1, "dispatch", to="magic"), "magic"),
    "more hits than demands": (change("grid", 1, "num_hits", to=10**9), "demands"),
    "one record twice": (repeat_a_record, "two records"),
    "ragged hit curve": (change("hit_curve", "lru", "slots", to=[1]), "hit_curve.lru"),
    "timing without samples": (change("measured", "compute", 0, "samples_s", to=[]), "samples_s"),
    "plan without tiers": (change("tune", to={}), "tiers"),
}


@pytest.mark.parametrize("name", BAD)
def test_inconsistent_results_name_field_and_cure(tmp_path: Path, name: str):
    spoil, said = BAD[name]
    content = small()
    spoil(content)
    with pytest.raises(BadFileError) as caught:
        read_run(write_run(tmp_path, content))
    assert said in caught.value.cause
    assert "results.json" in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": "moejax.bench/1", "grid": [NaN]}', "\x00", "[" * 10**5]
)
def test_damaged_file(tmp_path: Path, text: str):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BadFileError) as caught:
        read_run(tmp_path)
    assert caught.value.hint


def test_overflowing_number(tmp_path: Path):
    text = json.dumps(small()).replace('"stall_s": ', '"stall_s": 1e999, "x": ', 1)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BadFileError):
        read_run(tmp_path)


def test_no_run_here(tmp_path: Path):
    with pytest.raises(BadFileError) as caught:
        read_run(tmp_path)
    assert "moejax bench" in caught.value.hint


def test_damaged_plan(tmp_path: Path):
    write_run(tmp_path, small())
    (tmp_path / "plan.json").write_text('{"tiers": [{"name": "L1"}]}')
    with pytest.raises(BadFileError) as caught:
        read_run(tmp_path)
    assert "plan.json" in caught.value.cause
