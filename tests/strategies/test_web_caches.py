"""The caches of the web against plain lists: SIEVE, S3-FIFO, ARC and Least-Stale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UsageError
from moejax.simulate import pool, ranks, replay
from moejax.strategies import STRATEGIES
from moejax.strategies._queue import empty_queue, front, joined, left, length

from ._web_caches import PLAIN, count_hits

KEY = jax.random.key(0)
NUM_STEPS, NUM_LAYERS, NUM_EXPERTS = 400, 3, 32


def make_experts(width: int) -> np.ndarray:
    """Skewed routing whose favourites move on, with repeats from step to step."""
    rng = np.random.default_rng(width)
    score = rng.random((NUM_STEPS, NUM_LAYERS, NUM_EXPERTS))
    favour = np.linspace(0.7, 0, NUM_EXPERTS)
    score += np.stack([np.roll(favour, 7 * (step // 80)) for step in range(NUM_STEPS)])[:, None]
    score[1:] += 0.2 * score[:-1]
    return np.argsort(-score, axis=-1)[..., :width].astype(np.uint8)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", PLAIN)
def test_hits_are_those_of_plain_lists_at_every_capacity(name, width):
    experts = make_experts(width)
    slots = np.arange(1, NUM_EXPERTS + 1)
    found = ranks(STRATEGIES[name].make(None), replay(experts, NUM_EXPERTS), slots, KEY, topk=width)
    expected = [
        [count_hits(name, [set(row) for row in column.tolist()], int(count)) for count in slots]
        for column in experts.swapaxes(0, 1)
    ]
    np.testing.assert_array_equal(found.num_hits, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_a_pool_is_refused(name):
    lane = replay(make_experts(2)[:4], NUM_EXPERTS)
    with pytest.raises(UsageError, match="a strategy that keeps each layer apart cannot"):
        pool(STRATEGIES[name].make(None), lane, np.array([8]), KEY, topk=2)


def test_a_queue_keeps_its_order_and_ignores_strangers():
    queue = empty_queue(1, 5)[0]
    for expert in (3, 0, 4):
        queue = joined(queue, jnp.arange(5) == expert)
    assert queue.tolist() == [2, 0, 0, 1, 3]
    assert joined(queue, jnp.zeros(5, bool)).tolist() == queue.tolist()
    assert left(queue, jnp.arange(5) == 1).tolist() == queue.tolist()
    assert left(queue, jnp.arange(5) == 0).tolist() == [0, 0, 0, 1, 2]
    assert front(left(queue, front(queue))).tolist() == [True, False, False, False, False]
    assert int(length(queue)) == 3
