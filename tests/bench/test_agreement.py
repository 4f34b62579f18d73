"""Rankings of strategies on a workload beside those on other routing."""

import dataclasses

import numpy as np
import pytest

from moejax.bench import compare_rankings
from moejax.errors import UsageError
from moejax.workloads import WORKLOADS, make_trace

SLOTS = (4, 8, 16)
STRATEGIES = ("lru", "lfu", "oracle")


def few_layers(name, **changes):
    return dataclasses.replace(WORKLOADS[name], num_layers=2, **changes)


def ranked(workload, other, **options):
    drawn = make_trace(other, num_requests=4, tokens_per_request=64, seed=9)
    return compare_rankings(workload, drawn, SLOTS, strategies=STRATEGIES, seed=1, **options)


def test_a_workload_agrees_with_another_draw_of_itself():
    workload = few_layers("olmoe-1b-7b")
    found = ranked(workload, workload)
    assert found.mean_tau == 1.0
    assert found.is_same_ranking
    assert found.is_same_winner
    assert found.loss_ratio == (0.0, 0.0, 0.0)
    # Three of four requests of 64 tokens: one is profile.
    assert found.num_steps == 192
    np.testing.assert_allclose(found.workload_hit_ratio, found.recorded_hit_ratio, atol=0.08)
    assert (found.workload_hit_ratio[2] >= found.workload_hit_ratio[:2]).all()


def test_opposite_routing_is_told_apart():
    """Fixed popularity favours counts; a phrase that ends for good favours recency."""
    still = dict.fromkeys(("topic_share", "phrase_share", "token_share"), 0.0)
    base = WORKLOADS["olmoe-1b-7b"].parameters
    popular = few_layers("olmoe-1b-7b", parameters={**base, **still, "popularity": 1.0})
    bursty = few_layers(
        "olmoe-1b-7b",
        parameters={**base, **still, "popularity": 0.01, "phrase_share": 1.0, "phrase_memory": 0.9},
    )
    found = ranked(popular, bursty)
    assert found.tau == (pytest.approx(1 / 3),) * 3
    assert not found.is_same_ranking
    assert not found.is_same_winner
    assert max(found.loss_ratio) > 0.1


def test_experts_a_token_are_those_of_the_recording():
    workload = few_layers("olmoe-1b-7b")
    fewer = ranked(workload, dataclasses.replace(workload, num_experts_per_tok=4))
    same = ranked(workload, workload)
    assert (fewer.workload_hit_ratio[0] > same.workload_hit_ratio[0]).any()
    assert fewer.mean_tau >= 0.6


def test_other_numbers_of_experts_are_refused():
    with pytest.raises(UsageError, match="60 experts a layer and the recording 64"):
        ranked(few_layers("qwen1.5-moe"), few_layers("olmoe-1b-7b"))
