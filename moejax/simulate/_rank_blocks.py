"""One block of steps of the ranks: scores, rank planes, selects, counts.

Scores become unique ranks, ranks become bit planes, the resident set becomes a bit mask, and the
kept set is a radix select over the planes:

    act = (R | m) & admit;  need = C;  keep = 0
    for b in planes, high to low:
        z = act & ~P[b];  n = popcount(z);  fit = n <= need
        keep |= fit ? z : 0;  need -= fit ? n : 0;  act = fit ? act & P[b] : z
    keep |= need > 0 ? act : 0

One set of planes serves every capacity of a strategy that reads neither capacity nor residency;
the others carry their own state for each capacity. Scores, planes and selects are programs of
their own: while one block's selects run, the next block's planes are counted on
another core, and only the scores are compiled anew for another strategy.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from moejax.devices import on_mesh
from moejax.simulate._blocks import Block, moments_of
from moejax.simulate._mesh import ALL, COLUMNS, ROWS, placed
from moejax.simulate._replay import Moment, layer_accesses
from moejax.simulate._select import Steps, Tally, select_block
from moejax.simulate._words import (
    WORD_BITS,
    Words,
    as_int32,
    pack,
    rank_planes,
)
from moejax.strategies import CacheShape, Decision, Strategy, keep_best

# Within a block there is too little to do for XLA's threads to be worth their waking up; blocks
# run side by side instead.
_jit = functools.partial(jax.jit, compiler_options={"xla_cpu_multi_thread_eigen": False})
# What one thread hands to XLA's CPU client runs in that order, ready or not; what another thread
# hands over runs beside it. A hand-over takes no time, so one thread a stage serves everybody.
_scorer, _ranker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

# Where the lanes lie in each field of a block.
_LANE_AXES = Block._make((None, 1, 0, None))
_LANE_SPECS = Block._make((ALL, COLUMNS, ROWS, ALL))


class Kind(NamedTuple):
    """What programs are compiled for.

    Attributes:
      strategy: What scores.
      shape: Sizes.
      is_stream: Whether blocks hold ids.
      resets: Whether there are resets.
      mesh: Devices that share the lanes; None leaves all on one.
    """

    strategy: Strategy
    shape: CacheShape
    is_stream: bool
    resets: bool
    mesh: Mesh | None = None


# --- scores that read no cache ----------------------------------------------------------------


class _SharedCarry(NamedTuple):
    """What goes from block to block: the strategy's state, residents and experts seen so far."""

    state: Any
    resident: Words
    seen: Words


