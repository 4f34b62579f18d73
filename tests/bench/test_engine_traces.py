import jax
import numpy as np
import pytest

from moejax.bench._engine_traces import foreseeable_trace, trace_of_hit_ratio, true_lookahead
from moejax.errors import UsageError
from moejax.simulate import Marks, ranks, replay
from moejax.strategies import STRATEGIES
from moejax.trace import not_computed

LAYERS, EXPERTS, TOPK = 6, 24, 4


def hit_ratio(experts: np.ndarray, name: str, slots: int, num_warmup: int) -> float:
    """Of the exact simulator, over the steps after the warm-up."""
    lane = replay(experts, EXPERTS)
    is_counted = np.arange(len(experts)) >= num_warmup
    marks = Marks(is_counted, np.zeros(len(experts), bool))
    strategy = STRATEGIES[name].make(None)
    capacities = np.array([slots], np.int32)
    counts = ranks(strategy, lane, capacities, jax.random.key(0), topk=TOPK, marks=marks)
    return float(counts.num_decode_hits.sum() / counts.num_decode_demands.sum())


@pytest.mark.parametrize(
    ("wanted", "batch_size", "slots"), [(0.9, 1, 8), (0.5, 1, 8), (0.8, 3, 16)]
)
def test_lru_sees_the_ratio(wanted, batch_size, slots):
    experts = trace_of_hit_ratio(120, LAYERS, EXPERTS, TOPK, batch_size, slots, wanted, seed=3)
    assert experts.shape == (120, LAYERS, batch_size * TOPK)
    assert hit_ratio(experts, "lru", slots, 20) == pytest.approx(wanted, abs=0.025)


def test_the_ends_are_exact():
    never = trace_of_hit_ratio(30, LAYERS, EXPERTS, TOPK, 1, 8, 0.0)
    always = trace_of_hit_ratio(30, LAYERS, EXPERTS, TOPK, 1, 8, 1.0)
    assert hit_ratio(never, "lru", 8, 0) == 0.0
    assert hit_ratio(always, "lru", 8, 8) == 1.0


def test_a_request_gets_no_expert_twice_and_all_are_used():
    experts = trace_of_hit_ratio(20, 2, EXPERTS, TOPK, 5, 16, 0.7, num_distinct=14)
    places = np.sort(experts.reshape(20, 2, 5, TOPK), axis=-1)
    assert (np.diff(places.astype(int), axis=-1) > 0).all()
    assert {len(set(row)) for row in experts.reshape(-1, 5 * TOPK).tolist()} == {14}


def test_a_seed_gives_the_same_trace_again():
    traces = [trace_of_hit_ratio(9, 2, EXPERTS, TOPK, 1, 8, 0.5, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(traces[0], traces[1])
    assert (traces[0] != traces[2]).any()


def test_no_retention_avoids_foreseeable_misses():
    experts = foreseeable_trace(150, LAYERS, EXPERTS, TOPK, 8, 0.95, seed=1)
    assert hit_ratio(experts, "lru", 8, 30) == pytest.approx(0.95, abs=0.005)
    # The last expert of every circle may stay for the first of the next one.
    assert hit_ratio(experts, "oracle", 8, 30) == pytest.approx(0.95, abs=0.02)


def test_foreseeable_misses_are_spread_evenly():
    experts = foreseeable_trace(200, LAYERS, EXPERTS, TOPK, 8, 0.95, seed=1)
    seen, misses = [np.zeros(EXPERTS, int) for _ in range(LAYERS)], []
    for event, chosen in enumerate(experts.reshape(-1, TOPK)):
        uses = seen[event % LAYERS]
        uses[chosen] += 1
        misses += [event] if (uses[chosen] == 1).any() else []
    # After the slots have filled, first uses of rare experts come every fifth event.
    late = [event for event in misses if event > 20 * LAYERS]
    assert set(np.diff(late[:12])) == {5}


def test_true_lookahead_names_what_comes_in_the_same_token():
    experts = trace_of_hit_ratio(5, 4, EXPERTS, TOPK, 2, 8, 0.5)
    said = true_lookahead(experts, 2, depth=2)
    assert said.shape == (5, 4, 2, 2, 2 * TOPK)
    np.testing.assert_array_equal(said[:, 0, 0, :, :TOPK].reshape(5, -1), experts[:, 1])
    np.testing.assert_array_equal(said[:, 1, 1, :, :TOPK].reshape(5, -1), experts[:, 3])
    assert (said[..., TOPK:] == not_computed(experts)).all()
    assert (said[:, 3] == not_computed(experts)).all()
    assert (said[:, 2, 1] == not_computed(experts)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((TOPK, 1, 8, 1.5), "hit ratio of 1.5"), ((TOPK, 1, 8, 0.5, 3), "cannot demand 3 of 24")],
)
def test_impossible_traces_are_refused(arguments, words):
    *fixed, ratio = arguments[:4]
    distinct = arguments[4] if len(arguments) > 4 else None
    with pytest.raises(UsageError, match=words):
        trace_of_hit_ratio(3, 2, EXPERTS, *fixed, ratio, num_distinct=distinct)


@pytest.mark.parametrize(("slots", "ratio", "words"), [(4, 0.95, "4 slots"), (8, 0.5, "of 0.5")])
def test_impossible_foresight_is_refused(slots, ratio, words):
    with pytest.raises(UsageError, match=words):
        foreseeable_trace(3, 2, EXPERTS, TOPK, slots, ratio)
