"""Random routing with sets of many sizes, and clocks of round numbers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cost import LayerClock
from moejax.simulate import Record, timeline
from moejax.trace import expert_dtype


@pytest.fixture
def random_experts() -> Callable[..., np.ndarray]:
    """Makes `experts` [steps, layers, most] with `least` to `most` distinct ids an event.

    Popularity is skewed, and part of an event's ids are those of the layer above, so that there
    is something to hit and something to predict. The largest number of the type fills sets that
    are not full.
    """

    def make(seed, *, num_steps=150, num_layers=3, num_experts=12, least=0, most=5) -> np.ndarray:
        rng = np.random.default_rng(seed)
        weight = rng.dirichlet(np.full(num_experts, 0.7), num_layers) + 0.3 / num_experts
        weight /= weight.sum(-1, keepdims=True)
        kind = expert_dtype(num_experts)
        experts = np.full((num_steps, num_layers, most), np.iinfo(kind).max, kind)
        above = np.arange(num_experts)
        for step in range(num_steps):
            for layer in range(num_layers):
                size = rng.integers(least, most + 1)
                fresh = rng.choice(num_experts, num_experts, replace=False, p=weight[layer])
                known = (above[rng.random(len(above)) < 0.5] * 5 + layer) % num_experts
                chosen = list(dict.fromkeys([*known.tolist(), *fresh.tolist()]))[:size]
                experts[step, layer, :size] = chosen
                above = np.asarray(chosen, int)
        return experts

    return make


@pytest.fixture
def round_clock() -> Callable[..., LayerClock]:
    """Makes a clock of about a microsecond a term; every field can be named."""

    def make(num_layers: int, **fields) -> LayerClock:
        one = np.ones(num_layers)
        clock = {
            "attention_s": 3e-6,
            "shared_s": 1e-6,
            "expert_read_s": 2e-6 * one,
            "expert_token_s": 1e-7 * one,
            "copy_s": 5e-6 * one,
            "host_expert_s": 4e-6 * one,
            "step_fixed_s": 7e-6,
            "overlap_ratio": 0.5,
            "shadow_copy_s": 0.0 * one,
            "expert_bytes": 1e6 * one,
        } | fields
        return LayerClock(
            **{name: jnp.asarray(value, jnp.float32) for name, value in clock.items()}
        )

    return make


@pytest.fixture(scope="session")
def run_timeline() -> Callable[..., Record]:
    """Runs the timeline over a stack of capacities, compiled once a strategy."""

    @functools.cache
    def compiled(strategy, topk, schedule):
        def one(lane, clock, slots):
            key = jax.random.key(0)
            return timeline(strategy, lane, clock, slots, key, topk=topk, schedule=schedule)

        return jax.jit(jax.vmap(one, in_axes=(None, None, 0)))

    def run(strategy, lane, clock, slots, *, topk, schedule=None) -> Record:
        lane = jax.tree.map(jnp.asarray, lane)
        return jax.device_get(compiled(strategy, topk, schedule)(lane, clock, jnp.asarray(slots)))

    return run
