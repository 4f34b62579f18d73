"""Rows of an expert's matrices, read from a slot or from host memory, and their products."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from . import _active
from ._parts import pieces


class Source(NamedTuple):
    """Where one column's expert is read, and whether it is written through."""

    slots_ref: jax.Ref
    host_ref: jax.Ref
    expert: Array
    slot: Array
    num_landed: Array
    is_written: Array
    is_active: Array

    @classmethod
    def of_column(cls, table_ref, column, slots_ref, host_ref) -> "Source":
        """Reads the column's entries of `Active.table`."""
        return cls(
            slots_ref,
            host_ref,
            table_ref[_active.EXPERT, column],
            table_ref[_active.SLOT, column],
            table_ref[_active.LANDED, column],
            table_ref[_active.WRITE, column] > 0,
            table_ref[_active.ACTIVE, column] > 0,
        )


class Block(NamedTuple):
    """Some rows of a matrix of one expert.

    Attributes:
      source: Where the expert lies.
      at: Index within the expert, as it lies in a slot, of so many columns from an offset on.
      at_host: The same as it lies in host memory; None where it lies alike.
      has_landed: Whether all of the rows are in the slot; if not, all are read from the host.
    """

    source: Source
    at: Callable[[int | Array, int], tuple]
    has_landed: Array
    at_host: Callable[[int | Array, int], tuple] | None = None

    def read_slot(self, offset: int | Array, length: int) -> Array:
        """Reads columns of what has landed."""
        return self.source.slots_ref[(self.source.slot, *self.at(offset, length))]

    def read(self, offset: int | Array, length: int) -> Array:
        """Reads columns from where they are."""
        source, at_host = self.source, self.at_host or self.at
        return jax.lax.cond(
            self.has_landed,
            lambda: self.read_slot(offset, length),
            lambda: source.host_ref[(source.expert, *at_host(offset, length))],
        )

    def read_if(self, is_needed: Array, offset: int, length: int, rows: int) -> Array:
        """The same where needed, else zeros."""
        dtype = self.source.slots_ref.dtype
        return jax.lax.cond(
            is_needed, lambda: self.read(offset, length), lambda: jnp.zeros((rows, length), dtype)
        )

    def write_through(self, offset: int | Array, length: int, weights: Array) -> None:
        """Puts columns that were read from the host into the slot, if they are to stay there."""
        source = self.source

        @pl.when(source.is_written & jnp.logical_not(self.has_landed))
        def _():
            source.slots_ref[(source.slot, *self.at(offset, length))] = weights


def down_block(source: Source, row: Array, rows: int, ffn: int, hidden: int) -> Block:
    """Rows of the down matrix, which in host memory go on from one packed row to the next.

    There no view with rows of `ffn` is needed. Unsigned division keeps the compiler sure that
    runs of columns are runs in memory.
    """
    first = 2 * ffn * hidden + row * ffn

    def at(offset, length):
        return pl.ds(2 * hidden + row, rows), pl.ds(offset, length)

    def at_host(offset, length):
        start = (jnp.asarray(first) + offset).astype(jnp.uint32)
        line = jax.lax.broadcasted_iota(jnp.uint32, (rows, length), 0)
        place = jax.lax.broadcasted_iota(jnp.uint32, (rows, length), 1)
        element = start + line * jnp.uint32(ffn) + place
        width = jnp.full((rows, length), hidden, jnp.uint32)
        return jax.lax.div(element, width), jax.lax.rem(element, width)

    return Block(source, at, first + rows * ffn <= source.num_landed * hidden, at_host)


def take_turns(
    table_ref, column: Array, compute: Callable[[Array], None], is_interpreted: bool
) -> None:
    """Computes a column, and first the one whose slot it takes; another's partner waits for it."""
    partner = table_ref[_active.PARTNER, column]
    is_needed = (table_ref[_active.ACTIVE, column] > 0) & (table_ref[_active.SKIP, column] == 0)
    has_partner = (partner >= 0).astype(jnp.int32)

    def turn(number, carry):
        is_second = number > 0

        @pl.when(is_second)
        def _():
            barrier(is_interpreted)

        compute(jnp.where(is_second, column, jnp.maximum(partner, 0)))
        return carry

    jax.lax.fori_loop(1 - has_partner, 1 + is_needed.astype(jnp.int32), turn, 0)


def barrier(is_interpreted: bool) -> None:
    """All threads of a program have read before any goes on; interpreted programs have one."""
    if not is_interpreted:
        triton.debug_barrier()


def sum_products(blocks: list[Block], x_ref, columns: int) -> list[Array]:
    """Rows of each block times one request's activations."""
    cuts = pieces(x_ref.shape[0], columns)
    tiles = [[block.read(*cut) for cut in cuts] for block in blocks]
    values = [x_ref[pl.ds(*cut), 0].astype(jnp.float32)[None, :] for cut in cuts]
    sums = []
    for found in tiles:
        total = jnp.zeros(found[0].shape[0], jnp.float32)
        for weights, value in zip(found, values, strict=True):
            total = total + jnp.sum(weights.astype(jnp.float32) * value, axis=1)
        sums.append(total)
    for block, found in zip(blocks, tiles, strict=True):
        for cut, weights in zip(cuts, found, strict=True):
            block.write_through(*cut, weights)
    return sums


def multiply(
    blocks: list[Block], values: Callable, size: int, rows: int, columns: int
) -> list[Array]:
    """Rows of each block times several requests' activations.

    What lies in slots is read in a loop of its own without a branch, which can be pipelined.
    """
    num_whole = size // columns

    def run(read):
        def add(sums, offset, length):
            operand = values(offset, length)
            return [
                old + _dot(read(block, offset, length), operand)
                for old, block in zip(sums, blocks, strict=True)
            ]

        sums = [jnp.zeros((rows, values(0, 16).shape[1]), jnp.float32) for _ in blocks]
        if num_whole:
            sums = jax.lax.fori_loop(0, num_whole, lambda i, s: add(s, i * columns, columns), sums)
        for offset, length in pieces(size % columns):
            sums = add(sums, num_whole * columns + offset, length)
        return sums

    def read_through(block, offset, length):
        weights = block.read(offset, length)
        block.write_through(offset, length, weights)
        return weights

    all_landed = blocks[0].has_landed
    for block in blocks[1:]:
        all_landed = all_landed & block.has_landed
    return jax.lax.cond(all_landed, lambda: run(Block.read_slot), lambda: run(read_through))


def _dot(weights: Array, values: Array) -> Array:
    """A product on the tensor cores, float32 not rounded to fewer bits before."""
    return triton.dot(weights, values, allow_tf32=False if weights.dtype == jnp.float32 else None)


def at_once(ref, *at) -> Callable[[int | Array, int], Array]:
    """Reads features of all requests from an offset on."""
    return lambda offset, length: ref[(*at, pl.ds(offset, length), slice(None))]
