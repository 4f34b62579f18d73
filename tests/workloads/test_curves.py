"""The hit curves behind the calibration, against a cache that is simulated literally."""

import itertools

import numpy as np
import pytest

from moejax.workloads import (
    as_one_layer,
    first_touch_ratio,
    lfu_hit_ratio,
    lru_hit_ratio,
    oracle_hit_ratio,
    pinned_hit_ratio,
)

NUM_EXPERTS = 9
SLOTS = (0, 1, 2, 3, 5, 8, 9)


@pytest.fixture(scope="module")
def experts():
    random = np.random.default_rng(5)
    popularity = np.linspace(0, 1.5, NUM_EXPERTS)
    noise = random.gumbel(size=(2, 40, 3, NUM_EXPERTS))
    return np.argsort(-(popularity + noise), axis=-1)[..., :2].astype(np.uint8)


@pytest.mark.parametrize("name", ["lru", "lfu", "oracle"])
def test_curve_equals_a_literal_cache(experts, name):
    curve = {
        "lru": lambda: lru_hit_ratio(experts, NUM_EXPERTS)[list(SLOTS)],
        "lfu": lambda: lfu_hit_ratio(experts, NUM_EXPERTS)[list(SLOTS)],
        "oracle": lambda: oracle_hit_ratio(experts, NUM_EXPERTS, SLOTS),
    }[name]()
    literal = [_replay(experts, slots, name) for slots in SLOTS]
    np.testing.assert_allclose(curve, [hits for hits, _ in literal], rtol=0, atol=1e-12)


def test_first_touches_are_those_of_a_cache_that_fills(experts):
    literal = [_replay(experts, slots, "lru")[1] for slots in SLOTS]
    curve = first_touch_ratio(experts, NUM_EXPERTS)
    np.testing.assert_allclose(curve[list(SLOTS)], literal, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lru", "lfu", "oracle"])
def test_one_pool_equals_a_literal_cache_of_all_layers(experts, name):
    pooled, num_pooled = as_one_layer(experts, NUM_EXPERTS), 3 * NUM_EXPERTS
    assert pooled.shape == (2, 40, 1, 6)
    np.testing.assert_array_equal(pooled[..., 2:4] - NUM_EXPERTS, experts[:, :, 1:2])
    slots = (0, 5, 9, 16, 27)
    curve = {
        "lru": lambda: lru_hit_ratio(pooled, num_pooled)[list(slots)],
        "lfu": lambda: lfu_hit_ratio(pooled, num_pooled)[list(slots)],
        "oracle": lambda: oracle_hit_ratio(pooled, num_pooled, slots),
    }[name]()
    literal = [_replay(pooled, count, name)[0] for count in slots]
    np.testing.assert_allclose(curve, literal, rtol=0, atol=1e-12)


def test_oracle_is_the_best_of_all_possible_caches():
    random = np.random.default_rng(8)
    sets = np.stack([random.permutation(4)[:2] for _ in range(6)]).reshape(1, 6, 1, 2)
    best = max(_most_hits(sets[0, :, 0], frozenset(), 2), 0)
    assert oracle_hit_ratio(sets, 4, (2,))[0] * sets.size == best


def test_pins_take_the_profile_and_not_the_tested_requests(experts):
    assert pinned_hit_ratio(experts, experts, NUM_EXPERTS)[-1] == 1.0
    swapped = (NUM_EXPERTS - 1) - experts
    own = pinned_hit_ratio(experts, experts, NUM_EXPERTS)
    wrong = pinned_hit_ratio(swapped, experts, NUM_EXPERTS)
    assert (own[1:-1] > wrong[1:-1]).all()


def _replay(experts, slots, name):
    """Hit ratio, and share of first touches that found a free slot, one lane at a time."""
    hits = first = 0
    for request, layer in itertools.product(range(experts.shape[0]), range(experts.shape[2])):
        sets = [set(row.tolist()) for row in experts[request, :, layer]]
        resident, seen, last, uses = set(), set(), {}, {}
        for now, demanded in enumerate(sets):
            hits += len(demanded & resident)
            first += min(len(demanded - seen), slots - len(resident))
            seen |= demanded
            for expert in demanded:
                last[expert], uses[expert] = now, uses.get(expert, 0) + 1
            score = {
                "lru": lambda e, last=last: (last[e], -e),
                "lfu": lambda e, uses=uses: (uses[e], -e),
                "oracle": lambda e, now=now, sets=sets: (-_next(sets, now, e), -e),
            }[name]
            resident = set(sorted(resident | demanded, key=score, reverse=True)[:slots])
    return hits / experts.size, first / experts.size


def _next(sets, now, expert):
    return next((step for step in range(now + 1, len(sets)) if expert in sets[step]), len(sets))


def _most_hits(sets, resident, slots):
    """Tries every way to keep `slots` experts after every token."""
    if len(sets) == 0:
        return 0
    demanded = frozenset(sets[0].tolist())
    pool = sorted(demanded | resident)
    rest = max(
        _most_hits(sets[1:], frozenset(kept), slots)
        for kept in itertools.combinations(pool, min(slots, len(pool)))
    )
    return len(demanded & resident) + rest
