"""Synthetic routing whose statistics are fitted to published ones; each workload is a card."""

from collections.abc import Mapping
from types import MappingProxyType

from ._assess import assess as assess
from ._calibrate import calibrate as calibrate
from ._calibrate import deviations as deviations
from ._curves import as_one_layer as as_one_layer
from ._curves import first_touch_ratio as first_touch_ratio
from ._curves import lfu_hit_ratio as lfu_hit_ratio
from ._curves import lru_hit_ratio as lru_hit_ratio
from ._curves import oracle_hit_ratio as oracle_hit_ratio
from ._curves import pinned_hit_ratio as pinned_hit_ratio
from ._gate import tolerance as tolerance
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
        "qwen3-30b-a3b": read_workload("qwen3-30b-a3b"),
        "qwen2-57b-a14b": read_workload("qwen2-57b-a14b"),
        "olmoe-1b-7b": read_workload("olmoe-1b-7b"),
        "mixtral-8x7b": read_workload("mixtral-8x7b"),
        "deepseek-moe-16b": read_workload("deepseek-moe-16b"),
        "deepseek-v2-lite": read_workload("deepseek-v2-lite"),
        "gpt-oss-20b": read_workload("gpt-oss-20b"),
        "switch-base-128": read_workload("switch-base-128"),
    }
)
