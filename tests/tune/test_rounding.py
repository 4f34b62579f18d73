"""Whole slots: never over budget, never worse than what they started from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.tune import Split
from moejax.tune._relaxed import relaxed_optimum
from moejax.tune._rounding import improve, round_down, tier_bytes, uniform_split
from moejax.tune._step import split_objective

from ._tiers import EXPERT_BYTES, problem, ragged_curve


def fits(asked, split) -> bool:
    retained, landing, pinned, pageable = split
    return bool(
        np.all(split >= 0)
        and np.all(retained + pinned + pageable <= asked.num_experts)
        and np.all(retained + landing <= asked.num_experts)
        and np.all(tier_bytes(asked, split) <= asked.slot_budgets_bytes)
    )


@pytest.mark.parametrize("seed", range(4))
def test_stays_within_budgets_and_never_gets_worse(seed):
    rng = np.random.default_rng(seed)
    asked = problem(
        ragged_curve(6, 12, seed),
        num_slots=rng.uniform(3, 75),
        num_pinned=rng.uniform(0, 30),
        num_host=rng.uniform(0, 30),
        recall_ratio=0.97,
        expert_bytes=(rng.integers(1, 4, 6) * EXPERT_BYTES).tolist(),
    )
    splits, values = relaxed_optimum(asked.numbers, jax.random.key(seed), objective="latency")
    starts = [uniform_split(asked)]
    starts += [round_down(Split(*(field[one] for field in splits))) for one in range(len(values))]
    for start in starts:
        assert fits(asked, start)
    for start in starts[:3]:
        better = improve(asked, start, "latency")
        assert fits(asked, better)
        assert _value(asked, better) <= _value(asked, start)


def test_no_single_change_helps_any_more():
    asked = problem(ragged_curve(6, 12, 5), num_slots=20, num_pinned=15)
    split = improve(asked, uniform_split(asked), "latency")
    now = _value(asked, split)
    for giver in range(6):
        for taker in range(6):
            swapped = split.copy()
            swapped[[0, 2], giver] += [-1, 1]
            swapped[[0, 2], taker] += [1, -1]
            if fits(asked, swapped):
                assert _value(asked, swapped) >= now * (1 - 2e-6)


def test_uniform_gives_the_remainder_to_the_first_layers():
    asked = problem(num_slots=26.9, num_pinned=50, num_host=1)
    retained, landing, pinned, pageable = uniform_split(asked)
    assert retained.tolist() == [5, 5, 4, 4, 4, 4]
    assert landing.sum() == 0
    assert (retained + pinned + pageable).tolist() == [12] * 6
    assert (pinned.sum(), pageable.sum()) == (46, 0)


def _value(asked, split) -> float:
    as_split = Split(*jnp.asarray(split, jnp.float32))
    return float(split_objective(asked.numbers, as_split, objective="latency"))
