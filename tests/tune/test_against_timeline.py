"""What the tuner predicts beside what the timeline simulates for the same slots."""

import jax
import numpy as np
import pytest

from moejax.cards import load_hardware, load_model
from moejax.cost import layer_clock
from moejax.simulate import lru_hit_curve, replay, timeline
from moejax.strategies import lru
from moejax.trace import batch_trace
from moejax.tune import Split, predict, tier_problem
from moejax.workloads import WORKLOADS, make_trace

MODEL, HARDWARE = load_model("qwen1.5-moe-a2.7b"), load_hardware("rtx-3090")
NUM_STEPS = 256


@pytest.fixture(scope="module")
def experts():
    trace = make_trace(WORKLOADS["qwen1.5-moe"], num_requests=2, tokens_per_request=128, seed=3)
    return batch_trace(trace, 1)


@pytest.fixture(scope="module")
def simulated_s(experts):
    """Mean step latency of lru with 8, 30, 45 and 52 slots a layer."""
    lane = replay(experts, MODEL.num_experts, with_future=False)
    clock = layer_clock(HARDWARE, MODEL, batch_size=1)
    slots = np.repeat(np.array([8, 30, 45, 52], np.int32)[:, None], MODEL.num_moe_layers, axis=1)

    def mean_step_s(capacity):
        key = jax.random.key(0)
        record = timeline(lru(), lane, clock, capacity, key, topk=MODEL.num_experts_per_tok)
        return (record.compute_s + record.stall_s).sum(-1).mean()

    found = np.asarray(jax.jit(jax.vmap(mean_step_s))(slots))
    return dict(zip(slots[:, 0].tolist(), found.tolist(), strict=True))


@pytest.mark.parametrize("counts_steps", [True, False], ids=["counted", "assumed"])
def test_the_mean_step_is_that_of_the_timeline(experts, simulated_s, counts_steps):
    curve = lru_hit_curve(experts, MODEL.num_experts, keep_steps=NUM_STEPS)
    numbers = tier_problem(
        HARDWARE,
        MODEL,
        curve.hit_ratio,
        curve.num_demands / curve.num_steps,
        budget_bytes=10**10,
        sample_misses=curve.step_misses if counts_steps else None,
    ).numbers
    for slots, expected_s in simulated_s.items():
        layers = np.full(MODEL.num_moe_layers, float(slots), np.float32)
        split = Split(layers, 0 * layers, 60 - layers, 0 * layers)
        # First touches would come from the store in the tuner's tiers: all of them are pinned here.
        numbers = numbers._replace(store_s=numbers.clock.copy_s)
        found_s = float(predict(numbers, split).step_latency_s)
        assert found_s == pytest.approx(expected_s, rel=0.01 if counts_steps else 0.03)
