"""Stating the question: what is checked, what is infeasible, what the budget pays for."""

import numpy as np
import pytest

from moejax.cost import workspace_bytes
from moejax.errors import InfeasibleBudgetError, UsageError
from moejax.tune import tier_problem

from ._tiers import EXPERT_BYTES, HARDWARE, concave_curve, model, problem


def test_slots_only_needs_one_expert():
    with pytest.raises(InfeasibleBudgetError) as caught:
        problem(num_slots=0.999)
    assert str(EXPERT_BYTES) in caught.value.hint
    assert "10.0 MB" in caught.value.hint
    assert problem(num_slots=1).slot_budgets_bytes[0] == EXPERT_BYTES


def test_the_largest_expert_decides():
    sizes = [EXPERT_BYTES] * 5 + [3 * EXPERT_BYTES]
    with pytest.raises(InfeasibleBudgetError) as caught:
        problem(num_slots=2.9, expert_bytes=sizes)
    assert str(3 * EXPERT_BYTES) in caught.value.hint


def test_dense_weights_share_the_budget():
    spec = model()
    kv_bytes = 4 * 100 * spec.kv_bytes_per_token
    fixed_bytes = spec.dense_bytes + kv_bytes + workspace_bytes(spec, 4) + EXPERT_BYTES

    def ask(budget_bytes: int):
        return tier_problem(
            HARDWARE,
            spec,
            concave_curve(),
            np.full(6, 2.0),
            budget_bytes=budget_bytes,
            batch_size=4,
            context_tokens=100,
            include_dense=True,
        )

    assert ask(fixed_bytes + 5).slot_budgets_bytes[0] == 5
    with pytest.raises(InfeasibleBudgetError) as caught:
        ask(fixed_bytes - 1)
    assert str(fixed_bytes) in caught.value.hint


def test_curves_that_fall_leave_slots_idle():
    curve = concave_curve()
    curve[2, 7] = curve[2, 3]
    num_misses = np.asarray(problem(curve, num_slots=9).numbers.num_misses)
    assert np.all(np.diff(num_misses, axis=1) <= 0)
    assert num_misses[2, 7] == num_misses[2, 6] == pytest.approx(2 * (1 - curve[2, 6]))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"num_slots": -1}, "device budget"),
        ({"num_pinned": -1}, "pinned budget"),
        ({"num_host": -1}, "pageable host budget"),
        ({"recall_ratio": 1.5}, "recall"),
        ({"recall_ratio": float("nan")}, "recall"),
        ({"lookahead_depth": 0}, "lookahead"),
        ({"expert_bytes": [1, 2]}, "2 expert sizes"),
        ({"curve": concave_curve()[:, :-1] * np.nan}, "hit curve"),
        ({"curve": concave_curve() * 1.1}, "hit curve"),
        ({"num_demands": -1.0}, "demand"),
    ],
)
def test_refuses(options, cause):
    with pytest.raises(UsageError) as caught:
        problem(**{"num_slots": 9, **options})
    assert cause in caught.value.cause


def test_refuses_the_curve_of_another_model():
    with pytest.raises(UsageError) as caught:
        tier_problem(HARDWARE, model(5), concave_curve(), np.ones(6), budget_bytes=10**9)
    assert "5 MoE layers" in caught.value.cause
    assert "--model" in caught.value.hint


def test_sample_steps_are_thinned_and_halved():
    samples = np.broadcast_to(np.arange(5000.0)[:, None, None], (5000, 6, 13))
    asked = problem(num_slots=9, sample_misses=samples)
    tuned, check = (
        set(np.asarray(half)[:, 0, 0].tolist())
        for half in (asked.numbers.sample_misses, asked.check_misses)
    )
    assert len(tuned) == len(check) == 512
    assert not tuned & check
    single = problem(num_slots=9, sample_misses=samples[:1])
    assert len(single.numbers.sample_misses) == len(single.check_misses) == 1


def test_prefetching_is_ruled_out_where_it_cannot_pay():
    # One copy takes far longer than the window, so a guess must be nearly certain.
    assert float(problem(num_slots=9, recall_ratio=0.5).numbers.max_landing) == 0
    certain = problem(num_slots=9, recall_ratio=1.0).numbers
    assert float(certain.max_landing) == 1
    assert float(certain.recall_ratio[0]) == 0
