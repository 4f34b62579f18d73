"""Synthetic routing whose statistics are fitted to published ones; each workload is a card."""

from collections.abc import Mapping
from types import MappingProxyType

from ._calibrate import assess as assess
from ._calibrate import calibrate as calibrate
from ._calibrate import deviations as deviations
from ._curves import first_touch_ratio as first_touch_ratio
from ._curves import lfu_hit_ratio as lfu_hit_ratio
from ._curves import lru_hit_ratio as lru_hit_ratio
from ._curves import oracle_hit_ratio as oracle_hit_ratio
from ._curves import pinned_hit_ratio as pinned_hit_ratio
from ._make import make_trace as make_trace
from ._workload import Workload as Workload
from ._workload import read_workload as read_workload

default_workload = "qwen1.5-moe"

WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "qwen1.5-moe": read_workload("qwen1.5-moe"),
        "reference-study": read_workload("reference-study"),
        "uniform": read_workload("uniform"),
        "predictable": read_workload("predictable"),
        "adversarial": read_workload("adversarial"),
    }
)
