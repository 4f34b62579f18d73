"""One cache shared by the experts of all layers, limited in slots or in bytes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax._types import PRNGKey
from moejax.simulate._ranks import Counts, Marks, marks_between
from moejax.simulate._replay import Replay, access_at, cache_shape, moments
from moejax.strategies import CacheShape, Strategy

_BLOCK_STEPS = 64


def pool(
    strategy: Strategy,
    replay: Replay,
    capacities: Int[np.ndarray, " capacities"],
    key: PRNGKey,
    *,
    topk: int,
    weight: Int[np.ndarray, " layers"] | None = None,
    marks: Marks | None = None,
) -> Counts:
    """Replays routing through one pool for all layers, without a clock.

    After each event the pool keeps the longest prefix of its candidates, best first by the score
    of each layer's last event, that fits. Scores of different layers compete, so only strategies
    whose scores mean the same in every layer do well here.

    Args:
      strategy: What scores; `Access.capacity` is the pool's, in units of `weight`.
      replay: Demand step by step.
      capacities: What the pool holds, in units of `weight`.
      key: Consumed by the strategy, split by event.
      topk: Experts one token demands.
      weight: Size of an expert of each layer, such as bytes; 1 by default, so slots.
      marks: Decode steps and resets; all decode and none by default.

    Returns:
      The counts.
    """
    num_steps, num_layers, _ = replay.demand.shape
    if marks is None:
        marks = Marks(np.ones(num_steps, bool), np.zeros(num_steps, bool))
    weight = np.ones(num_layers) if weight is None else np.asarray(weight)
    units, limits = _in_32_bits(weight, np.asarray(capacities), replay.demand.shape[-1])
    shape = cache_shape(replay.demand, topk)
    resets = bool(marks.is_reset.any())
    carry = None
    total = np.zeros((3, num_layers, len(limits)), np.int64)
    demands = np.zeros((2, num_layers), np.int64)
    for start in range(0, num_steps, _BLOCK_STEPS):
        stop = start + _BLOCK_STEPS
        here = marks_between(marks, start, stop)
        if carry is None:
            carry = _start(strategy, shape, len(limits))
        block = moments(replay, start, stop)
        carry, counts = _run_block(strategy, shape, resets, carry, block, here, units, limits, key)
        total += np.asarray(counts)
        used = (np.asarray(replay.demand[start:stop]) > 0).sum(-1)
        demands += [used.sum(0), used[marks.is_decode[start:stop]].sum(0)]
    return Counts(total[0], total[1], total[2], demands[0], demands[1])


def _in_32_bits(
    weight: Int[np.ndarray, " layers"], capacities: Int[np.ndarray, " capacities"], num_experts: int
) -> tuple[Int[np.ndarray, " layers"], Int[np.ndarray, " capacities"]]:
    """Sizes and capacities in a common unit, small enough that sums fit 32 bits.

    The unit is the greatest common divisor, and the counts exact, unless all experts together
    are more than 2**30 of it; then sizes are rounded up, so that a pool is never overfilled.
    """
    weight = weight.astype(np.int64)
    unit = max(int(np.gcd.reduce(weight)), -(-num_experts * int(weight.sum()) // 2**30))
    limits = np.minimum(capacities // unit, 2**30)
    return (-(-weight // unit)).astype(np.int32), limits.astype(np.int32)


class _Pool(NamedTuple):
    """One pool of each capacity.

    Attributes:
      state: The strategy's.
      resident: Resident experts.
      score: Score at each layer's last event.
      seen: Experts demanded so far.
    """

    state: Any
    resident: Bool[Array, "capacities layers experts"]
    score: Float[Array, "capacities layers experts"]
    seen: Bool[Array, "capacities layers experts"]


def _start(strategy: Strategy, shape: CacheShape, num_capacities: int) -> _Pool:
    lanes = (num_capacities, shape.num_layers, shape.num_experts)
    nothing = jnp.zeros(lanes, bool)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_capacities), strategy.init(shape))
    return _Pool(state, nothing, jnp.full(lanes, -jnp.inf, jnp.float32), nothing)


@functools.partial(jax.jit, static_argnames=("strategy", "shape", "resets"))
def _run_block(strategy, shape, resets, carry, block, marks, units, limits, key):
    fresh = _start(strategy, shape, len(limits))
    weight = jnp.broadcast_to(jnp.asarray(units)[:, None], (shape.num_layers, shape.num_experts))

    def one_event(carry, layer, moment, limit):
        state, resident, score, seen = carry
        capacity = jnp.broadcast_to(limit, (shape.num_layers,))
        access = access_at(moment, layer, shape, resident, capacity)
        mine = jax.tree.map(lambda leaf: leaf[layer], state)
        mine, decision = strategy.step(mine, access, jax.random.fold_in(key, access.event))
        state = jax.tree.map(lambda leaf, new: leaf.at[layer].set(new), state, mine)
        demanded = access.demand > 0
        hit = demanded & resident[layer]
        admitted = jnp.ones_like(demanded) if decision.admit is None else decision.admit
        new = demanded & ~seen[layer] & admitted
        room = limit - (weight * resident).sum()
        forgiven = jnp.minimum(new.sum(), room // weight[layer, 0])
        score = score.at[layer].set(decision.keep_score.astype(jnp.float32))
        candidates = resident.at[layer].set((resident[layer] | demanded) & admitted)
        kept = fitting_prefix(score.ravel(), candidates.ravel(), weight.ravel(), limit)
        carry = _Pool(
            state, kept.reshape(resident.shape), score, seen.at[layer].set(seen[layer] | demanded)
        )
        return carry, (hit.sum(), forgiven)

    def one_step(carry, step):
        moment, is_decode, is_reset = step
        if resets:
            carry = jax.tree.map(lambda old, new: jnp.where(is_reset, new, old), carry, fresh)

        def one_layer(carry, layer):
            return jax.vmap(one_event, in_axes=(0, None, None, 0))(carry, layer, moment, limits)

        layers = jnp.arange(shape.num_layers, dtype=jnp.int32)
        carry, (hits, forgiven) = jax.lax.scan(one_layer, carry, layers)
        return carry, jnp.stack([hits, forgiven, jnp.where(is_decode, hits, 0)])

    carry, counts = jax.lax.scan(one_step, carry, (block, marks.is_decode, marks.is_reset))
    return carry, counts.sum(0)


def fitting_prefix(
    score: Float[Array, " experts"],
    candidates: Bool[Array, " experts"],
    weight: Int[Array, " experts"],
    capacity: Int[Array, ""],
) -> Bool[Array, " experts"]:
    """The longest prefix of the candidates, best first, whose weight fits.

    Ties go to the lower index. Finds the lowest score whose better candidates all fit by
    bisection over the bits of the score, which needs no sort.
    """
    order = _sortable(score)
    weight = jnp.where(candidates, weight, 0)

    def halve(bit, low):
        # `low` is the smallest threshold known to keep too much of the weight out.
        trial = low - jnp.left_shift(jnp.uint32(1), jnp.uint32(31) - bit)
        fits = jnp.where(order >= trial, weight, 0).sum() <= capacity
        return jnp.where(fits, trial, low)

    # 2**32 - 1 lies above every finite score.
    threshold = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), halve, jnp.uint32(0xFFFFFFFF))
    above = order >= threshold
    left = capacity - jnp.where(above, weight, 0).sum()
    tied = candidates & (order == threshold - 1)
    filling = tied & (jnp.cumsum(jnp.where(tied, weight, 0)) <= left)
    return (candidates & above) | filling


def _sortable(score: Float[Array, " experts"]) -> Array:
    """Unsigned integers in the order of the scores."""
    # -0.0 equals 0.0 and must look equal; XLA would drop an addition of zero.
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(0x80000000))
