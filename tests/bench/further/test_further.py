"""What `--full` simulates: cells on a tiny model, and the lists of what is wanted."""

import dataclasses

import numpy as np
import pytest

from moejax.bench import learn, open_requests, run_grid
from moejax.bench._grid import draw_runs
from moejax.bench.audit import by_run
from moejax.bench.further import HYBRIDS, run_further
from moejax.bench.further._cells import Wanted, simulate_cells
from moejax.bench.further._gpus import load_cards, room_on
from moejax.bench.further._hybrids import cautious
from moejax.bench.further._top_k import run_top_k
from moejax.cards import load_hardware, load_model
from moejax.cost import from_hardware, host_expert_s
from moejax.report._check import Checker
from moejax.report._further import EXPERIMENTS, read_further
from moejax.strategies import STRATEGIES, lru, pinned

from ..test_experiment import HARDWARE, MODEL, NUM_LAYERS, SETTINGS, make_trace

QWEN = load_model("qwen1.5-moe-a2.7b")


@pytest.fixture(scope="module")
def requests():
    return open_requests(make_trace(), "", MODEL, 0)


@pytest.fixture(scope="module")
def profile(requests):
    return learn(requests)


@pytest.fixture(scope="module")
def settings():
    return dataclasses.replace(SETTINGS, strategies=("lru", "oracle"), num_steps=6)


def test_cells_are_those_of_the_grid(requests, profile, settings):
    """On the same draws, with other slots and machines as lanes beside them."""
    draws = draw_runs(requests, settings)
    h100 = load_hardware("h100")
    wanted = [
        Wanted(HARDWARE, 3, settings.slots),
        Wanted(h100, 1, (2,) * NUM_LAYERS, {"hardware": "h100"}, most_runs=1),
    ]
    cells = simulate_cells(
        {"lru": STRATEGIES["lru"].make(None)}, wanted, MODEL, draws, settings, what="test"
    )
    own = dataclasses.replace(settings, strategies=("lru",))
    for cell, hardware, slots, size in zip(cells, (HARDWARE, h100), (5, 2), (3, 1), strict=True):
        grid = run_grid(
            dataclasses.replace(own, slots=(slots,) * NUM_LAYERS, batch_sizes=(size,)),
            MODEL,
            hardware,
            requests,
            profile,
        )
        assert (cell["strategy"], cell["batch_size"], cell["slots"]) == ("lru", size, slots)
        for name, values in by_run(grid[: 1 if size == 1 else 2]).items():
            assert cell[name] == pytest.approx(values, rel=1e-6), name
    assert cells[1]["hardware"] == "h100"


def test_a_hybrid_pins_what_the_profile_demanded_most(requests, profile, settings):
    draws = draw_runs(requests, settings)
    strategies = {
        "hybrid": HYBRIDS["pinned(lru)"].make(profile, 0.25),
        "by hand": pinned(lru(), profile, 0.25),
    }
    wanted = [Wanted(HARDWARE, 1, settings.slots)]
    one, other = simulate_cells(strategies, wanted, MODEL, draws, settings, what="test")
    assert one["latency_s"] == other["latency_s"]


def test_hybrids_are_named_after_what_they_are_made_of(profile):
    for name, hybrid in HYBRIDS.items():
        assert set(hybrid.parts) <= set(STRATEGIES)
        assert any(part in name for part in hybrid.parts)
        made = hybrid.make(profile, 0.25)
        assert made.computes_on_host == name.startswith("host_compute")
        assert made.prefetches == ("with_prefetch" in name or "intelligent" in name)


def test_a_cautious_host_is_slower_in_both_ways():
    slow = cautious(HARDWARE)
    link = "pinned_h2d_bytes_per_s"
    assert slow.value(link) == HARDWARE.value(link) * HARDWARE.value("contention_ratio")
    assert slow.value("host_read_bytes_per_s") == HARDWARE.value("host_copy_bytes_per_s")
    one, other = (
        float(host_expert_s(from_hardware(machine), 10**7)) for machine in (HARDWARE, slow)
    )
    assert one < other
    assert HARDWARE.value(link) != slow.value(link)


def test_room_is_what_the_rest_leaves():
    card = load_hardware("rtx-3090")
    room = room_on(card, QWEN, 1, 512)
    taken = room["dense_bytes"] + room["kv_bytes"] + room["workspace_bytes"]
    layer_bytes = 24 * QWEN.expert_bytes
    assert room["staging_bytes"] == 4 * QWEN.expert_bytes
    slots = room["slots_that_fit"]
    left = card.value("vram_bytes") - taken - room["staging_bytes"]
    assert slots * layer_bytes <= left < (slots + 1) * layer_bytes
    assert room_on(load_hardware("h100"), QWEN, 1, 512)["slots_that_fit"] == 60
    # Experts of unequal size: a slot in every layer takes what the trace says.
    assert room_on(card, QWEN, 1, 512, 2.0 * layer_bytes)["slots_that_fit"] == slots // 2


