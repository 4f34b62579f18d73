"""The workloads are as near to the published figures as their cards say, on requests unseen."""

import dataclasses
from types import MappingProxyType

import pytest

from moejax.errors import UsageError
from moejax.workloads import WORKLOADS, assess, calibrate, default_workload, deviations

GATED_SLOTS = (4, 8, 16, 30, 45)


@pytest.fixture(scope="module")
def fresh():
    return assess(WORKLOADS[default_workload], num_requests=4, seed=424242)


@pytest.mark.parametrize("strategy", ["lru", "lfu", "oracle"])
@pytest.mark.parametrize("slots", GATED_SLOTS)
def test_default_workload_is_near_the_published_curves(fresh, strategy, slots):
    target = WORKLOADS[default_workload].targets["hit_ratio_warm"][strategy][slots]
    assert abs(fresh["hit_ratio_warm"][strategy][slots] - target) <= 0.03


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("reuse_ratio", 0.11, 0.19),
        ("gini", 0.10, 0.18),
        ("next_layer_recall_ratio", 0.50, 0.61),
    ],
)
def test_default_workload_is_in_the_measured_ranges(fresh, name, lowest, highest):
    assert lowest <= fresh["statistics"][name] <= highest


def test_card_says_what_fresh_requests_show(fresh):
    workload = WORKLOADS[default_workload]
    for path, miss in deviations(workload.targets, workload.achieved):
        assert miss == pytest.approx(dict(deviations(workload.targets, fresh))[path], abs=0.02)


def test_reference_study_is_as_far_from_its_claims_as_its_card_says():
    workload = WORKLOADS["reference-study"]
    achieved = assess(workload, num_requests=2, seed=99)["hit_ratio"]
    for strategy, points in workload.achieved["hit_ratio"].items():
        assert achieved[strategy][32] == pytest.approx(points[32], abs=0.02)


def test_uniform_routing_hits_its_share_of_the_experts():
    workload = dataclasses.replace(
        WORKLOADS["uniform"],
        targets={"hit_ratio": {"lru": {30: 0.5}, "top_k": {30: 0.5}}},
    )
    achieved = assess(workload, num_requests=3, tokens_per_request=256, seed=1)["hit_ratio"]
    assert achieved["top_k"][30] == pytest.approx(0.5, abs=0.01)
    assert achieved["lru"][30] == pytest.approx(0.5, abs=0.03)


def test_deviations_measure_ranges_from_their_nearer_end():
    targets = {"statistics": {"gini": [0.1, 0.2]}, "hit_ratio": {"lru": {4: 0.5}}}
    inside = {"statistics": {"gini": 0.11}, "hit_ratio": {"lru": {4: 0.6}}}
    assert dict(deviations(targets, inside)) == pytest.approx(
        {("statistics", "gini"): 0.0, ("hit_ratio", "lru", 4): 0.1}
    )
    assert dict(deviations(targets, inside, margin=0.2))["statistics", "gini"] == pytest.approx(
        -0.01
    )


def test_calibrate_recovers_a_hit_ratio_made_by_known_parameters():
    known = dataclasses.replace(
        WORKLOADS["reference-study"],
        num_layers=4,
        fitted=("popularity",),
        targets={"hit_ratio": {"top_k": {32: 0.0}}},
    )
    settings = {"num_requests": 2, "tokens_per_request": 64}
    made = assess(known, **settings, seed=0)
    start = dataclasses.replace(
        known,
        targets=made,
        parameters=MappingProxyType({**known.parameters, "popularity": 0.15}),
    )
    found = calibrate(start, **settings, seed=0)
    assert found.parameters["popularity"] == pytest.approx(known.parameters["popularity"], rel=0.05)


@pytest.mark.parametrize(
    "change", [{"fitted": ()}, {"targets": {"hit_ratio": {"belady": {4: 0.5}}}}]
)
def test_targets_that_cannot_be_fitted_are_usage_errors(change):
    workload = dataclasses.replace(WORKLOADS[default_workload], num_layers=2, **change)
    with pytest.raises(UsageError, match=r"qwen1\.5-moe"):
        calibrate(workload, num_requests=1, tokens_per_request=8)
