"""How time grows with capacities, layers and steps: ratios in one run, never seconds."""

import time

import jax
import numpy as np
import pytest

from moejax.simulate import ranks, stream
from moejax.strategies import STRATEGIES

KEY = jax.random.key(0)
TOPK = 4


def make_experts(num_steps: int, num_layers: int, num_experts: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    score = rng.random((num_steps, num_layers, num_experts), np.float32)
    return np.argsort(-score, axis=-1)[..., :TOPK].astype(np.uint8)


def seconds(name: str, *, num_layers: int, num_slots: int, num_steps: int = 4096) -> float:
    """Processor time of all threads, which a busy machine does not change; the least of five.

    The replay before them may compile.
    """
    num_experts = 64
    lane = stream(make_experts(num_steps, num_layers, num_experts), num_experts)
    slots = np.linspace(1, num_experts, num_slots).astype(np.int32)
    strategy = STRATEGIES[name].make(None)

    def once() -> float:
        start = time.process_time()
        ranks(strategy, lane, slots, KEY, topk=TOPK)
        return time.process_time() - start

    return min([once() for _ in range(6)][1:])


@pytest.mark.parametrize("name", ["lru", "lfu"])
def test_another_capacity_costs_a_fraction_of_the_first(name):
    """Eight times the capacities share scores and rank planes: far below eight times the time."""
    few = seconds(name, num_layers=8, num_slots=8)
    many = seconds(name, num_layers=8, num_slots=64)
    assert many < 4 * few


def test_time_grows_no_faster_than_the_layers():
    few = seconds("lru", num_layers=6, num_slots=16)
    many = seconds("lru", num_layers=24, num_slots=16)
    assert many < 1.5 * 4 * few


def test_time_grows_no_faster_than_the_trace():
    short = seconds("lru", num_layers=8, num_slots=16)
    long = seconds("lru", num_layers=8, num_slots=16, num_steps=4 * 4096)
    assert long < 1.5 * 4 * short
