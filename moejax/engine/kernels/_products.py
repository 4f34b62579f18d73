"""Rows of a matrix times activations: what every dense kernel does.

Activations are [features, batch_pad]. For one request batch_pad is 1 and a product is multiplied
and summed in float32; for 2 to 16 it is 16 and the tensor cores do it. Columns beyond the batch
are never mixed with others: they may hold anything.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from ._parts import pieces

Reader = Callable[[Any, int], Array]
"""Reads a tile of so many columns from an offset on."""


def read_activations(ref) -> Reader:
    """Reads activations: [features] of one request, [features, 16] of several."""
    batch = 0 if ref.shape[1] == 1 else slice(None)
    return lambda offset, length: ref[pl.ds(offset, length), batch]


def read_matrix(ref, at: tuple, row: int | Array, rows: int) -> Reader:
    """Reads some rows of the matrix that lies at `at`: [rows, columns]."""
    return lambda offset, length: ref[(*at, pl.ds(row, rows), pl.ds(offset, length))]


def products(
    matrices: Sequence[Reader], x: Reader, size: int, rows: int, columns: int, batch_pad: int
) -> list[Array]:
    """Products of rows of several matrices with the same activations.

    Args:
      matrices: Readers of the matrices.
      x: Reader of the activations.
      size: Columns of the matrices.
      rows: Rows that each reader gives.
      columns: Columns to read at a time, a power of two.
      batch_pad: 1 for one request, 16 for several.

    Returns:
      Float32 [rows] for one request, [rows, 16] for several.
    """
    if batch_pad == 1:
        return [_sum_up(found) for found in _multiply(matrices, x, pieces(size, columns))]
    num_whole = size // columns

    def add(sums, offset, length):
        operand = x(offset, length)
        return [
            total + _dot(read(offset, length), operand)
            for total, read in zip(sums, matrices, strict=True)
        ]

    sums = [jnp.zeros((rows, batch_pad), jnp.float32) for _ in matrices]
    if num_whole:
        sums = jax.lax.fori_loop(0, num_whole, lambda i, s: add(s, i * columns, columns), sums)
    for offset, length in pieces(size % columns):
        sums = add(sums, num_whole * columns + offset, length)
    return sums


def write(ref, row: int | Array, rows: int, value: Array, at: tuple = ()) -> None:
    """Writes rows of activations, [rows] of one request or [rows, 16] of several."""
    batch = 0 if ref.shape[-1] == 1 else slice(None)
    ref[(*at, pl.ds(row, rows), batch)] = value


def fit_rows(most: int, size: int) -> int:
    """Rows of a program: a power of two of at most `most` and `size`."""
    return min(most, 1 << (size.bit_length() - 1))


def first_row(program: Array, rows: int, size: int) -> Array:
    """First row of a program; the last two overlap where the rows do not divide the size."""
    first = program * rows
    return first if size % rows == 0 else jnp.minimum(first, size - rows)


def _multiply(
    matrices: Sequence[Reader], x: Reader, parts: Sequence[tuple[int, int]]
) -> list[dict[int, Array]]:
    """For each matrix its elements times the activations, pieces of one length added up."""
    partial: list[dict[int, Array]] = [{} for _ in matrices]
    for offset, length in parts:
        operand = x(offset, length).astype(jnp.float32)[None, :]
        for found, read in zip(partial, matrices, strict=True):
            product = read(offset, length).astype(jnp.float32) * operand
            found[length] = found[length] + product if length in found else product
    return partial


def _sum_up(partial: dict[int, Array]) -> Array:
    first, *rest = [jnp.sum(piece, axis=1) for piece in partial.values()]
    return sum(rest, start=first)


def _dot(a: Array, b: Array) -> Array:
    """A product on the tensor cores, which must not round float32 to fewer bits before."""
    return triton.dot(a, b, allow_tf32=False if a.dtype == jnp.float32 else None)
