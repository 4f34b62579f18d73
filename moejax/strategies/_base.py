"""What a caching strategy is: a pair of pure functions that score experts.

The same object runs in the exact rank engine, in the timed simulation and in the real decode
program. It never owns the cache: after each access the simulator keeps the best `capacity` of
resident, demanded and prefetched experts by `Decision.keep_score`, ties to the lower index.

An *event* is one MoE layer of one decode step. `step` sees one layer of state and one event;
`init` builds the state of all layers, stacked along a leading axis, so that a caller may map it
over layers (ranks) or walk through them (timeline, engine).

The engine traces `step` inside a GPU kernel of one program, where experts are padded to a power
of two by ones that are never demanded. So a step is elementwise work, reductions and prefix sums:
it slices and indexes nothing, joins two arrays along a new last axis at most, holds no array of
its own, and what depends on how many experts there are is a number in its state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Bool, Float, Int, Real

from moejax._types import PRNGKey
from moejax.errors import UsageError

NEVER = 2**30
"""Step or event of a next use that does not come."""

PREFETCH_PRICE_RATIO = 0.5
"""How probable a prefetch by a fixed schedule must be at least: even in the shadow of compute a
wrong copy is not free."""

CHANCE_STEPS = 128
"""Steps of probability that a fixed schedule tells apart. Closer chances are equal and the nearer
layer goes first: sums that are taken in another order must not decide."""


class CacheShape(NamedTuple):
    """The static sizes a strategy needs to build its state.

    `topk` is how many experts one token demands. `depth` is how many layers ahead a prefetch may
    aim, less than `num_layers`; layers wrap around: one layer ahead of the last is the first
    layer of the next step.
    """

    num_layers: int
    num_experts: int
    topk: int
    depth: int


class Future(NamedTuple):
    """What only an oracle may read.

    Attributes:
      next_use: Event at which each expert of this layer is demanded next, strictly after this
        event; a large number when never.
      demand_ahead: Tokens that will demand each expert of the next `depth` layers.
      next_use_ahead: `next_use` as it will stand just after those layers' events.
    """

    next_use: Int[Array, " experts"]
    demand_ahead: Int[Array, "depth experts"]
    next_use_ahead: Int[Array, "depth experts"]


class Access(NamedTuple):
    """One event, as a strategy may see it the moment the demand is known.

    Attributes:
      event: Number of this event: `step * num_layers + layer`.
      layer: MoE layer, from 0.
      demand: Tokens of the batch that demand each expert; 0 means not demanded.
      above: Demand of the event just before this one (the layer above).
      below_before: Demand of the `depth` events that followed this layer one step ago: how the
        layers ahead answered to this layer's last demand.
      resident: Experts in this layer's slots before the event.
      resident_ahead: Experts in the slots of the next `depth` layers.
      capacity: Slots of this layer.
      capacity_ahead: Slots of the next `depth` layers.
      lookahead: What the next layers' gates say about this layer's hidden state: 1 for the most
        probable expert, falling with its rank, 0 for one not named. All 0 where unknown.
      future: Replayed truth; read by `oracle` alone.
    """

    event: Int[Array, ""]
    layer: Int[Array, ""]
    demand: Int[Array, " experts"]
    above: Int[Array, " experts"]
    below_before: Int[Array, "depth experts"]
    resident: Bool[Array, " experts"]
    resident_ahead: Bool[Array, "depth experts"]
    capacity: Int[Array, ""]
    capacity_ahead: Int[Array, " depth"]
    lookahead: Float[Array, "depth experts"]
    future: Future


class Decision(NamedTuple):
    """What a strategy says after an event.

    Attributes:
      keep_score: Higher is kept; only the order matters. Any real dtype.
      admit: Experts that may be kept at all; None admits every one.
      prefetch_probability: Chance that the coming event of each of the next layers demands each
        expert, `min(depth, reach)` rows; None prefetches nothing. The simulator admits a prefetch
        when the stall it is expected to save exceeds the link time it is expected to cost.
    """

    keep_score: Real[Array, " experts"]
    admit: Bool[Array, " experts"] | None = None
    prefetch_probability: Float[Array, "ahead experts"] | None = None


Step: TypeAlias = Callable[[Any, Access, PRNGKey | None], tuple[Any, Decision]]


class Strategy(NamedTuple):
    """A caching strategy.

    Attributes:
      init: Builds the state of all layers; every leaf leads with `layers`.
      step: Takes one layer's state, one event and a key to the new state and a decision. The key
        is None in a kernel.
      reads_cache: Whether scores depend on residency or capacity. Where they do not, one set of
        scores serves every capacity at once.
      reads_future: Whether it reads `Access.future`.
      reads_gates: Whether it reads `Access.lookahead`.
      reach: How many layers ahead it predicts at most; 0 prefetches nothing.
      computes_on_host: Whether a miss may be computed on the host instead of copied.
      keeps_layers_apart: Whether its scores order only the experts of one layer, so that it
        cannot serve a pool that all layers share.
    """

    init: Callable[[CacheShape], Any]
    step: Step
    reads_cache: bool = False
    reads_future: bool = False
    reads_gates: bool = False
    reach: int = 0
    computes_on_host: bool = False
    keeps_layers_apart: bool = False

    @property
    def prefetches(self) -> bool:
        """Whether decisions carry `prefetch_probability`."""
        return self.reach > 0


def check_pool(keeps_layers_apart: bool, name: str | None = None) -> None:
    """Refuses a strategy whose scores order only the experts of one layer.

    Args:
      keeps_layers_apart: What the strategy says of itself.
      name: What a user calls it; None where only the strategy is known.

    Raises:
      UsageError: It cannot serve a pool.
    """
    if keeps_layers_apart:
        apart = "keeps each layer apart"
        who = f"a strategy that {apart}" if name is None else f"{name} {apart} and"
        raise UsageError(
            f"{who} cannot serve a pool, which all layers share",
            "Use --scope layer, or a strategy such as lru.",
        )
