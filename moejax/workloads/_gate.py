"""Which figures a calibrated workload must meet."""

from typing import Any

from ._workload import Workload

# The published curves could be read off their figure no better than this.
_CURVE_TOLERANCE = 0.03
# Routing without any structure gives a tenth too many for a batch of four, more beyond.
_BATCH_TOLERANCE_RATIO = 0.05


def tolerance(workload: Workload, path: tuple[Any, ...]) -> float | None:
    """How far an achieved figure may be from its target; None where it is shown but not gated.

    Gated are the hit ratios at the card's `gated_slots`, or else LRU and Belady with twice the
    slots of one token's experts, the size that published work compares models at; and distinct
    experts of a batch.

    Args:
      workload: Whose figure it is.
      path: Keys of the figure, as `deviations` gives them.
    """
    measure, name, *points = path
    if measure == "distinct_experts":
        return _BATCH_TOLERANCE_RATIO * workload.targets[measure][name][points[0]]
    if measure not in ("hit_ratio_warm", "hit_ratio_warm_pool"):
        return None
    is_gated = points[0] in workload.gated_slots
    if not workload.gated_slots:
        is_gated = name in ("lru", "oracle") and points[0] == 2 * workload.num_experts_per_tok
    return _CURVE_TOLERANCE if is_gated else None
