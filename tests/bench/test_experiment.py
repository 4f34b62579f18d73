"""The grid: what a record holds, that it can be repeated, and that strategies meet the same."""

import dataclasses

import numpy as np
import pytest

from moejax.bench import (
    GridSettings,
    Requests,
    batch_lookahead,
    check_shape,
    draw_run,
    learn,
    open_requests,
    run_grid,
    scaled,
    simulate_lanes,
)
from moejax.bench._grid import draw_runs
from moejax.cards import load_hardware, load_model
from moejax.cost import layer_clock
from moejax.errors import BadFileError, InfeasibleBudgetError
from moejax.simulate import replay, slots_within
from moejax.strategies import STRATEGIES
from moejax.trace import Trace, batch_trace

MODEL, HARDWARE = load_model("tiny-moe"), load_hardware("rtx-3090")
NUM_LAYERS, NUM_EXPERTS, TOPK = MODEL.num_moe_layers, MODEL.num_experts, 2
SETTINGS = GridSettings(
    strategies=("on_demand", "oracle", "multi_look", "lru"),
    batch_sizes=(1, 3),
    num_runs=2,
    slots=(5,) * NUM_LAYERS,
    num_steps=20,
    num_warmup_steps=6,
)
FIELDS = {
    *("strategy", "batch_size", "run", "dispatch", "slots", "capacity_bytes", "num_late"),
    *("latency_s", "hit_ratio", "late_ratio", "fetched_bytes", "wasted_bytes", "stall_s"),
    *("compute_s", "transfer_s", "memory_bytes"),
}


def make_trace(num_requests: int = 12) -> Trace:
    """Requests of unequal length whose tokens resemble the ones before."""
    rng = np.random.default_rng(1)
    length = rng.integers(3, 14, num_requests)
    noise = rng.gumbel(size=(length.sum(), NUM_LAYERS, NUM_EXPERTS))
    noise[1:] += noise[:-1]
    experts = np.argsort(-noise, axis=-1)[..., :TOPK].astype(np.uint8)
    said = np.roll(experts.reshape(-1, TOPK), -1, axis=0).reshape(*experts.shape[:2], 1, TOPK)
    return Trace(
        experts=experts,
        num_experts=NUM_EXPERTS,
        request_start=np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
        lookahead=said,
    )


@pytest.fixture(scope="module")
def requests():
    return open_requests(make_trace(), "", MODEL, 0)


@pytest.fixture(scope="module")
def grid(requests):
    return run_grid(SETTINGS, MODEL, HARDWARE, requests, learn(requests))


def test_the_trace_says_how_many_experts_a_token_demands(requests, grid):
    """A recording may have been routed to fewer experts than the model's card says."""
    card = dataclasses.replace(MODEL, num_experts_per_tok=TOPK + 3)
    settings = dataclasses.replace(SETTINGS, strategies=("multi_look",))
    found = run_grid(settings, card, HARDWARE, requests, learn(requests))
    expected = [record for record in grid if record["strategy"] == "multi_look"]
    for counts in ("num_hits", "num_misses", "num_prefetches"):
        assert [r[counts] for r in found] == [r[counts] for r in expected]


def test_every_point_has_every_field(grid):
    points = [
        (name, size, run, "batched")
        for name in SETTINGS.strategies
        for size in SETTINGS.batch_sizes
        for run in range(2)
    ]
    keys = ("strategy", "batch_size", "run", "dispatch")
    assert [tuple(record[key] for key in keys) for record in grid] == points
    for record in grid:
        assert record.keys() >= FIELDS
        assert set(record["latency_s"]) == {"mean", "std", "p50", "p95", "p99"}
        assert record["slots"] == 5
        assert record["capacity_bytes"] == 5 * NUM_LAYERS * MODEL.expert_bytes
        parts = record["num_hits"] + record["num_late"] + record["num_misses"]
        assert parts == record["num_demands"]
        mean_s = record["compute_s"] + record["stall_s"]
        assert record["latency_s"]["mean"] == pytest.approx(mean_s, rel=1e-6)
        fetched = (record["num_misses"] + record["num_prefetches"]) * MODEL.expert_bytes
        assert record["fetched_bytes"] == pytest.approx(fetched / SETTINGS.num_steps)
        num_wasted = record["wasted_bytes"] * SETTINGS.num_steps / MODEL.expert_bytes
        assert num_wasted == pytest.approx(round(num_wasted), abs=1e-6)
        assert record["strategy"] != "oracle" or num_wasted == 0
        staged = TOPK * record["batch_size"] * MODEL.expert_bytes
        assert record["memory_bytes"] <= record["capacity_bytes"] + staged


