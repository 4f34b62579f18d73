"""The selects of one block of steps: what each capacity keeps, and what that hits.

On a CPU the steps are a scan over all rows and capacities. On a GPU a scan launches its programs
anew at every step and takes the residents through memory; there one kernel walks through all
steps of the block, each of its programs with a tile of rows and capacities in registers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Int, UInt32

from moejax.simulate._words import Words, intersect, keep_words, num_members, unite

_TILE = 128
_NUM_WARPS = 4


class Tally(NamedTuple):
    """`Counts` so far, on the device; rows are the layers of all lanes."""

    num_hits: Int[Array, "rows capacities"]
    num_forgiven: Int[Array, "rows capacities"]
    num_decode_hits: Int[Array, "rows capacities"]
    num_demands: Int[Array, " rows"]
    num_decode_demands: Int[Array, " rows"]


def no_tally(slots: Int[Array, "rows capacities"]) -> Tally:
    """Counts of nothing."""
    cells, rows = jnp.zeros_like(slots), jnp.zeros(len(slots), jnp.int32)
    return Tally(cells, cells, cells, rows, rows)


class Served(NamedTuple):
    """What goes from step to step.

    Attributes:
      resident: Resident experts of each row and capacity.
      seen: Experts demanded so far, one column; left alone where caches always fill.
      num_hits, num_forgiven, num_decode_hits: Of `Tally`.
    """

    resident: Words
    seen: Words
    num_hits: Int[Array, "rows capacities"]
    num_forgiven: Int[Array, "rows capacities"]
    num_decode_hits: Int[Array, "rows capacities"]


class Steps(NamedTuple):
    """A block of steps; sets as words.

    Attributes:
      demand: Demanded experts.
      planes: Bit planes of the ranks of all experts, low bits first.
      admit: Experts that may be kept; None admits all.
      is_decode: Steps counted in `num_decode_hits`; None counts all.
      is_reset: Steps before which the cache starts afresh; None never does.
    """

    demand: Words
    planes: tuple[Words, ...]
    admit: Words | None
    is_decode: Bool[Array, " steps"] | None
    is_reset: Bool[Array, " steps"] | None


def select_block(
    resident: Words,
    seen: Words,
    tally: Tally,
    steps: Steps,
    slots: Int[Array, "rows capacities"],
    *,
    how: str,
) -> tuple[Words, Words, Tally]:
    """Serves each step's demand and keeps the best of each capacity.

    Args:
      resident: Resident experts of each row and capacity.
      seen: Experts that each row demanded so far.
      tally: Counts so far.
      steps: What comes.
      slots: Capacities.
      how: `scan`, `kernel`, or `interpret`: the kernel without a GPU, slowly.
    """
    # A cache that admits all and starts once holds all that was seen, up to its capacity.
    always_fills = steps.admit is None and steps.is_reset is None
    carry = Served(resident, tuple(word[:, None] for word in seen), *tally[:3])
    run = _scan if how == "scan" else functools.partial(_kernel, is_interpreted=how != "kernel")
    resident, columns, num_hits, num_forgiven, num_decode_hits = run(carry, steps, slots)
    now_seen = tuple(word[:, 0] for word in columns)
    if always_fills:
        now_seen = tuple(
            old | jax.lax.reduce(word, np.uint32(0), jax.lax.bitwise_or, (0,))
            for word, old in zip(steps.demand, seen, strict=True)
        )
        before, after = (
            jnp.minimum(num_members(words)[:, None], slots) for words in (seen, now_seen)
        )
        num_forgiven = num_forgiven + after - before
    num_demands = num_decode_demands = num_members(steps.demand)
    if steps.is_decode is None:
        num_decode_hits = num_decode_hits + num_hits - tally.num_hits
    else:
        num_decode_demands = jnp.where(steps.is_decode[:, None], num_demands, 0)
    tally = Tally(
        num_hits,
        num_forgiven,
        num_decode_hits,
        tally.num_demands + num_demands.sum(0),
        tally.num_decode_demands + num_decode_demands.sum(0),
    )
    return resident, now_seen, tally


def _serve(carry: Served, step: Steps, slots: Int[Array, "rows capacities"]) -> Served:
    """One step; its words are columns, which serve all capacities of their row."""
    resident, seen, num_hits, num_forgiven, num_decode_hits = carry
    if step.is_reset is not None:
        resident, seen = (
            tuple(jnp.where(step.is_reset, jnp.zeros_like(word), word) for word in words)
            for words in (resident, seen)
        )
    hits = num_members(intersect(resident, step.demand))
    candidates = unite(resident, step.demand)
    if step.admit is not None or step.is_reset is not None:
        fresh = tuple(word & ~old for word, old in zip(step.demand, seen, strict=True))
        fresh = fresh if step.admit is None else intersect(fresh, step.admit)
        num_free = slots - num_members(resident)
        num_forgiven = num_forgiven + jnp.minimum(num_members(fresh), num_free)
        seen = unite(seen, step.demand)
    if step.admit is not None:
        candidates = intersect(candidates, step.admit)
    if step.is_decode is not None:
        num_decode_hits = num_decode_hits + jnp.where(step.is_decode, hits, 0)
    kept = keep_words(candidates, step.planes, slots)
    return Served(kept, seen, num_hits + hits, num_forgiven, num_decode_hits)


def _in_one_piece(steps: Steps) -> tuple[UInt32[Array, "steps words rows"], Steps]:
    """All words of a step side by side, and the places that they had.

    A step is then one slice: a GPU would copy each of many before it starts.
    """
    words, places = jax.tree.flatten(steps._replace(is_decode=None, is_reset=None))
    return jnp.stack(words, axis=1), places


def _scan(carry: Served, steps: Steps, slots: Int[Array, "rows capacities"]) -> Served:
    words, places = _in_one_piece(steps)

    def serve(carry, step):
        words, is_decode, is_reset = step
        now = jax.tree.unflatten(places, [word[:, None] for word in words])
        return _serve(carry, now._replace(is_decode=is_decode, is_reset=is_reset), slots), None

    return jax.lax.scan(serve, carry, (words, steps.is_decode, steps.is_reset))[0]


def _kernel(
    carry: Served, steps: Steps, slots: Int[Array, "rows capacities"], *, is_interpreted: bool
) -> Served:
    words, places = _in_one_piece(steps)
    num_steps, num_words, num_rows = words.shape
    # Tiles have powers of two as sides.
    width = math.gcd(slots.shape[1], _TILE)
    height = math.gcd(num_rows, _TILE // width)
    marks = {
        name: mark.astype(jnp.int32)
        for name in ("is_decode", "is_reset")
        if (mark := getattr(steps, name)) is not None
    }
    leaves, structure = jax.tree.flatten(carry)

    def body(words_ref, slots_ref, *refs):
        mark_refs, refs = refs[: len(marks)], refs[len(marks) :]
        sources, targets = refs[: len(leaves)], refs[len(leaves) :]
        rows = pl.ds(pl.program_id(0) * height, height)
        columns = pl.ds(pl.program_id(1) * width, width)
        tiles = [
            (rows, columns if leaf.shape[1] == slots.shape[1] else slice(None)) for leaf in leaves
        ]
        slots_here = slots_ref[rows, columns]

        def serve(step, carry):
            now = [words_ref[step, word, rows][:, None] for word in range(num_words)]
            known = {name: ref[step] != 0 for name, ref in zip(marks, mark_refs, strict=True)}
            return _serve(carry, jax.tree.unflatten(places, now)._replace(**known), slots_here)

        start = [source[tile] for source, tile in zip(sources, tiles, strict=True)]
        end = jax.lax.fori_loop(0, num_steps, serve, jax.tree.unflatten(structure, start))
        for target, tile, leaf in zip(targets, tiles, jax.tree.leaves(end), strict=True):
            target[tile] = leaf

    options: dict[str, Any] = (
        {"interpret": True}
        if is_interpreted
        else {"compiler_params": triton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1)}
    )
    found = pl.pallas_call(
        body,
        grid=(num_rows // height, slots.shape[1] // width),
        out_shape=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        name="select_block",
        **options,
    )(words, slots, *marks.values(), *leaves)
    return jax.tree.unflatten(structure, found)
