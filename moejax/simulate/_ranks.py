"""Rung 1: exact hits and loads for every capacity at once, without a clock.

Scores become unique ranks, ranks become bit planes, the resident set becomes a bit mask, and the
kept set is a radix select over the planes:

    act = (R | m) & admit;  need = C;  keep = 0
    for b in planes, high to low:
        z = act & ~P[b];  n = popcount(z);  fit = n <= need
        keep |= fit ? z : 0;  need -= fit ? n : 0;  act = fit ? act & P[b] : z
    keep |= need > 0 ? act : 0

One set of planes serves every capacity of a strategy that reads neither capacity nor residency;
the others carry their own state for each capacity. Prefetch has no meaning without a clock: here
every strategy fetches on demand alone, and `timeline` adds the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real, UInt32

from moejax._types import PRNGKey
from moejax.simulate._replay import Moment, Replay, access_at, cache_shape, moments
from moejax.strategies import CacheShape, Decision, Strategy, keep_best, rank_by_score

_BLOCK_STEPS = 128
_WORD_BITS = 32


class Counts(NamedTuple):
    """Exact counts of a demand-only replay.

    Attributes:
      num_hits: Demands met by a resident expert.
      num_forgiven: First touches while a slot was free, which the published curves count as hits.
      num_decode_hits: `num_hits` of the steps marked as decode.
      num_demands: Distinct experts demanded.
      num_decode_demands: The same in the steps marked as decode.
    """

    num_hits: Int[np.ndarray, "layers capacities"]
    num_forgiven: Int[np.ndarray, "layers capacities"]
    num_decode_hits: Int[np.ndarray, "layers capacities"]
    num_demands: Int[np.ndarray, " layers"]
    num_decode_demands: Int[np.ndarray, " layers"]

    @property
    def hit_ratio(self) -> Float[np.ndarray, " capacities"]:
        """Hits over demands: every load is a miss."""
        return self.num_hits.sum(0) / max(1, self.num_demands.sum())

    @property
    def hit_ratio_warm(self) -> Float[np.ndarray, " capacities"]:
        """The same by the convention of the published curves: cold misses are forgiven."""
        return (self.num_hits + self.num_forgiven).sum(0) / max(1, self.num_demands.sum())


class Marks(NamedTuple):
    """What is known of each step besides its demand.

    Attributes:
      is_decode: Steps counted in `num_decode_hits`.
      is_reset: Steps before which the cache and the strategy start afresh.
    """

    is_decode: Bool[np.ndarray, " steps"]
    is_reset: Bool[np.ndarray, " steps"]


def ranks(
    strategy: Strategy,
    replay: Replay,
    capacities: Int[np.ndarray, "*layers capacities"],
    key: PRNGKey,
    *,
    topk: int,
    marks: Marks | None = None,
) -> Counts:
    """Replays routing for every capacity at once.

    Args:
      strategy: What scores.
      replay: Demand step by step; memory stays bounded by blocks of steps.
      capacities: Slots of a layer: one row for all layers, or a row a layer.
      key: Consumed by the strategy, split by event.
      topk: Experts one token demands.
      marks: Decode steps and resets; all decode and none by default.

    Returns:
      The counts.
    """
    num_steps, num_layers, _ = replay.demand.shape
    if marks is None:
        marks = Marks(np.ones(num_steps, bool), np.zeros(num_steps, bool))
    slots = np.broadcast_to(capacities, (num_layers, np.shape(capacities)[-1])).astype(np.int32)
    shape = cache_shape(replay.demand, topk)
    resets = bool(marks.is_reset.any())
    carry, total = None, np.zeros((3, *slots.shape), np.int64)
    demands = np.zeros((2, num_layers), np.int64)
    for start in range(0, num_steps, _BLOCK_STEPS):
        stop = start + _BLOCK_STEPS
        block = moments(replay, start, stop)
        here = marks_between(marks, start, stop)
        if carry is None:
            carry = _start(strategy, shape, slots.shape[1])
        carry, counts = _run_block(strategy, shape, resets, carry, block, here, slots, key)
        total += np.asarray(counts)
        used = (np.asarray(replay.demand[start:stop]) > 0).sum(-1)
        demands += [used.sum(0), used[marks.is_decode[start:stop]].sum(0)]
    return Counts(total[0], total[1], total[2], demands[0], demands[1])


def marks_between(marks: Marks, start: int, stop: int) -> Marks:
    """The marks of the steps from `start` to `stop`; steps past the end are unmarked."""
    rows = (mark[start:stop] for mark in marks)
    return Marks(*(np.pad(row, (0, stop - start - len(row))) for row in rows))


def keep_words(
    candidates: UInt32[Array, "*lanes words"],
    planes: UInt32[Array, "*planes bits words"],
    capacity: Int[Array, "*lanes"],
) -> UInt32[Array, "*lanes words"]:
    """The best `capacity` of the candidates: a radix select over bit planes of their ranks.

    Args:
      candidates: Bit masks of experts.
      planes: Bit b of the rank of each expert, as bit masks; low bits first. Leading axes
        broadcast against those of `candidates`.
      capacity: How many to keep.
    """
    active, need, kept = candidates, capacity, jnp.zeros_like(candidates)
    for bit in reversed(range(planes.shape[-2])):
        better = active & ~planes[..., bit, :]
        count = num_members(better)
        fits = count <= need
        kept = jnp.where(fits[..., None], kept | better, kept)
        active = jnp.where(fits[..., None], active & planes[..., bit, :], better)
        need = jnp.where(fits, need - count, need)
    return jnp.where((need > 0)[..., None], kept | active, kept)


def num_members(words: UInt32[Array, "*lanes words"]) -> Int[Array, "*lanes"]:
    """How many experts a bit mask holds."""
    return jax.lax.population_count(words).astype(jnp.int32).sum(-1)


def pack(members: Bool[Array, "*lanes experts"]) -> UInt32[Array, "*lanes words"]:
    """Bit masks of boolean rows."""
    num_experts = members.shape[-1]
    num_words = -(-num_experts // _WORD_BITS)
    pads = [(0, 0)] * (members.ndim - 1) + [(0, num_words * _WORD_BITS - num_experts)]
    bits = jnp.pad(members, pads).reshape(*members.shape[:-1], num_words, _WORD_BITS)
    weight = jnp.left_shift(jnp.uint32(1), jnp.arange(_WORD_BITS, dtype=jnp.uint32))
    return jnp.where(bits, weight.reshape((1,) * (bits.ndim - 1) + (-1,)), jnp.uint32(0)).sum(
        -1, dtype=jnp.uint32
    )


def rank_planes(score: Real[Array, "*lanes experts"]) -> UInt32[Array, "*lanes bits words"]:
    """Bit planes of the ranks of all experts, low bits first."""
    num_bits = max(1, (score.shape[-1] - 1).bit_length())
    rank = rank_by_score(score)
    return jnp.stack([pack((rank >> bit) & 1 == 1) for bit in range(num_bits)], axis=-2)


class _Carry(NamedTuple):
    """State between steps; `state` leads with `capacities` where the strategy reads the cache.

    Attributes:
      state: The strategy's.
      resident: Resident experts.
      seen: Experts demanded so far.
    """

    state: Any
    resident: UInt32[Array, "layers capacities words"]
    seen: UInt32[Array, "layers words"]


def _start(strategy: Strategy, shape: CacheShape, num_capacities: int) -> _Carry:
    state = strategy.init(shape)
    if strategy.reads_cache:
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_capacities), state)
    nothing = pack(jnp.zeros((shape.num_layers, shape.num_experts), bool))
    return _Carry(state, jnp.stack([nothing] * num_capacities, axis=1), nothing)


@functools.partial(jax.jit, static_argnames=("strategy", "shape", "resets"))
def _run_block(strategy, shape, resets, carry, block, marks, slots, key):
    """Replays one block of steps; returns hits, forgiven first touches and decode hits."""
    start = _start(strategy, shape, slots.shape[1])
    run = _per_capacity if strategy.reads_cache else _shared
    return run(strategy, shape, resets, start, carry, block, marks, jnp.asarray(slots), key)


def _shared(strategy, shape, resets, start, carry, block, marks, slots, key):
    """Scores once for all capacities, then selects for each."""
    unseen = jnp.zeros((shape.num_layers, shape.num_experts), bool)
    none = jnp.zeros(shape.num_layers, jnp.int32)

    def score(state, step):
        moment, is_reset = step
        state = _renewed(state, start.state, is_reset) if resets else state
        state, decision = _decide(strategy, shape, state, moment, unseen, none, key)
        return state, decision

    state, decisions = jax.lax.scan(score, carry.state, (block, marks.is_reset))
    planes = rank_planes(decisions.keep_score)
    demand = pack(block.now > 0)
    admit = None if decisions.admit is None else pack(decisions.admit)

    def serve(cache, step):
        demand, planes, admit, is_decode, is_reset = step
        cache = _renewed(cache, (start.resident, start.seen), is_reset) if resets else cache
        resident, seen = cache
        counts = _count(resident, seen, demand, admit, slots, is_decode)
        candidates = resident | demand[:, None]
        if admit is not None:
            candidates = candidates & admit[:, None]
        kept = keep_words(candidates, planes[:, None], slots)
        return (kept, seen | demand), counts

    steps = (demand, planes, admit, marks.is_decode, marks.is_reset)
    (resident, seen), counts = jax.lax.scan(serve, (carry.resident, carry.seen), steps)
    return _Carry(state, resident, seen), counts.sum(0)


def _per_capacity(strategy, shape, resets, start, carry, block, marks, slots, key):
    """Scores and selects for each capacity by itself."""
    experts = jnp.arange(shape.num_experts)

    def serve(carry, step):
        moment, is_decode, is_reset = step
        carry = _renewed(carry, start, is_reset) if resets else carry
        demanded = moment.now > 0
        demand = pack(demanded)
        word, bit = experts // _WORD_BITS, (experts % _WORD_BITS).astype(jnp.uint32)

        def lane(state, words, capacity):
            resident = ((words[:, word] >> bit[None, :]) & 1) == 1
            state, decision = _decide(strategy, shape, state, moment, resident, capacity, key)
            candidates = resident | demanded
            admitted = jnp.ones_like(demanded) if decision.admit is None else decision.admit
            kept = keep_best(decision.keep_score, candidates & admitted, capacity)
            return state, pack(kept), pack(admitted)

        lanes = jax.vmap(lane, in_axes=(0, 1, 1), out_axes=(0, 1, 1))
        state, kept, admit = lanes(carry.state, carry.resident, slots)
        counts = _count(carry.resident, carry.seen, demand, admit, slots, is_decode)
        return _Carry(state, kept, carry.seen | demand), counts

    steps = (block, marks.is_decode, marks.is_reset)
    carry, counts = jax.lax.scan(serve, carry, steps)
    return carry, counts.sum(0)


def _decide(
    strategy: Strategy, shape: CacheShape, state, moment: Moment, resident, capacity, key
) -> tuple[Any, Decision]:
    """One step of all layers at once."""

    def one(state, layer):
        access = access_at(moment, layer, shape, resident, capacity)
        return strategy.step(state, access, jax.random.fold_in(key, access.event))

    state, decision = jax.vmap(one)(state, jnp.arange(shape.num_layers, dtype=jnp.int32))
    return state, decision._replace(prefetch_probability=None)


def _count(resident, seen, demand, admit, slots, is_decode) -> Int[Array, "3 layers capacities"]:
    hits = num_members(resident & demand[:, None])
    new = demand & ~seen
    if admit is None:
        num_new = num_members(new)[:, None]
    else:
        num_new = num_members(new[:, None] & (admit if admit.ndim == 3 else admit[:, None]))
    forgiven = jnp.clip(num_new, 0, slots - num_members(resident))
    return jnp.stack([hits, forgiven, jnp.where(is_decode, hits, 0)])


def _renewed(state, start, is_reset):
    return jax.tree.map(lambda old, new: jnp.where(is_reset, new, old), state, start)
