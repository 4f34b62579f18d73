"""States taken apart for a scan over layers, and put together again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.simulate._layer_states import Parts, joined, layer_of, part, with_layer
from moejax.strategies import CacheShape

SHAPE = CacheShape(num_layers=3, num_experts=4, topk=2, depth=2)


class State(NamedTuple):
    num_pairs: jax.Array
    last_use: jax.Array
    num_steps: jax.Array


def state_of_all_layers() -> State:
    return State(
        jnp.arange(48.0).reshape(3, 4, 4), jnp.arange(12).reshape(3, 4), jnp.zeros(3, jnp.int32)
    )


def test_tables_of_pairs_are_told_from_rows_and_joined_again():
    states = state_of_all_layers()
    parts = part(states, SHAPE, num_layers=3)
    assert parts.tables._replace(num_pairs=None) == (None, None, None)
    assert parts.rows.num_pairs is None
    back = joined(parts)
    assert all(mine is given for mine, given in zip(back, states, strict=True))
    one = jax.tree.map(lambda leaf: leaf[1], states)
    assert part(one, SHAPE).tables.num_pairs is one.num_pairs
    assert part(one, SHAPE).rows.last_use is one.last_use
    np.testing.assert_array_equal(layer_of(parts.tables, 1).num_pairs, one.num_pairs)


def test_a_state_that_holds_nothing_else_is_joined_too():
    rows = {"nothing": jnp.zeros(3)}
    assert joined(part(rows, SHAPE, num_layers=3))["nothing"] is rows["nothing"]
    assert joined(Parts({}, {})) == {}


def test_one_layer_changes_and_what_is_handed_on_is_not_copied():
    tables = {"read": jnp.ones((3, 4, 4)), "counted": jnp.zeros((3, 4, 4))}
    before = layer_of(tables, 2)
    after = before | {"counted": before["counted"] + 5}
    changed = with_layer(tables, 2, before, after)
    assert changed["read"] is tables["read"]
    np.testing.assert_array_equal(changed["counted"][:, 0, 0], [0, 0, 5])


def test_lanes_share_a_table_that_none_of_them_changes():
    def lane(row):
        tables = {"read": jnp.ones((3, 4, 4))}

        def serve(tables, layer):
            before = layer_of(tables, layer)
            return with_layer(tables, layer, before, before), before["read"].sum() + row

        return jax.lax.scan(serve, tables, jnp.arange(3))

    tables, sums = jax.vmap(lane, out_axes=({"read": None}, 0))(jnp.arange(2.0))
    assert tables["read"].shape == (3, 4, 4)
    np.testing.assert_array_equal(sums, [[16, 16, 16], [17, 17, 17]])
