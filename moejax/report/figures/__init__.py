"""Every figure of the report by name: file name, section of the report and command-line value."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from matplotlib.figure import Figure

from .._data import ReportData
from ._canvas import STYLE as STYLE
from ._claims import claims_batch, claims_budget, claims_memory, claims_oracle
from ._further import cards, hybrids, sizes
from ._hit_curve import hit_curve
from ._hit_rate import hit_rate
from ._latency import latency
from ._memory import memory
from ._overview import overview
from ._pareto import pareto_complexity, pareto_efficiency, pareto_memory
from ._scalability import scalability
from ._speedup import speedup
from ._stall_breakdown import stall_breakdown
from ._tail import tail
from ._tiers import tiers

FIGURES: Mapping[str, Callable[[ReportData], Figure]] = MappingProxyType(
    {
        "overview": overview,
        "latency": latency,
        "speedup": speedup,
        "hit_rate": hit_rate,
        "hit_curve": hit_curve,
        "stall_breakdown": stall_breakdown,
        "tail": tail,
        "scalability": scalability,
        "memory": memory,
        "pareto_memory": pareto_memory,
        "pareto_complexity": pareto_complexity,
        "pareto_efficiency": pareto_efficiency,
        "tiers": tiers,
        "claims_budget": claims_budget,
        "claims_oracle": claims_oracle,
        "claims_batch": claims_batch,
        "claims_memory": claims_memory,
        "sizes": sizes,
        "cards": cards,
        "hybrids": hybrids,
    }
)

CLAIMS_FIGURES = ("claims_budget", "claims_oracle", "claims_batch", "claims_memory")
"""Those that stand beside the study's claims instead of among the others."""

FURTHER_FIGURES: Mapping[str, str] = MappingProxyType(
    {"capacities": "sizes", "gpus": "cards", "hybrids": "hybrids"}
)
"""Those that stand beside an experiment of `--full`, by its key."""
