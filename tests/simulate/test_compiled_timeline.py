"""What XLA makes of a timeline: what would be slow in it, by structure and not by seconds."""

import jax
import numpy as np

from moejax.simulate import TIMELINE_OPTIONS, replay, timeline
from moejax.strategies import STRATEGIES

NUM_EXPERTS, NUM_LAYERS = 40, 3


def test_no_reduction_over_experts_becomes_a_window(random_experts, round_clock):
    experts = random_experts(0, num_steps=4, num_experts=NUM_EXPERTS)
    lane, clock = replay(experts, NUM_EXPERTS), round_clock(NUM_LAYERS)
    strategy = STRATEGIES["intelligent"].make(None)
    capacity = np.full(NUM_LAYERS, 20, np.int32)

    def run(lane, clock, capacity, key):
        return timeline(strategy, lane, clock, capacity, key, topk=5)

    compiled = jax.jit(run).lower(lane, clock, capacity, jax.random.key(0))
    text = compiled.compile(dict(TIMELINE_OPTIONS)).as_text()
    assert "reduce(" in text
    assert "reduce-window(" not in text