def test_all_strategies_meet_the_same_demand_and_runs_differ(grid):
    demands = {
        (record["batch_size"], record["run"]): record["num_demands"]
        for record in grid
        if record["strategy"] == "oracle"
    }
    assert len(demands) == 4
    for record in grid:
        assert record["num_demands"] == demands[record["batch_size"], record["run"]]
    lru = [record for record in grid if record["strategy"] == "lru"]
    assert len({record["latency_s"]["mean"] for record in lru}) == 4


def test_the_study_order_of_the_extremes_holds(grid):
    by_point = {}
    for record in grid:
        by_point.setdefault((record["batch_size"], record["run"]), {})[record["strategy"]] = record
    for point in by_point.values():
        assert point["on_demand"]["hit_ratio"] == 0
        for record in point.values():
            assert record["fetched_bytes"] >= point["oracle"]["fetched_bytes"]
            assert record["latency_s"]["mean"] <= point["on_demand"]["latency_s"]["mean"] * 1.000001


def test_a_grid_can_be_repeated_and_a_seed_changes_it(grid, requests):
    few = GridSettings(**(vars(SETTINGS) | {"strategies": ("lru",)}))
    again = run_grid(few, MODEL, HARDWARE, requests, learn(requests))
    assert again == [record for record in grid if record["strategy"] == "lru"]
    others = run_grid(few, MODEL, HARDWARE, requests._replace(seed=1), learn(requests))
    assert [one["num_hits"] for one in others] != [one["num_hits"] for one in again]


def test_a_strategy_is_compiled_once_for_all_lanes_scales_and_depths():
    inner, traced = STRATEGIES["oracle"].make(None), []

    def step(*arguments):
        traced.append(1)
        return inner.step(*arguments)

    strategy = inner._replace(step=step)
    lane = replay(batch_trace(make_trace(), 1, num_steps=12), NUM_EXPERTS)
    clock = layer_clock(HARDWARE, MODEL, batch_size=1)
    points = [(link, depth) for link in (0.25, 1.0) for depth in (0, 1, 2)]

    def simulate():
        return simulate_lanes(
            strategy,
            [lane] * len(points),
            [scaled(clock, link, 1.0) for link, _ in points],
            np.full((len(points), NUM_LAYERS), 5, np.int32),
            seeds=[0] * len(points),
            topk=TOPK,
            depths=[depth for _, depth in points],
        )

    records = simulate()
    num_traced = len(traced)
    simulate()
    assert len(traced) == num_traced
    for (_, depth), record in zip(points, records, strict=True):
        assert record.num_prefetches[..., depth:].sum() == 0
    assert any(record.num_prefetches.sum() > 0 for record in records)
    assert records[0].stall_s.sum() > records[3].stall_s.sum()


