"""One event: what is counted of a prefetch under way, and what a strategy sees of other layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine import COUNTS
from moejax.engine._directory import NOWHERE
from moejax.engine._event import (
    Sizes,
    Tables,
    demand_row,
    is_link_free,
    read_access,
    serve,
)
from moejax.engine._expert_cache import empty_cache, make_sizes
from moejax.engine.kernels._copy import (
    EXPERT,
    ISSUED,
    LAYER,
    NUM_FIELDS,
    SLOT,
    VALID,
    schedule,
)
from moejax.offload import ExpertLayout, SlotPlan
from moejax.strategies import CacheShape, lru, transitions, with_prefetch

NUM_LAYERS, NUM_EXPERTS, TOPK = 3, 12, 2
LAYOUT = ExpertLayout(NUM_EXPERTS, hidden=4, ffn=32, dtype="float32")
PLAN = SlotPlan("layer", (4, 5, 6))
STRATEGY = with_prefetch(lru(), transitions(None, online=True, reach=2))
FLYING, ITS_SLOT = 7, 11
WHOLE = LAYOUT.num_rows


def make_tables() -> tuple[Sizes, Tables]:
    shape = CacheShape(NUM_LAYERS, NUM_EXPERTS, TOPK, 1)
    sizes = make_sizes(shape, LAYOUT, PLAN.scope, STRATEGY, schedule(WHOLE, 3))
    return sizes, empty_cache(sizes, LAYOUT, PLAN, [STRATEGY], jnp.float32).tables


def ask(sizes: Sizes, tables: Tables, event: int, demanded: list[int], job_is_valid: bool = True):
    """Serves an event while expert 7 of layer 2, chosen in event 1, is on its way to slot 11."""
    job = np.zeros(NUM_FIELDS, np.int32)
    job[[LAYER, EXPERT, SLOT, ISSUED, VALID]] = 2, FLYING, ITS_SLOT, 1, job_is_valid
    layer = jnp.int32(event % NUM_LAYERS)
    tables = tables._replace(
        job=jnp.asarray(job),
        slot_of=tables.slot_of.at[2, FLYING].set(ITS_SLOT),
        step=jnp.asarray([event // NUM_LAYERS], jnp.int32),
    )
    demand = jnp.zeros(sizes.num_padded, jnp.int32).at[jnp.array(demanded)].set(1)
    resident = tables.slot_of[layer] >= 0
    access = read_access(sizes, tables, None, layer, demand, resident, None)
    state = jax.tree.map(lambda leaf: leaf[layer], tables.state)
    served = serve(STRATEGY, sizes, tables, access, state)
    counts = dict(zip(COUNTS, served.counts[: len(COUNTS)].tolist(), strict=True))
    return served, counts, bool(is_link_free(sizes, tables, layer))


def test_demanded_too_early_it_is_late():
    sizes, tables = make_tables()
    served, counts, is_free = ask(sizes, tables, 2, [FLYING, 9])
    assert sizes.schedule is not None
    assert counts == dict(zip(COUNTS, (2, 0, 1, 1, 0, 2 * WHOLE), strict=True))
    assert served.landed_rows[FLYING] == sizes.schedule.rows_before_experts < WHOLE
    assert served.settled.slot_of[FLYING] == served.settled.read_slot[FLYING] == ITS_SLOT
    # What is missing is written through.
    assert served.settled.is_written[FLYING]
    assert (bool(served.is_live), is_free) == (False, True)


def test_passed_over_it_is_dropped():
    sizes, tables = make_tables()
    served, counts, is_free = ask(sizes, tables, 2, [9])
    assert sizes.schedule is not None
    rows = WHOLE + sizes.schedule.rows_before_experts
    assert counts == dict(zip(COUNTS, (1, 0, 0, 1, 0, rows), strict=True))
    assert served.settled.slot_of[FLYING] == NOWHERE
    assert (bool(served.is_live), is_free) == (False, True)


def test_in_other_layers_it_goes_on_until_it_has_landed():
    """The layers of events 3 and 4 are others; that it has landed is counted once."""
    sizes, tables = make_tables()
    served, counts, is_free = ask(sizes, tables, 3, [FLYING])
    assert counts == dict(zip(COUNTS, (1, 0, 0, 1, 0, WHOLE), strict=True))
    assert (bool(served.is_live), is_free) == (True, False)
    served, counts, is_free = ask(sizes, tables, 4, [9])
    assert counts == dict(zip(COUNTS, (1, 0, 0, 1, 0, 2 * WHOLE), strict=True))
    assert (bool(served.is_live), is_free) == (False, True)


@pytest.mark.parametrize("demanded", [[FLYING], [9]])
def test_what_has_landed_is_resident(demanded):
    sizes, tables = make_tables()
    served, counts, is_free = ask(sizes, tables, 5, demanded, job_is_valid=False)
    is_hit = demanded == [FLYING]
    missed = 1 - is_hit
    assert counts == dict(zip(COUNTS, (1, is_hit, 0, missed, 0, missed * WHOLE), strict=True))
    assert served.landed_rows[FLYING] == is_hit * WHOLE
    assert served.settled.slot_of[FLYING] == ITS_SLOT
    assert (bool(served.is_live), is_free) == (False, True)


def test_a_strategy_sees_the_last_events_of_other_layers():
    """The one above may be of the step before, and those below are: the newest before this one."""
    sizes, tables = make_tables()
    seen: dict[int, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for event in range(5 * NUM_LAYERS):
        step, layer = divmod(event, NUM_LAYERS)
        tables = tables._replace(step=jnp.asarray([step], jnp.int32))
        demand = np.zeros(sizes.num_padded, np.int32)
        demand[rng.choice(NUM_EXPERTS, TOPK, replace=False)] = rng.integers(1, 4, TOPK)
        number = jnp.int32(layer)
        resident = jnp.zeros(sizes.num_padded, bool)
        access = read_access(sizes, tables, None, number, jnp.asarray(demand), resident, None)
        nothing = np.zeros_like(demand)
        np.testing.assert_array_equal(access.above, seen.get(event - 1, nothing))
        for row in range(sizes.shape.depth):
            before = event + 1 + row - NUM_LAYERS
            np.testing.assert_array_equal(access.below_before[row], seen.get(before, nothing))
        assert access.event == event
        assert access.capacity == PLAN.slots[layer]
        seen[event] = demand
        at = demand_row(sizes, tables, number)
        tables = tables._replace(demand=tables.demand.at[at].set(demand))