def test_a_card_too_small_for_one_layer_has_no_room():
    constants = dict(HARDWARE.constants)
    small = dataclasses.replace(constants["vram_bytes"], value=QWEN.dense_bytes * 1.0)
    card = dataclasses.replace(HARDWARE, constants=constants | {"vram_bytes": small})
    assert room_on(card, QWEN, 1, 512)["slots_that_fit"] is None


def test_six_cards_have_profiles():
    names = {card.name for card in load_cards()}
    assert {"rtx-3090", "rtx-4090", "a100-40gb", "a100-80gb", "h100", "h200"} <= names


@pytest.fixture
def wanted(monkeypatch, profile) -> list[tuple]:
    """Takes the place of draws and simulation, which other tests cover; keeps what is asked for."""
    asked = []

    def made_up(strategies, wanted, model, draws, settings, *, what, progress=None):
        asked.append((what, tuple(strategies), wanted, model, len(draws), settings))
        fields = (
            *("latency_s", "p50_s", "p95_s", "p99_s", "hit_ratio", "fetched_bytes"),
            *("memory_bytes", "num_prefetches"),
        )
        return [
            {"strategy": name, "batch_size": one.batch_size, "slots": max(one.slots)}
            | dict(one.head)
            | dict.fromkeys(fields, [0.5] * len(draws[: one.most_runs]))
            for name in strategies
            for one in wanted
        ]

    folder = "moejax.bench.further"
    for module in ("_further", "_models", "_top_k"):
        monkeypatch.setattr(f"{folder}.{module}.simulate_cells", made_up)
    for name in ("_models.learn", "_top_k.learn_profile"):
        monkeypatch.setattr(f"{folder}.{name}", lambda *_: profile)
    for name in ("_models.open_requests", "_top_k.draw_profile", "_top_k.draw_synthetic"):
        monkeypatch.setattr(f"{folder}.{name}", lambda *_, **__: None)
    monkeypatch.setattr(
        f"{folder}._models.draw_runs", lambda requests, settings: [None] * settings.num_runs
    )
    return asked


def test_the_report_reads_every_experiment(wanted, requests, profile, settings, tmp_path):
    found = run_further(settings, MODEL, HARDWARE, requests, profile)
    assert set(found) == set(EXPERIMENTS)
    read = read_further(Checker(tmp_path / "results.json", "hint"), found)
    shares = (round(0.25 * MODEL.num_experts), round(0.75 * MODEL.num_experts))
    slots = {cell.slots for cell in read["capacities"].cells}
    assert slots == {1, 2, 4, 8, *shares} - {5}
    assert read["capacities"].strategies() == ("on_demand", *settings.strategies)
    caches = {cell.head["cache"] for cell in read["gpus"].cells}
    assert caches == {"as in the run", "all that fit"}
    assert {cell.head["model"] for cell in read["models"].cells} == {MODEL.name, "switch-base-128"}
    assert read["hybrids"].strategies() == tuple(HYBRIDS)
    assert {cell.head["host"] for cell in read["hybrids"].cells} == {"stated", "cautious"}
    # Half of the slots are pins.
    assert read["hybrids"].settings["pinned_share_ratio"] == 2.5 / MODEL.num_experts
    num_draws = {
        name: {len(cell.values["latency_s"]) for cell in read[name].cells}
        for name in ("capacities", "gpus", "hybrids")
    }
    assert num_draws == {"capacities": {2}, "gpus": {1}, "hybrids": {2}}
    assert {name: one.settings["num_runs"] for name, one in read.items()}["gpus"] == 1


def test_k_is_read_as_pins_and_as_routed_experts(wanted, settings):
    found = run_top_k(settings)
    points = {
        (cell["reading"], cell["num_experts_per_tok"], cell["slots"]) for cell in found["cells"]
    }
    assert points == {
        *(("pins", 8, slots) for slots in (4, 8, 16)),
        *(("routed", topk, 32) for topk in (4, 8, 16)),
    }
    for _, _, _, model, _, _ in wanted:
        assert model.num_experts == 64
    assert [model.num_experts_per_tok for _, _, _, model, _, _ in wanted] == [4, 8, 16]


def test_capacities_are_the_first_draws_of_the_grid(requests, settings):
    """So that the report may pair other cache sizes with the run's own."""
    few = dataclasses.replace(settings, num_runs=1)
    for one, other in zip(draw_runs(requests, few), draw_runs(requests, settings), strict=False):
        np.testing.assert_array_equal(one.experts, other.experts)
