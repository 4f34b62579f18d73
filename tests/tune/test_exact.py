"""The exact search against brute force over every split of tiny problems."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.tune import Split
from moejax.tune._exact import (
    _by_device_slots,
    dual_optimum,
    layer_lines,
    optimum_bound,
    uniform_optimum,
)
from moejax.tune._rounding import tier_bytes
from moejax.tune._step import objective_terms, split_objective

from ._tiers import EXPERT_BYTES, concave_curve, problem, ragged_curve


def brute_force(asked, objective="latency") -> float:
    """The best of every whole split of two layers or three."""
    num_experts = asked.num_experts
    options = np.array(
        [
            option
            for option in itertools.product(range(num_experts + 1), repeat=4)
            if option[0] + option[2] + option[3] <= num_experts
            and option[0] + option[1] <= num_experts
            and option[1] <= float(asked.numbers.max_landing)
        ]
    )
    splits = jnp.broadcast_to(
        jnp.asarray(options, jnp.float32)[:, :, None], (*options.shape, asked.num_layers)
    )
    terms = jax.vmap(lambda one: objective_terms(asked.numbers, Split(*one), objective)[0])(splits)
    empty = split_objective(asked.numbers, Split(*splits[0]), objective=objective)
    fixed = float(empty) - float(terms[0].sum())
    tiers = np.stack([options[:, 0] + options[:, 1], options[:, 2], options[:, 3]], axis=1)
    total, used = np.zeros(1), np.zeros((1, 3), np.int64)
    for layer, size in enumerate(asked.expert_bytes):
        total = (total[:, None] + np.asarray(terms, np.float64)[None, :, layer]).ravel()
        used = (used[:, None] + size * tiers[None]).reshape(-1, 3)
        fits = np.all(used <= asked.slot_budgets_bytes, axis=1)
        total, used = total[fits], used[fits]
    return float(total.min()) + fixed


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("objective", ["latency", "bytes"])
def test_device_optimum_is_exact_where_host_memory_is_plenty(seed, objective):
    asked = problem(
        ragged_curve(3, 4, seed), num_slots=1 + 2 * (seed % 3), num_demands=1.5, recall_ratio=0.97
    )
    assert float(asked.numbers.max_landing) == 1
    bound = optimum_bound(asked, objective)
    assert bound.value == pytest.approx(brute_force(asked, objective), rel=1e-5)
    assert bound.device_slots.sum() * EXPERT_BYTES <= asked.budget_bytes


@pytest.mark.parametrize("seed", range(6))
def test_is_a_bound_where_host_memory_is_scarce(seed):
    asked = problem(
        ragged_curve(3, 4, seed), num_slots=2, num_pinned=3, num_host=seed % 4, num_demands=1.5
    )
    exact = brute_force(asked)
    bound = optimum_bound(asked, "latency").value
    assert bound <= exact * (1 + 1e-5)
    assert bound >= 0.5 * exact


def test_is_tight_where_host_memory_is_scarce_and_curves_are_concave():
    asked = problem(concave_curve(3, 5), num_slots=4, num_pinned=4, num_host=3)
    assert optimum_bound(asked, "latency").value >= 0.97 * brute_force(asked)


@pytest.mark.parametrize("sizes", [(1.0, 2.0, 3.0), (1.0, 1.0001, 0.7003)])
def test_experts_of_different_sizes(sizes):
    asked = problem(
        ragged_curve(3, 4, 1),
        num_slots=6,
        expert_bytes=[int(size * EXPERT_BYTES) for size in sizes],
    )
    exact = brute_force(asked)
    bound = optimum_bound(asked, "latency").value
    assert exact * 0.98 <= bound <= exact * (1 + 1e-5)


def test_uniform_optimum_tries_every_equal_split():
    asked = problem(ragged_curve(3, 5, 2), num_slots=7, num_pinned=4, num_host=7)
    best = np.inf
    for retained, pinned, pageable in itertools.product(range(6), repeat=3):
        split = np.repeat([[retained], [0], [pinned], [pageable]], 3, axis=1)
        if retained + pinned + pageable <= 5 and np.all(
            tier_bytes(asked, split) <= asked.slot_budgets_bytes
        ):
            best = min(best, _value(asked, split))
    found = uniform_optimum(asked, "latency")
    assert np.all(found == found[:, :1])
    assert np.all(tier_bytes(asked, found) <= asked.slot_budgets_bytes)
    assert _value(asked, found) == pytest.approx(best, rel=1e-6)


def test_more_memory_is_never_worth_less():
    asked = problem(num_slots=20, num_pinned=15, num_host=10)
    lines = layer_lines(asked, "latency")
    budgets = np.array(asked.slot_budgets_bytes, np.float64)
    for tier in range(3):
        more = [
            dual_optimum(asked, lines, budgets + num * EXPERT_BYTES * np.eye(3)[tier])[0]
            for num in (0, 5, 10, 15)
        ]
        saved = -np.diff(more)
        assert np.all(saved >= -1e-6 * more[0])
        assert np.all(np.diff(saved) <= 1e-5 * more[0])


def _value(asked, split) -> float:
    as_split = Split(*jnp.asarray(split, jnp.float32))
    return float(split_objective(asked.numbers, as_split, objective="latency"))


def test_a_model_may_have_fewer_experts_than_slots_to_land_in():
    values = np.arange(12, dtype=float).reshape(1, 4, 3)
    best = _by_device_slots(values, num_experts=2)
    # Of 0 slots only 0 can land; 1 and 2 slots are best used without landing any.
    np.testing.assert_array_equal(best, [[0.0, 1.0, 2.0]])
