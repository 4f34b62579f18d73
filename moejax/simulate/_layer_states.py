"""A strategy's states while one layer after another is served by a scan.

Small leaves go through the scan as its rows. Tables of pairs of experts are carried, and one layer
of them changed in place. On a CPU tables as rows take two thirds more time, since XLA copies and
transposes them at every step; small leaves that are carried take a fifth more, since it copies
those at every event.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from moejax.strategies import CacheShape


class Parts(NamedTuple):
    """Two trees of one form; where one has a leaf, the other has None."""

    tables: Any
    rows: Any


def part(states: Any, shape: CacheShape, *, num_layers: int = 1) -> Parts:
    """Takes states apart.

    Args:
      states: States of `num_layers` layers.
      shape: Whose experts make pairs.
      num_layers: 1 stands for one layer without a leading axis, too.
    """
    table_size = num_layers * shape.num_experts**2
    return Parts(
        jax.tree.map(lambda leaf: leaf if leaf.size >= table_size else None, states),
        jax.tree.map(lambda leaf: leaf if leaf.size < table_size else None, states),
    )


def joined(parts: Parts) -> Any:
    """The states that `part` took apart."""
    return jax.tree.map(
        lambda table, row: row if table is None else table,
        *parts,
        is_leaf=lambda leaf: leaf is None,
    )


def layer_of(tables: Any, layer: Int[Array, ""]) -> Any:
    """One layer of each table."""
    return jax.tree.map(
        lambda table: jax.lax.dynamic_index_in_dim(table, layer, keepdims=False), tables
    )


def with_layer(tables: Any, layer: Int[Array, ""], before: Any, after: Any) -> Any:
    """The tables with one layer changed from `before` to `after`.

    A table that a step hands on untouched is left alone: it is not copied, and `vmap` shares one
    among all lanes.
    """

    def put(table, old, new):
        return table if new is old else jax.lax.dynamic_update_index_in_dim(table, new, layer, 0)

    return jax.tree.map(put, tables, before, after)
