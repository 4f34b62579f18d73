"""The fractional split: within budgets, spending them, compiled once for all budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.tune import _relaxed
from moejax.tune._exact import optimum_bound
from moejax.tune._relaxed import SplitLogits, relaxed_optimum, spend

from ._tiers import EXPERT_BYTES, concave_curve, problem


@pytest.mark.parametrize("num_slots", [1, 17.5, 70, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_budgets_are_spent_and_kept(num_slots, seed):
    asked = problem(num_slots=num_slots, num_pinned=9.5, num_host=3, recall_ratio=1.0)
    logits = np.random.default_rng(seed).normal(scale=4.0, size=(4, 6))
    split = spend(asked.numbers, SplitLogits(*jnp.asarray(logits, jnp.float32)))
    retained, landing, pinned, pageable = (np.asarray(field, np.float64) for field in split)
    device = float(np.sum(retained + landing))
    assert device == pytest.approx(min(num_slots, 72), rel=1e-4)
    assert np.sum(pinned) == pytest.approx(min(9.5, 72 - np.sum(retained)), rel=1e-3, abs=1e-3)
    assert np.all(retained + pinned + pageable <= 12 + 1e-4)
    assert min(field.min() for field in (retained, landing, pinned, pageable)) >= 0
    assert landing.max() <= float(asked.numbers.max_landing) + 1e-6


def test_comes_close_to_the_exact_optimum():
    asked = problem(num_slots=24, num_pinned=20)
    _, values = relaxed_optimum(asked.numbers, jax.random.key(0), objective="latency")
    assert float(values.min()) <= 1.005 * optimum_bound(asked, "latency").value


def test_one_compilation_serves_every_budget(monkeypatch):
    num_traces = 0
    descend = _relaxed._descend

    def counting(*arguments):
        nonlocal num_traces
        num_traces += 1
        return descend(*arguments)

    monkeypatch.setattr(_relaxed, "_descend", counting)
    # A shape no other test has, so that nothing is compiled yet.
    curve = concave_curve(5, 7)
    for num_slots in (3, 30, 34):
        numbers = problem(curve, num_slots=num_slots, num_pinned=num_slots).numbers
        relaxed_optimum(numbers, jax.random.key(num_slots), objective="latency")
    assert num_traces == 1


def test_experts_of_different_sizes_are_charged_by_their_bytes():
    sizes = np.array([1, 1, 2, 2, 3, 3]) * EXPERT_BYTES
    asked = problem(num_slots=30, expert_bytes=sizes.tolist())
    split = spend(asked.numbers, SplitLogits(*jnp.zeros((4, 6))))
    assert float(np.asarray(split.retained) @ sizes) == pytest.approx(30 * EXPERT_BYTES, rel=1e-4)
