"""Caching strategies, their predictors and wrappers, and the registry of them all."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from moejax.strategies._arc import arc as arc
from moejax.strategies._base import CHANCE_STEPS as CHANCE_STEPS
from moejax.strategies._base import NEVER as NEVER
from moejax.strategies._base import PREFETCH_PRICE_RATIO as PREFETCH_PRICE_RATIO
from moejax.strategies._base import Access as Access
from moejax.strategies._base import CacheShape as CacheShape
from moejax.strategies._base import Decision as Decision
from moejax.strategies._base import Future as Future
from moejax.strategies._base import Strategy as Strategy
from moejax.strategies._base import check_pool as check_pool
from moejax.strategies._duel import duel as duel
from moejax.strategies._fifo import fifo as fifo
from moejax.strategies._gate_look import gate_look as gate_look
from moejax.strategies._intelligent import intelligent as intelligent
from moejax.strategies._learn import learn_profile as learn_profile
from moejax.strategies._learn import learn_reuse_weights as learn_reuse_weights
from moejax.strategies._least_stale import least_stale as least_stale
from moejax.strategies._lfu import lfu as lfu
from moejax.strategies._lru import lru as lru
from moejax.strategies._multi_look import multi_look as multi_look
from moejax.strategies._on_demand import on_demand as on_demand
from moejax.strategies._oracle import oracle as oracle
from moejax.strategies._predict import Predictor as Predictor
from moejax.strategies._predict import calibrated as calibrated
from moejax.strategies._predict import gate as gate
from moejax.strategies._predict import transitions as transitions
from moejax.strategies._profile import Profile as Profile
from moejax.strategies._reuse import ReuseWeights as ReuseWeights
from moejax.strategies._reuse import reuse as reuse
from moejax.strategies._s3fifo import s3fifo as s3fifo
from moejax.strategies._select import keep_best as keep_best
from moejax.strategies._select import rank_by_score as rank_by_score
from moejax.strategies._select import worst as worst
from moejax.strategies._sieve import sieve as sieve
from moejax.strategies._top_k import top_k as top_k
from moejax.strategies._wrap import always_admit as always_admit
from moejax.strategies._wrap import host_compute as host_compute
from moejax.strategies._wrap import pinned as pinned
from moejax.strategies._wrap import with_prefetch as with_prefetch
from moejax.strategies._wrap import within_reach as within_reach


class Kind(NamedTuple):
    """An entry of the registry.

    Attributes:
      label: Name in reports.
      make: Builds the strategy from what a profile taught, or from None.
      learns: Whether a profile teaches it anything.
      needs_profile: Whether it cannot work without a profile.
      needs_future: Whether it reads what only a replay knows.
      needs_lookahead: Whether it cannot work on a trace without `lookahead`.
    """

    label: str
    make: Callable[[Profile | None], Strategy]
    learns: bool = False
    needs_profile: bool = False
    needs_future: bool = False
    needs_lookahead: bool = False

    @property
    def keeps_layers_apart(self) -> bool:
        """`Strategy.keeps_layers_apart`; what a profile pins is ordered over all layers alike."""
        return not self.needs_profile and self.make(None).keeps_layers_apart


STRATEGIES: Mapping[str, Kind] = MappingProxyType(
    {
        "on_demand": Kind("On-Demand", lambda profile: on_demand()),
        "oracle": Kind("Oracle", lambda profile: oracle(), needs_future=True),
        "multi_look": Kind("Multi-Look", multi_look, learns=True),
        "top_k": Kind("Top-K", lambda profile: top_k(profile), learns=True, needs_profile=True),
        "intelligent": Kind("Intelligent", intelligent, learns=True),
        "lru": Kind("LRU", lambda profile: lru()),
        "lfu": Kind("LFU", lambda profile: lfu()),
        "fifo": Kind("FIFO", lambda profile: fifo()),
        "gate_look": Kind("Gate-Look", lambda profile: gate_look(), needs_lookahead=True),
        "sieve": Kind("SIEVE", lambda profile: sieve()),
        "s3fifo": Kind("S3-FIFO", lambda profile: s3fifo()),
        "arc": Kind("ARC", lambda profile: arc()),
        "least_stale": Kind("Least-Stale", lambda profile: least_stale()),
    }
)
