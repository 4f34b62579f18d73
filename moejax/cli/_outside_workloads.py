"""Published figures of routing beside those of the calibrated workloads."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from moejax.workloads import Workload

# Twice as many are drawn: enough for the largest batch that has a target.
_NUM_REQUESTS, _NUM_BATCH_REQUESTS = 4, 8


class Figure(NamedTuple):
    """A gated figure, its target, ours, the difference allowed and where the target comes from."""

    label: str
    expected: float
    ours: float
    tolerance: float
    source: str


def gated_figures(seed: int) -> Iterator[Figure]:
    """Every gated figure of every calibrated workload but the default, on fresh requests.

    Args:
      seed: Of the requests.
    """
    from moejax.workloads import WORKLOADS, assess, default_workload, deviations, tolerance

    for name, workload in WORKLOADS.items():
        gated = _gated_targets(workload)
        if name == default_workload or not gated:
            continue
        num_requests = _NUM_BATCH_REQUESTS if "distinct_experts" in gated else _NUM_REQUESTS
        achieved = assess(replace(workload, targets=gated), num_requests=num_requests, seed=seed)
        for path, _ in deviations(gated, achieved):
            measure, which, point = path
            limit = tolerance(workload, path)
            assert limit is not None
            label = f"{name}: {_LABELS[measure].format(which=which, point=point)}"
            expected = gated[measure][which][point]
            ours = achieved[measure][which][point]
            yield Figure(label, expected, ours, limit, workload.source)


def _gated_targets(workload: "Workload") -> dict[str, dict[str, dict[int, Any]]]:
    from moejax.workloads import tolerance

    gated: dict[str, dict[str, dict[int, Any]]] = {}
    for measure, wanted in workload.targets.items():
        for which, points in wanted.items():
            if measure == "statistics":
                continue
            kept = {
                point: target
                for point, target in points.items()
                if tolerance(workload, (measure, which, point)) is not None
            }
            if kept:
                gated.setdefault(measure, {})[which] = kept
    return gated


_LABELS = {
    "hit_ratio_warm": "{which}, hit ratio with {point} slots a layer",
    "hit_ratio_warm_pool": "{which}, hit ratio of a pool with {point} slots a layer",
    "distinct_experts": "distinct experts of a layer, {point} in a batch",
}