def shared(kind: Kind, carry: _SharedCarry | None, tally, block, marks, slots, key):
    """Scores once for all capacities, then selects for each."""
    if carry is None:
        num_words = -(-kind.shape.num_experts // WORD_BITS)
        nothing = (jnp.zeros(slots.shape, jnp.uint32),) * num_words
        unseen = (jnp.zeros(len(slots), jnp.uint32),) * num_words
        state = _copies(kind.strategy.init(kind.shape), _num_lanes(block))
        carry = placed(kind.mesh, _SharedCarry(state, nothing, unseen))
    state, score, demand, admit = scored(kind, carry.state, block, marks.is_reset, key)
    planes = _ranker.submit(_plane_block, kind.mesh, score).result()
    is_reset = marks.is_reset if kind.resets else None
    steps = Steps(demand, planes, admit, marks.is_decode, is_reset)
    resident, seen, tally = _select_block(
        kind.mesh, how_to_select(), carry.resident, carry.seen, tally, steps, slots
    )
    return _SharedCarry(state, resident, seen), tally


def how_to_select() -> str:
    """Which way of `select_block` this platform is fast with."""
    return "kernel" if jax.default_backend() == "gpu" else "scan"


def scored(kind: Kind, state, block: Block, is_reset, key):
    """`_score_block` on a thread of its own."""
    return _scorer.submit(_score_block, kind, state, block, is_reset, key).result()


@functools.partial(_jit, static_argnums=0)
def _score_block(kind: Kind, state, block: Block, is_reset, key):
    """Scores, demand and admissions of each step, lanes x layers as rows; sets as words."""
    run = functools.partial(_score_lane, kind)
    if _num_lanes(block) is None:
        return run(state, block, is_reset, key)
    run = jax.vmap(run, in_axes=(0, _LANE_AXES, None, 0), out_axes=(0, 1, 1, 1))
    specs = (ROWS, _LANE_SPECS, ALL, ROWS), (ROWS, COLUMNS, COLUMNS, COLUMNS)
    state, *steps = on_mesh(kind.mesh, run, *specs)(state, block, is_reset, key)
    rows = (len(is_reset), -1)
    score, demand, admit = jax.tree.map(lambda a: a.reshape(*rows, *a.shape[3:]), steps)
    return state, score, demand, admit


def _score_lane(kind: Kind, state, block: Block, is_reset, key):
    strategy, shape = kind.strategy, kind.shape
    moments = moments_of(block, shape, is_stream=kind.is_stream)
    resident = jnp.zeros((shape.num_layers, shape.num_experts), bool)
    capacity = jnp.zeros(shape.num_layers, jnp.int32)

    def decide(state, moment: Moment):
        return _decide(strategy, shape, state, moment, resident, capacity, key)

    def step(state, now):
        moment, is_reset = now
        state = _renewed(state, strategy.init(shape), is_reset) if kind.resets else state
        return decide(state, moment)

    first = jax.tree.map(lambda leaf: leaf[0], moments)
    if _keeps_state(decide, state, first):
        decisions = jax.vmap(lambda moment: decide(state, moment)[1])(moments)
    else:
        state, decisions = jax.lax.scan(step, state, (moments, is_reset))
    admit = None if decisions.admit is None else pack(decisions.admit)
    return state, as_int32(decisions.keep_score), pack(moments.now > 0), admit


@functools.partial(_jit, static_argnums=0)
def _plane_block(mesh: Mesh | None, score):
    return on_mesh(mesh, rank_planes, (COLUMNS,), COLUMNS)(score)


@functools.partial(_jit, static_argnums=(0, 1))
def _select_block(mesh: Mesh | None, how: str, resident, seen, tally, steps: Steps, slots):
    run = functools.partial(select_block, how=how)
    specs = (ROWS, ROWS, ROWS, Steps._make((COLUMNS, COLUMNS, COLUMNS, ALL, ALL)), ROWS)
    return on_mesh(mesh, run, specs, (ROWS, ROWS, ROWS))(resident, seen, tally, steps, slots)


def _keeps_state(decide, state, moment: Moment) -> bool:
    """Whether a step hands on the very state it got, so that steps need not wait for each other."""
    jaxpr = jax.make_jaxpr(decide)(state, moment).jaxpr
    num_leaves = len(jax.tree.leaves(state))
    before, after = jaxpr.invars[:num_leaves], jaxpr.outvars[:num_leaves]
    return all(old is new for old, new in zip(before, after, strict=True))


# --- scores of each capacity by itself --------------------------------------------------------


class _OwnCarry(NamedTuple):
    """What goes from block to block where a strategy reads the cache.

    Attributes:
      state: The strategy's; every leaf leads with `capacities`.
      resident: Resident experts.
      seen: Experts demanded so far.
    """

    state: Any
    resident: Bool[Array, "capacities layers experts"]
    seen: Bool[Array, "layers experts"]


def per_capacity(kind: Kind, carry: _OwnCarry | None, tally, block, marks, slots, key):
    """Scores and selects for each capacity by itself."""
    if carry is None:
        start = _own_start(kind, slots.shape[1])
        carry = placed(kind.mesh, _copies(start, _num_lanes(block)))
    return _own_block(kind, carry, tally, block, marks, slots, key)


def _own_start(kind: Kind, num_capacities: int) -> _OwnCarry:
    shape = kind.shape
    state = _copies(kind.strategy.init(shape), num_capacities)
    nothing = jnp.zeros((num_capacities, shape.num_layers, shape.num_experts), bool)
    return _OwnCarry(state, nothing, nothing[0])


@functools.partial(_jit, static_argnums=0)
def _own_block(kind: Kind, carry: _OwnCarry, tally: Tally, block: Block, marks, slots, key):
    run = functools.partial(_own_lane, kind)
    num_lanes = _num_lanes(block)
    if num_lanes is None:
        return run(carry, tally, block, marks, slots, key)
    split, merge = (
        functools.partial(jax.tree.map, function)
        for function in (
            lambda rows: rows.reshape(num_lanes, -1, *rows.shape[1:]),
            lambda rows: rows.reshape(-1, *rows.shape[2:]),
        )
    )
    run = jax.vmap(run, in_axes=(0, 0, _LANE_AXES, None, 0, 0))
    specs = (ROWS, ROWS, _LANE_SPECS, ALL, ROWS, ROWS), (ROWS, ROWS)
    run = on_mesh(kind.mesh, run, *specs)
    carry, tally = run(carry, split(tally), block, marks, split(slots), key)
    return carry, merge(tally)


def _own_lane(kind: Kind, carry: _OwnCarry, tally: Tally, block: Block, marks, slots, key):
    strategy, shape = kind.strategy, kind.shape
    moments = moments_of(block, shape, is_stream=kind.is_stream)
    start = _own_start(kind, slots.shape[1])

    def serve(carried, step):
        carry, tally = carried
        moment, marks = step
        carry = _renewed(carry, start, marks.is_reset) if kind.resets else carry
        demanded = moment.now > 0

        def lane(state, resident, capacity):
            state, decision = _decide(strategy, shape, state, moment, resident, capacity, key)
            admitted = jnp.ones_like(demanded) if decision.admit is None else decision.admit
            candidates = (resident | demanded) & admitted
            return state, keep_best(decision.keep_score, candidates, capacity), admitted

        state, kept, admitted = jax.vmap(lane, in_axes=(0, 0, 1))(
            carry.state, carry.resident, slots
        )
        fresh = (demanded & ~carry.seen)[None] & admitted
        tally = _tallied(
            tally,
            num_hits=(carry.resident & demanded[None]).sum(-1, dtype=jnp.int32).T,
            num_forgiven=jnp.minimum(fresh.sum(-1), slots.T - carry.resident.sum(-1)).T,
            num_demands=demanded.sum(-1, dtype=jnp.int32),
            is_decode=marks.is_decode,
        )
        return (_OwnCarry(state, kept, carry.seen | demanded), tally), None

    return jax.lax.scan(serve, (carry, tally), (moments, marks))[0]


# --- both -------------------------------------------------------------------------------------


def _decide(
    strategy: Strategy, shape: CacheShape, state, moment: Moment, resident, capacity, key
) -> tuple[Any, Decision]:
    """One step of all layers at once."""

    def one(state, access):
        return strategy.step(state, access, jax.random.fold_in(key, access.event))

    access = layer_accesses(moment, shape, resident, capacity)
    state, decision = jax.vmap(one)(state, access)
    return state, decision._replace(prefetch_probability=None)


def _tallied(tally: Tally, *, num_hits, num_forgiven, num_demands, is_decode) -> Tally:
    """Adds one step."""
    counted = is_decode is None or is_decode
    return Tally(
        tally.num_hits + num_hits,
        tally.num_forgiven + num_forgiven,
        tally.num_decode_hits + jnp.where(counted, num_hits, 0),
        tally.num_demands + num_demands,
        tally.num_decode_demands + jnp.where(counted, num_demands, 0),
    )


def _num_lanes(block: Block) -> int | None:
    """Traces that lie side by side; None for one without an axis of lanes."""
    return block.rows.shape[1] if block.rows.ndim == 4 else None


def _copies(state, number: int | None):
    """As many of the state along a new first axis; the state itself for None."""
    if number is None:
        return state
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (number, *leaf.shape)), state)


def _renewed(state, start, is_reset):
    return jax.tree.map(lambda old, new: jnp.where(is_reset, new, old), state, start)
