"""What holds for every strategy of the registry, and for what they are built from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.simulate import replay
from moejax.simulate._replay import access_at, cache_shape, moments
from moejax.strategies import (
    STRATEGIES,
    Access,
    CacheShape,
    Decision,
    Predictor,
    Strategy,
    always_admit,
    calibrated,
    duel,
    host_compute,
    keep_best,
    learn_profile,
    learn_reuse_weights,
    lfu,
    lru,
    pinned,
    rank_by_score,
    reuse,
    top_k,
    transitions,
    with_prefetch,
    within_reach,
    worst,
)
from moejax.strategies._reuse import FEATURES
from moejax.trace import Trace

KEY = jax.random.key(0)
NUM_LAYERS, NUM_EXPERTS, TOPK = 4, 10, 3


def make_trace(seed: int, *, num_tokens: int = 60, starts: tuple[int, ...] = (0, 25)) -> Trace:
    rng = np.random.default_rng(seed)
    score = rng.random((num_tokens, NUM_LAYERS, NUM_EXPERTS)) + np.linspace(0, 0.5, NUM_EXPERTS)
    experts = np.argsort(-score, axis=-1)[..., :TOPK].astype(np.uint8)
    experts[3, 1, 2] = 255
    return Trace(
        experts=experts,
        num_experts=NUM_EXPERTS,
        request_start=np.array([*starts, num_tokens], np.int64),
    )


PROFILE = learn_profile(make_trace(1, num_tokens=600, starts=(0, 300)))
SHAPE = CacheShape(NUM_LAYERS, NUM_EXPERTS, TOPK, NUM_LAYERS - 1)
BUILT = {name: kind.make(PROFILE) for name, kind in STRATEGIES.items()}


@pytest.fixture(scope="module")
def accesses() -> list[list[Access]]:
    """Events of four steps, layer by layer, with random residents and lookahead."""
    experts = make_trace(2).experts[:4]
    rng = np.random.default_rng(3)
    ahead = rng.integers(0, NUM_EXPERTS, (4, NUM_LAYERS, 3, 1, TOPK)).astype(np.uint8)
    lane = replay(experts, NUM_EXPERTS, lookahead=ahead)
    assert cache_shape(lane.demand, TOPK) == SHAPE
    resident = jnp.asarray(rng.random((NUM_LAYERS, NUM_EXPERTS)) < 0.4)
    capacity = jnp.array([4, 3, 6, 5])
    at = jax.jit(lambda moment, layer: access_at(moment, layer, SHAPE, resident, capacity))
    steps = moments(lane)
    return [
        [at(jax.tree.map(lambda leaf, step=step: leaf[step], steps), layer) for layer in range(4)]
        for step in range(4)
    ]


def play(strategy: Strategy, accesses, key=KEY):
    """States and decisions of all layers after every step, layer by layer."""
    state = strategy.init(SHAPE)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(NUM_LAYERS)]
    step = jax.jit(strategy.step)
    decisions = []
    for row in accesses:
        pairs = [step(layers[i], row[i], key) for i in range(NUM_LAYERS)]
        layers = [pair[0] for pair in pairs]
        decisions.append([pair[1] for pair in pairs])
    return layers, decisions


# --- the protocol -----------------------------------------------------------------------------


def test_the_registry_lists_the_study_first_and_says_what_is_needed():
    assert list(STRATEGIES)[:5] == ["on_demand", "oracle", "multi_look", "top_k", "intelligent"]
    assert len({kind.label for kind in STRATEGIES.values()}) == len(STRATEGIES)
    for name, kind in STRATEGIES.items():
        assert kind.needs_profile == (name == "top_k")
        assert kind.keeps_layers_apart == BUILT[name].keeps_layers_apart
        if not kind.needs_profile:
            assert isinstance(kind.make(None), Strategy)


@pytest.mark.parametrize("name", STRATEGIES)
def test_shapes_are_those_of_the_protocol(name, accesses):
    strategy = BUILT[name]
    state = strategy.init(SHAPE)
    assert all(leaf.shape[0] == NUM_LAYERS for leaf in jax.tree.leaves(state))
    layers, decisions = play(strategy, accesses)
    for i, after in enumerate(layers):
        same = jax.tree.map(
            lambda a, b, i=i: (a[i].shape, a.dtype) == (b.shape, b.dtype), state, after
        )
        assert all(jax.tree.leaves(same))
    for decision in (one for row in decisions for one in row):
        assert decision.keep_score.shape == (NUM_EXPERTS,)
        assert np.isfinite(np.asarray(decision.keep_score, np.float64)).all()
        if decision.admit is not None:
            assert (decision.admit.shape, decision.admit.dtype) == ((NUM_EXPERTS,), bool)
        chance = decision.prefetch_probability
        assert (chance is not None) == strategy.prefetches
        if chance is not None:
            assert chance.shape == (min(SHAPE.depth, strategy.reach), NUM_EXPERTS)
            assert (chance >= 0).all()
            assert (chance <= 1).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_the_oracle_can_not_do_without_a_future(name, accesses):
    blind = [[access._replace(future=None) for access in row] for row in accesses]
    if name == "oracle":
        with pytest.raises(AttributeError):
            play(BUILT[name], blind)
    else:
        jax.tree.map(
            np.testing.assert_array_equal, play(BUILT[name], blind), play(BUILT[name], accesses)
        )


@pytest.mark.parametrize("name", STRATEGIES)
def test_mapping_over_layers_is_a_loop_and_twice_is_the_same(name, accesses):
    strategy = BUILT[name]
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *accesses[0])
    step = jax.jit(jax.vmap(strategy.step, in_axes=(0, 0, None)))
    state, decision = step(strategy.init(SHAPE), rows, KEY)
    layers, decisions = play(strategy, accesses[:1])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    said = jax.tree.map(lambda *leaves: np.stack(leaves), *decisions[0])

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    jax.tree.map(close, (state, decision), (stacked, said))
    again = play(strategy, accesses[:1])
    jax.tree.map(np.testing.assert_array_equal, again, (layers, decisions[:1]))


def test_the_worst_is_what_keep_best_drops_first():
    rng = np.random.default_rng(4)
    score = jnp.asarray(rng.integers(-2, 3, (50, NUM_EXPERTS)))
    candidates = jnp.asarray(rng.random((50, NUM_EXPERTS)) < 0.6).at[:, 0].set(True)
    kept = keep_best(score, candidates, candidates.sum(-1) - 1)
    dropped = candidates & ~kept
    np.testing.assert_array_equal(dropped.sum(-1), 1)
    np.testing.assert_array_equal(worst(score, candidates), jnp.argmax(dropped, -1))
    np.testing.assert_array_equal(np.sort(rank_by_score(score)), np.arange(10)[None].repeat(50, 0))


# --- wrappers ---------------------------------------------------------------------------------


def test_pinned_puts_the_hottest_first_and_leaves_the_rest_to_the_strategy(accesses):
    _, decisions = play(pinned(lru(), PROFILE, 0.3), accesses)
    _, plain = play(lru(), accesses)
    for layer in range(NUM_LAYERS):
        pins = np.argsort(-PROFILE.num_uses[layer], kind="stable")[:3]
        others = np.setdiff1d(np.arange(NUM_EXPERTS), pins)
        score = np.asarray(decisions[-1][layer].keep_score)
        assert score[pins].min() > score[others].max()
        own = np.asarray(plain[-1][layer].keep_score)[others]
        order = [np.argsort(-values, kind="stable") for values in (score[others], own)]
        np.testing.assert_array_equal(*order)


def test_always_admit_puts_demand_first_and_keeps_the_order(accesses):
    _, decisions = play(always_admit(BUILT["on_demand"]), accesses)
    _, oracles = play(always_admit(BUILT["oracle"]), accesses)
    _, plain = play(BUILT["oracle"], accesses)
    for layer in range(NUM_LAYERS):
        demanded = np.asarray(accesses[-1][layer].demand) > 0
        assert decisions[-1][layer].admit is None
        score = np.asarray(oracles[-1][layer].keep_score)
        assert score[demanded].min() > score[~demanded].max()
        own = np.asarray(plain[-1][layer].keep_score)
        for part in (demanded, ~demanded):
            order = [np.argsort(-values[part], kind="stable") for values in (score, own)]
            np.testing.assert_array_equal(*order)


def test_pinned_admits_its_pins_even_where_the_strategy_does_not(accesses):
    _, decisions = play(pinned(BUILT["on_demand"], PROFILE, 0.2), accesses)
    assert [int(one.admit.sum()) for one in decisions[0]] == [2] * NUM_LAYERS


def test_top_k_pins_the_profile_whatever_the_trace_demands(accesses):
    layers, decisions = play(top_k(PROFILE, 0.4), accesses)
    for layer, state in enumerate(layers):
        hottest = np.argsort(-PROFILE.num_uses[layer], kind="stable")[:4]
        assert np.flatnonzero(decisions[-1][layer].admit).tolist() == sorted(hottest)
        np.testing.assert_array_equal(state.num_uses, PROFILE.num_uses[layer])


def test_wrapping_changes_only_what_it_says(accesses):
    predictor = Predictor(
        lambda shape: jnp.zeros(shape.num_layers),
        lambda state, access: (state, access.lookahead),
        reach=SHAPE.depth,
    )
    _, wrapped = play(with_prefetch(lfu(), predictor), accesses)
    _, plain = play(lfu(), accesses)
    for row, plain_row, asked in zip(wrapped, plain, accesses, strict=True):
        for one, alone, access in zip(row, plain_row, asked, strict=True):
            np.testing.assert_array_equal(one.keep_score, alone.keep_score)
            np.testing.assert_array_equal(one.prefetch_probability, access.lookahead)
    strategy = lru()
    assert host_compute(strategy) == strategy._replace(computes_on_host=True)


def test_nothing_is_prefetched_beyond_the_depth_that_is_given(accesses):
    predictor = Predictor(
        lambda shape: jnp.zeros(shape.num_layers),
        lambda state, access: (state, jnp.ones_like(access.lookahead)),
        reach=SHAPE.depth,
    )
    for depth in range(SHAPE.depth + 1):
        _, decisions = play(within_reach(with_prefetch(lfu(), predictor), depth), accesses)
        for decision in decisions[0]:
            expected = (np.arange(SHAPE.depth) < depth) * NUM_EXPERTS
            np.testing.assert_array_equal(decision.prefetch_probability.sum(-1), expected)


def demands(sets: list[set[int]]) -> list[list[Access]]:
    """One layer that demands these sets; enough of an access for strategies of retention."""
    rows = []
    for event, members in enumerate(sets):
        demand = jnp.zeros(NUM_EXPERTS, jnp.int32).at[jnp.array(sorted(members))].set(1)
        rows.append(
            Access(
                event=jnp.int32(event),
                layer=jnp.int32(0),
                demand=demand,
                above=demand,
                below_before=None,
                resident=None,
                resident_ahead=None,
                capacity=jnp.int32(3),
                capacity_ahead=None,
                lookahead=None,
                future=None,
            )
        )
    return rows


def last_score(strategy, sets):
    state = jax.tree.map(lambda leaf: leaf[0], strategy.init(CacheShape(1, NUM_EXPERTS, 1, 0)))
    step = jax.jit(strategy.step)
    for access in demands(sets):
        state, decision = step(state, access, KEY)
    return state, decision.keep_score


def test_a_duel_is_ruled_by_who_would_have_missed_less():
    # Two hot experts between scans of the others: frequency wins, recency loses them.
    scan = [{0, 1} if i % 4 == 0 else {2 + i % 8} for i in range(120)]
    contest = duel(lfu(), lru())
    state, score = last_score(contest, scan)
    assert state.num_misses[0] < state.num_misses[1]
    np.testing.assert_array_equal(score, last_score(lfu(), scan)[1])
    # Then the hot set moves on: old counts mislead, and recency rules again.
    moved = scan + [{7 + i % 3} for i in range(100)]
    state, score = last_score(duel(lfu(), lru()), [{0}, {1}, {2}] * 60 + moved[120:])
    assert state.num_misses[1] < state.num_misses[0]
    np.testing.assert_array_equal(score, last_score(lru(), [{0}, {1}, {2}] * 60 + moved[120:])[1])


def test_shadows_of_a_duel_never_exceed_the_capacity():
    state, _ = last_score(duel(lfu(), lru()), [{i % 10, (3 * i) % 10} for i in range(40)])
    np.testing.assert_array_equal(state.shadow.sum(-1), [3, 3])


# --- what is learned --------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [(0,), (0, 25), (0, 1, 2, 59)])
def test_profile_counts_equal_a_literal_count(starts):
    trace = make_trace(5, starts=starts)
    profile = learn_profile(trace)
    num_uses = np.zeros((NUM_LAYERS, NUM_EXPERTS))
    transition = np.zeros((NUM_LAYERS, 3, NUM_EXPERTS, NUM_EXPERTS))
    successor = np.zeros((NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS))
    for begin, end in zip(trace.request_start[:-1], trace.request_start[1:], strict=True):
        request = trace.experts[begin:end].reshape(-1, TOPK).tolist()
        for event, chosen in enumerate(request):
            layer = event % NUM_LAYERS
            for i in chosen:
                if i == 255:
                    continue
                num_uses[layer, i] += 1
                for ahead in range(1, 5):
                    later = request[event + ahead] if event + ahead < len(request) else []
                    for j in later:
                        if j == 255:
                            continue
                        if ahead < 4:
                            transition[layer, ahead - 1, i, j] += 1
                        else:
                            successor[layer, i, j] += 1
    np.testing.assert_array_equal(profile.num_uses, num_uses)
    np.testing.assert_array_equal(profile.transition, transition)
    np.testing.assert_array_equal(profile.successor, successor)
    assert profile.num_tokens == 60


def test_profile_counts_do_not_depend_on_the_block(monkeypatch):
    whole = learn_profile(make_trace(5))
    monkeypatch.setattr("moejax.strategies._profile._BLOCK_TOKENS", 7)
    blocks = learn_profile(make_trace(5))
    for name in ("num_uses", "transition", "successor"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(blocks, name))


def test_learned_weights_are_finite_and_a_short_trace_teaches_none():
    learned = learn_reuse_weights(make_trace(6, num_tokens=600, starts=(0, 290)))
    horizons = learned.horizon_steps
    assert (np.diff(horizons) > 0).all()
    assert learned.weights.shape == (len(horizons), len(FEATURES))
    assert np.isfinite(learned.weights).all()
    assert learn_reuse_weights(make_trace(6)) is None


def test_experts_that_hardly_ever_come_back_still_teach():
    experts = np.random.default_rng(7).integers(0, 1024, (512, 1, 1)).astype(np.uint16)
    learned = learn_reuse_weights(Trace(experts, 1024, np.array([0, 256, 512], np.int64)))
    assert learned.horizon_steps.tolist() == [64]


def test_popularity_is_learned_where_popularity_is_all_there_is():
    """Tokens are independent, so a habit of use says more than when the last use was."""
    learned = learn_reuse_weights(make_trace(6, num_tokens=1200, starts=(0, 600)))
    weights = dict(zip(FEATURES, learned.weights[-1], strict=True))
    assert weights["popularity"] > 3 * abs(weights["recency"])


def test_unlearned_reuse_orders_experts_as_recency_does(accesses):
    _, learned = play(reuse(None), accesses)
    _, plain = play(lru(), accesses)
    for layer in range(NUM_LAYERS):
        np.testing.assert_array_equal(
            rank_by_score(learned[-1][layer].keep_score), rank_by_score(plain[-1][layer].keep_score)
        )


def constant(chance: float) -> Predictor:
    """Says that the next layer demands expert 0."""
    said = jnp.zeros((SHAPE.depth, NUM_EXPERTS)).at[0, 0].set(chance)
    return Predictor(
        lambda shape: jnp.zeros(shape.num_layers), lambda state, access: (state, said), SHAPE.depth
    )


def test_calibration_falls_when_predictions_fail_and_recovers_when_they_hold(accesses):
    predictor = calibrated(constant(0.9))
    state = jax.tree.map(lambda leaf: leaf[0], predictor.init(SHAPE))
    step = jax.jit(predictor.step)
    right = jnp.zeros((SHAPE.depth, NUM_EXPERTS), jnp.int32).at[0, 0].set(1)
    wrong = jnp.roll(right, 1, axis=1)
    said = []
    for came in [right] * 100 + [wrong] * 100 + [right] * 200:
        state, chance = step(state, accesses[0][0]._replace(below_before=came))
        said.append(float(chance[0, 0]))
    # It starts sceptical: one confident prediction is not yet worth a copy.
    assert said[0] < 0.5
    assert said[99] > 0.85
    assert said[199] < 0.1
    assert said[-1] > 0.85
    assert np.diff(said[101:200]).max() <= 0


def test_transitions_learn_where_layers_lead_also_from_the_last_to_the_first():
    """Expert e of any layer is followed by e + 1 of the next, e + 2 of the one after, ..."""
    start = np.random.default_rng(7).integers(0, NUM_EXPERTS, 80)
    experts = np.cumsum(np.ones((80, NUM_LAYERS), int), axis=1) - 1 + start[:, None]
    # Each step continues the one before, so that the last layer leads into the first.
    experts[:] = (np.arange(80 * NUM_LAYERS).reshape(80, NUM_LAYERS)) % NUM_EXPERTS
    lane = replay(experts[:, :, None].astype(np.uint8), NUM_EXPERTS)
    nobody, capacity = jnp.zeros((NUM_LAYERS, NUM_EXPERTS), bool), jnp.zeros(NUM_LAYERS, jnp.int32)
    predictor = transitions(None, online=True)
    shape = SHAPE._replace(topk=1)

    def one_step(state, moment):
        def one(state, layer):
            return predictor.step(state, access_at(moment, layer, shape, nobody, capacity))

        return jax.vmap(one)(state, jnp.arange(NUM_LAYERS))

    _, chance = jax.jit(lambda rows: jax.lax.scan(one_step, predictor.init(shape), rows))(
        moments(lane)
    )
    events = np.arange(80 * NUM_LAYERS).reshape(80, NUM_LAYERS)[-1]
    for layer, event in enumerate(events):
        for ahead in range(3):
            said = np.asarray(chance[-1, layer, ahead])
            assert said.argmax() == (event + 1 + ahead) % NUM_EXPERTS
            assert said.max() > 0.5
            assert np.sort(said)[-2] < 0.2
    # Before anything followed, nothing is known.
    assert np.ptp(np.asarray(chance[0, 0])) == 0


def test_a_decision_says_nothing_more_than_a_score_unless_asked():
    assert Decision(jnp.zeros(3))[1:] == (None, None)
