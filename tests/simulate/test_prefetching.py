"""Does prefetching pay where it can, and does it stop where it does not?"""

import jax
import numpy as np
import pytest

from moejax.cards import load_hardware, load_model
from moejax.cost import layer_clock
from moejax.simulate import replay
from moejax.strategies import gate_look, intelligent, learn_profile, lru, multi_look
from moejax.workloads import WORKLOADS, make_trace

NUM_PREDICTABLE, NUM_ADVERSARIAL, NUM_SETTLING = 60, 140, 40
SLOTS = np.full((1, 24), 8, np.int32)
CLOCK = layer_clock(load_hardware("rtx-3090"), load_model("qwen1.5-moe-a2.7b"), batch_size=1)
NAMES = ("gate_look", "multi_look", "intelligent")


def drawn(workload, num_tokens, seed):
    return make_trace(WORKLOADS[workload], num_requests=1, tokens_per_request=num_tokens, seed=seed)


def lane_of(traces):
    experts = np.concatenate([trace.experts for trace in traces])
    said = np.concatenate([trace.lookahead for trace in traces])[:, :, :, None]
    return replay(experts, 60, with_future=False, lookahead=said)


@pytest.fixture(scope="module")
def strategies():
    """The adaptive ones have learned that experts can be predicted."""
    profile = learn_profile(drawn("predictable", 256, 77))
    return {
        "lru": lru(),
        "gate_look": gate_look(),
        "multi_look": multi_look(profile),
        "intelligent": intelligent(profile),
    }


@pytest.fixture
def play(run_timeline, strategies):
    """Latency and prefetches of every step."""

    def run(name, lane):
        record = run_timeline(strategies[name], lane, CLOCK, SLOTS, topk=4)
        record = jax.tree.map(lambda leaf: leaf[0], record)
        latency_s = (record.compute_s + record.stall_s).sum(-1)
        return latency_s, record.num_prefetches.sum((-1, -2))

    return run


@pytest.mark.parametrize("name", NAMES)
def test_prefetching_pays_where_it_can_and_switches_itself_off(name, play):
    """At first every layer names the next one; then all predictions are made to fail."""
    parts = drawn("predictable", NUM_PREDICTABLE, 3), drawn("adversarial", NUM_ADVERSARIAL, 4)
    lane = lane_of(parts)
    (time_s, issued), (lru_s, _) = play(name, lane), play("lru", lane)
    assert issued[:NUM_PREDICTABLE].sum() > 500
    assert time_s[:NUM_PREDICTABLE].sum() < 0.95 * lru_s[:NUM_PREDICTABLE].sum()
    settled = NUM_PREDICTABLE + NUM_SETTLING
    assert issued[settled:].sum() < 0.01 * issued[:NUM_PREDICTABLE].sum()
    assert time_s[settled:].sum() < 1.01 * lru_s[settled:].sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_misleading_profile_costs_next_to_nothing(name, play):
    lane = lane_of([drawn("adversarial", NUM_PREDICTABLE + NUM_ADVERSARIAL, 5)])
    (time_s, issued), (lru_s, _) = play(name, lane), play("lru", lane)
    assert issued.sum() < 0.001 * 4 * 24 * len(issued)
    assert time_s.sum() < 1.01 * lru_s.sum()
