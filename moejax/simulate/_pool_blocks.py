"""One block of steps of the pool: what each event hits, and what it evicts from all layers.

After an event only its own layer has new scores and new residents. So a pool keeps the worst
resident of each layer, and drops the worst of those until the rest fits:

    row = (R[l] | m) & admit;  W[l] = worst of row
    while too heavy:  d = layer of the worst of W;  W[d] = next worse of R[d]

That costs O(experts) an event and O(layers + experts) an eviction, for every capacity, where a
select among all experts of all layers costs O(layers x experts). An eviction from another layer
only moves the worst resident of that layer: its row is rewritten when its next event comes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moejax.simulate._blocks import Block, moments_of
from moejax.simulate._rank_blocks import Kind, scored
from moejax.simulate._replay import Moment, access_at
from moejax.simulate._words import Words, as_int32

# Above every score: where a layer holds nothing.
_EMPTY = np.iinfo(np.int32).max
_WORD = np.arange(32, dtype=np.uint32)


class Pools(NamedTuple):
    """One pool of each capacity.

    Attributes:
      state: The strategy's; where it reads the cache every leaf leads with
        `layers capacities`.
      seen: Experts demanded so far.
      score: Of each layer's last event; one column for all capacities where scores read no cache.
      held: Residents just after each layer's last event.
      worst: Score of the worst expert each layer still holds; it, and those of `held` that are
        better, are resident.
      worst_index: The expert; of equal scores the highest. -1 where a layer holds nothing.
      used: Weight of all residents.
    """

    state: Any
    seen: Bool[Array, "layers experts"]
    score: Int[Array, "layers experts columns"]
    held: Bool[Array, "layers experts capacities"]
    worst: Int[Array, "layers capacities"]
    worst_index: Int[Array, "layers capacities"]
    used: Int[Array, " capacities"]


class Limits(NamedTuple):
    """Weight of an expert of each layer, and what each pool holds."""

    weight: Int[np.ndarray | Array, " layers"]
    capacity: Int[np.ndarray | Array, " capacities"]


class _Verdict(NamedTuple):
    """What the strategy says of one event; columns are 1 or `capacities`.

    Attributes:
      state: The layer's new state of each capacity; None where all share one.
      score: Higher is kept.
      admitted: Experts that may be kept.
    """

    state: Any
    score: Int[Array, "experts columns"]
    admitted: Bool[Array, "experts columns"]


def start_pools(kind: Kind, num_capacities: int) -> Pools:
    """Pools that hold nothing."""
    strategy, shape = kind.strategy, kind.shape
    table = (shape.num_layers, shape.num_experts)
    state, num_columns = strategy.init(shape), 1
    if strategy.reads_cache:
        num_columns = num_capacities
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_capacities, 1), state)
    rows = (shape.num_layers, num_capacities)
    return Pools(
        state,
        seen=jnp.zeros(table, bool),
        score=jnp.zeros((*table, num_columns), jnp.int32),
        held=jnp.zeros((*table, num_capacities), bool),
        worst=jnp.full(rows, _EMPTY, jnp.int32),
        worst_index=jnp.full(rows, -1, jnp.int32),
        used=jnp.zeros(num_capacities, jnp.int32),
    )


def serve_block(kind: Kind, pools: Pools, block: Block, marks, limits: Limits, key):
    """Replays a block of steps.

    Returns:
      The pools, and `num_hits`, `num_forgiven` and `num_decode_hits` as [3, layers, capacities],
      and `num_demands` and `num_decode_demands` as [2, layers].
    """
    if kind.strategy.reads_cache:
        return _serve_own(kind, pools, block, marks, limits, key)
    state, score, demand, admit = scored(kind, pools.state, block, marks.is_reset, key)
    return _serve_shared(kind, pools._replace(state=state), score, demand, admit, marks, limits)


@functools.partial(jax.jit, static_argnums=0)
def _serve_shared(kind: Kind, pools: Pools, score, demand: Words, admit, marks, limits: Limits):
    """Serves scores that read no cache, which all capacities share."""
    demanded = _unpack(demand, kind.shape.num_experts)
    admitted = jnp.ones_like(demanded) if admit is None else _unpack(admit, kind.shape.num_experts)

    def decide(pools, layer, resident, given):
        return _Verdict(None, *given)

    def one_step(pools: Pools, step):
        score, demanded, admitted, marks = step
        given = (score[..., None], admitted[..., None])
        pools = _emptied(pools, marks.is_reset) if kind.resets else pools
        pools, _, counts = _serve_step(pools, demanded, given, marks, limits, decide)
        return pools, counts

    pools, counts = jax.lax.scan(one_step, pools, (score, demanded, admitted, marks))
    return pools, jax.tree.map(lambda rows: rows.sum(0), counts)


@functools.partial(jax.jit, static_argnums=0)
def _serve_own(kind: Kind, pools: Pools, block: Block, marks, limits: Limits, key):
    """Serves a strategy that reads the cache, with a state of each capacity."""
    moments = moments_of(block, kind.shape, is_stream=kind.is_stream)
    start = start_pools(kind, len(limits.capacity)).state

    def one_step(pools: Pools, step):
        moment, marks = step
        state = pools.state
        if kind.resets:
            pools = _emptied(pools, marks.is_reset)
            state = jax.tree.map(lambda a, b: jnp.where(marks.is_reset, a, b), start, state)
        decide = functools.partial(_decide, kind, moment, limits.capacity, key)
        demanded = moment.now > 0
        pools, state, counts = _serve_step(pools, demanded, state, marks, limits, decide)
        return pools._replace(state=state), counts

    pools, counts = jax.lax.scan(one_step, pools, (moments, marks))
    return pools, jax.tree.map(lambda rows: rows.sum(0), counts)


def _decide(kind: Kind, moment: Moment, capacity, key, pools: Pools, layer, resident, state):
    """The event of one layer as each capacity decides it."""
    strategy, shape = kind.strategy, kind.shape
    coming = (layer + 1 + jnp.arange(shape.depth)) % shape.num_layers
    tables = (pools.score, pools.held, pools.worst, pools.worst_index)
    ahead = jnp.moveaxis(_still_held(*(table[coming] for table in tables)), -1, 0)
    nothing = jnp.zeros((shape.num_layers, shape.num_experts), bool)

    def one(state, resident, ahead, capacity):
        slots = jnp.broadcast_to(capacity, (shape.num_layers,))
        access = access_at(moment, layer, shape, nothing, slots)
        access = access._replace(resident=resident, resident_ahead=ahead)
        return strategy.step(state, access, jax.random.fold_in(key, access.event))

    state, decision = jax.vmap(one)(state, resident.T, ahead, capacity)
    score = as_int32(decision.keep_score).T
    admitted = jnp.ones_like(score, bool) if decision.admit is None else decision.admit.T
    return _Verdict(state, score, admitted)


def _serve_step(pools: Pools, demanded, given, marks, limits: Limits, decide):
    """Serves all layers of one step, one after the other.

    Args:
      pools: As the step before left them.
      demanded: Experts that each layer demands.
      given: What `decide` needs of each layer, besides the pools, the layer and its residents.
      marks: Of this step.
      limits: Of the pools.
      decide: Gives the verdict on one event.

    Returns:
      The pools, the states of all verdicts and the counts of the step.
    """
    layers = jnp.arange(len(demanded), dtype=jnp.int32)

    def one_layer(pools: Pools, event):
        layer, demanded, fresh, score, held, given = event
        bars = (pools.worst[layer], pools.worst_index[layer])
        resident = _still_held(score, held, *bars)
        verdict = decide(pools, layer, resident, given)
        pools, found = _serve(
            pools, layer, demanded[:, None], fresh[:, None], resident, verdict, limits
        )
        return pools, (*found, verdict.state)

    # A layer's own rows are still those of the step before. They come as inputs of the scan, so
    # that the tables are written and then read, and XLA need not copy them at every event.
    events = (layers, demanded, demanded & ~pools.seen, pools.score, pools.held, given)
    pools = pools._replace(seen=pools.seen | demanded)
    pools, (num_hits, num_forgiven, state) = jax.lax.scan(one_layer, pools, events)
    num_demands = demanded.sum(-1, dtype=jnp.int32)
    cells = jnp.stack([num_hits, num_forgiven, jnp.where(marks.is_decode, num_hits, 0)])
    demands = jnp.stack([num_demands, jnp.where(marks.is_decode, num_demands, 0)])
    return pools, state, (cells, demands)


def _serve(pools: Pools, layer, demanded, fresh, resident, verdict: _Verdict, limits: Limits):
    """Counts what one event hits, admits its demand and evicts until every pool fits."""
    weight = limits.weight[layer]
    row = (resident | demanded) & verdict.admitted
    num_free = (limits.capacity - pools.used) // weight
    num_more = row.sum(0, dtype=jnp.int32) - resident.sum(0, dtype=jnp.int32)
    worst, worst_index = _worst(verdict.score, row)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    pools = pools._replace(
        score=put(pools.score, verdict.score),
        held=put(pools.held, row),
        worst=put(pools.worst, worst),
        worst_index=put(pools.worst_index, worst_index),
        used=pools.used + weight * num_more,
    )
    num_hits = (resident & demanded).sum(0, dtype=jnp.int32)
    num_new = (fresh & verdict.admitted).sum(0, dtype=jnp.int32)
    return _lightened(pools, limits), (num_hits, jnp.minimum(num_new, num_free))


def _lightened(pools: Pools, limits: Limits) -> Pools:
    """Evicts the worst resident of each pool until it fits."""
    num_layers, _, num_capacities = pools.held.shape
    layers = jnp.arange(num_layers, dtype=jnp.int32)[:, None]
    lane = jnp.arange(num_capacities)
    column = lane if pools.score.shape[-1] > 1 else jnp.zeros_like(lane)

    def is_heavy(carry):
        _, _, used = carry
        return (used > limits.capacity).any()

    def evict(carry):
        worst, worst_index, used = carry
        heavy = used > limits.capacity
        lowest = worst.min(0)
        # Of equal scores the highest layer, and there the highest expert, goes first.
        layer = jnp.where(worst == lowest[None], layers, -1).max(0)
        is_here = layers == layer[None]
        index = jnp.where(is_here, worst_index, -1).max(0)
        score = pools.score[layer, :, column].T
        held = pools.held[layer, :, lane].T
        better = (score > lowest[None]) | (score == lowest[None]) & (_ids(score) < index[None])
        found, found_index = _worst(score, held & better)
        goes = is_here & heavy[None]
        return (
            jnp.where(goes, found[None], worst),
            jnp.where(goes, found_index[None], worst_index),
            jnp.where(heavy, used - limits.weight[layer], used),
        )

    carry = (pools.worst, pools.worst_index, pools.used)
    worst, worst_index, used = jax.lax.while_loop(is_heavy, evict, carry)
    return pools._replace(worst=worst, worst_index=worst_index, used=used)


def _worst(score, members):
    """Lowest score of each column's members, and of those that have it the highest index."""
    lowest = jnp.where(members, score, _EMPTY).min(0)
    has_it = members & (score == lowest[None])
    return lowest, jnp.where(has_it, _ids(score), -1).max(0)


def _still_held(score, held, worst, worst_index):
    """Of the members of each column those not worse than its worst."""
    worst, worst_index = worst[..., None, :], worst_index[..., None, :]
    return held & ((score > worst) | (score == worst) & (_ids(score) <= worst_index))


def _ids(score: Int[Array, "*layers experts columns"]) -> Int[Array, "*ones experts 1"]:
    """The number of each expert, in as many axes as the score."""
    axis = score.ndim - 2
    shape = (1,) * axis + (score.shape[axis], 1)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _emptied(pools: Pools, is_reset: Bool[Array, ""]) -> Pools:
    """Pools that hold nothing where there is a reset: a layer without a worst expert is empty."""
    return pools._replace(
        seen=pools.seen & ~is_reset,
        worst=jnp.where(is_reset, _EMPTY, pools.worst),
        worst_index=jnp.where(is_reset, -1, pools.worst_index),
        used=jnp.where(is_reset, 0, pools.used),
    )


def _unpack(words: Words, num_experts: int) -> Bool[Array, "*lanes experts"]:
    """The members of each set."""
    bits = [(word[..., None] >> _WORD.reshape((1,) * word.ndim + (-1,))) & 1 for word in words]
    return jnp.concatenate(bits, -1)[..., :num_experts] == 1