def test_sequential_latency_is_the_sum_over_places(requests):
    both = GridSettings(
        **(vars(SETTINGS) | {"strategies": ("on_demand",), "dispatches": ("batched", "sequential")})
    )
    records = run_grid(both, MODEL, HARDWARE, requests, learn(requests))
    found = {(one["batch_size"], one["run"], one["dispatch"]): one for one in records}
    # One request at a time is the same either way.
    for run in range(2):
        alone, batched = found[1, run, "sequential"], found[1, run, "batched"]
        assert alone["latency_s"]["mean"] == pytest.approx(batched["latency_s"]["mean"], rel=1e-6)
    # Three at a time: replay every place by itself; nothing is kept, so nothing is shared.
    draw = draw_run(requests, 0, num_places=3, num_steps=26)
    experts = batch_trace(draw, 3, num_steps=26).reshape(26, NUM_LAYERS, 3, TOPK)
    clock = layer_clock(HARDWARE, MODEL, batch_size=1)
    lanes = [replay(experts[:, :, place], NUM_EXPERTS, with_future=False) for place in range(3)]
    slots = np.full((3, NUM_LAYERS), 5, np.int32)
    strategy = STRATEGIES["on_demand"].make(None)
    places = simulate_lanes(strategy, lanes, [clock] * 3, slots, seeds=[0, 0, 0], topk=TOPK)
    latency_s = sum((one.compute_s + one.stall_s).sum(-1)[6:] for one in places)
    sequential = found[3, 0, "sequential"]
    assert sequential["latency_s"]["mean"] == pytest.approx(latency_s.mean(), rel=1e-5)
    assert sequential["latency_s"]["p99"] == pytest.approx(np.percentile(latency_s, 99), rel=1e-5)
    # In lockstep shared experts are fetched once.
    assert found[3, 0, "batched"]["num_demands"] < sequential["num_demands"]
    assert sequential["num_demands"] == 3 * 20 * NUM_LAYERS * TOPK


def test_no_place_of_a_batch_is_ever_empty(requests):
    for run in range(3):
        draw = draw_run(requests, run, num_places=4, num_steps=50)
        experts = batch_trace(draw, 4, num_steps=50)
        assert experts.shape == (50, NUM_LAYERS, 4 * TOPK)
        assert (experts < NUM_EXPERTS).all()
        # What the gates say belongs to the same tokens: here, to the event that comes next.
        said = batch_lookahead(draw, 4, 50)
        places = experts.reshape(50, NUM_LAYERS, 4, TOPK)
        np.testing.assert_array_equal(said[:, :-1, 0], places[:, 1:])


@pytest.mark.parametrize("name", ["lru", "gate_look"])
def test_a_draw_says_what_gates_would_choose_where_a_strategy_reads_it(name):
    requests = Requests(make_trace(), None, "uniform", 0)
    settings = dataclasses.replace(SETTINGS, strategies=(name, "on_demand"), num_runs=1)
    (draw,) = draw_runs(requests, settings)
    assert (draw.lookahead is not None) == STRATEGIES[name].needs_lookahead


def test_runs_share_no_request_with_the_profile(requests):
    tokens = {row.tobytes() for row in requests.profile.experts}
    draw = draw_run(requests, 0, num_places=4, num_steps=50)
    assert not tokens & {row.tobytes() for row in draw.experts}


def test_a_trace_of_another_shape_is_refused():
    with pytest.raises(BadFileError):
        check_shape(make_trace(), load_model("qwen1.5-moe-a2.7b"))


@pytest.mark.parametrize(
    ("budget_bytes", "sizes", "expected"),
    [
        (2_000_000_000, [17_301_504] * 24, (5,) * 19 + (4,) * 5),
        (60, [10, 10, 10], (2, 2, 2)),
        (75, [10, 20, 30], (2, 1, 1)),
        (30, [10, 20, 30], (1, 1, 0)),
        (10**9, [10, 20, 30], (16, 16, 16)),
    ],
)
def test_slots_within_a_budget_are_even_and_fit(budget_bytes, sizes, expected):
    slots = slots_within(budget_bytes, sizes, 16)
    assert slots == expected
    assert np.dot(slots, sizes) <= budget_bytes


def test_a_budget_below_one_expert_names_the_smallest():
    with pytest.raises(InfeasibleBudgetError) as caught:
        slots_within(29, [10, 20, 30], 16)
    assert "30B" in caught.value.hint
