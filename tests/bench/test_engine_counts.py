import jax
import numpy as np
import pytest

from moejax.bench import simulated_counts, trace_of_hit_ratio
from moejax.bench._engine_counts import first_difference
from moejax.engine import COUNTS
from moejax.offload import SlotPlan
from moejax.simulate import pool, replay
from moejax.strategies import STRATEGIES

LAYERS, EXPERTS, TOPK, ROWS = 3, 12, 2, 7
FIXED = {"num_experts": EXPERTS, "topk": TOPK, "num_rows": ROWS}


@pytest.fixture(scope="module")
def experts():
    return trace_of_hit_ratio(20, LAYERS, EXPERTS, TOPK, 2, 5, 0.6, seed=4)


def column(counts: np.ndarray, name: str) -> np.ndarray:
    return counts[..., COUNTS.index(name)]


def test_layers_of_lru_are_those_of_a_plain_cache(experts):
    slots = (5, 3, 0)
    counts = simulated_counts(
        STRATEGIES["lru"].make(None), SlotPlan("layer", slots), experts, **FIXED
    )
    for layer, size in enumerate(slots):
        last_use: dict[int, int] = {}
        for step, row in enumerate(experts[:, layer].tolist()):
            hits = set(row) & last_use.keys()
            assert column(counts, "demands")[step, layer] == len(set(row))
            assert column(counts, "hits")[step, layer] == len(hits)
            last_use |= dict.fromkeys(row, step)
            kept = sorted(last_use, key=lambda e: (-last_use[e], e))[:size]
            last_use = {expert: last_use[expert] for expert in kept}


@pytest.mark.parametrize("scope", ["layer", "pool"])
def test_counts_add_up(experts, scope):
    plan = SlotPlan(scope, (5,) * LAYERS if scope == "layer" else (15,))
    counts = simulated_counts(STRATEGIES["fifo"].make(None), plan, experts, **FIXED)
    hits, late, misses = (column(counts, name) for name in ("hits", "late", "misses"))
    np.testing.assert_array_equal(hits + late + misses, column(counts, "demands"))
    np.testing.assert_array_equal(column(counts, "fetched_rows"), ROWS * misses)
    assert hits.sum() > 0 < misses.sum()


@pytest.mark.parametrize("name", ["lru", "on_demand"])
def test_a_pool_sums_to_what_the_simulator_says(experts, name):
    strategy = STRATEGIES[name].make(None)
    counts = simulated_counts(strategy, SlotPlan("pool", (11,)), experts, **FIXED)
    lane, sizes = replay(experts, EXPERTS), np.array([11], np.int32)
    total = pool(strategy, lane, sizes, jax.random.key(0), topk=TOPK)
    np.testing.assert_array_equal(column(counts, "hits").sum(0), total.num_hits[:, 0])


def test_the_first_difference_is_told():
    ours = np.zeros((4, 2, len(COUNTS)), np.int32)
    theirs = ours.copy()
    assert first_difference(ours, theirs) is None
    theirs[2, 1, COUNTS.index("late")] = 3
    theirs[3, 0, 0] = 1
    assert first_difference(ours, theirs) == "step 2, layer 1: 0 late, simulated 3"
    assert "shapes" in (first_difference(ours[:3], theirs) or "")
