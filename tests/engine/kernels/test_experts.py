from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine.kernels import _active
from moejax.engine.kernels._active import Active
from moejax.engine.kernels._dense import Tile
from moejax.engine.kernels._experts import experts_down, experts_gate_up_part
from moejax.engine.kernels._parts import Launch, launch
from moejax.offload import pack

from ._lowering import count_kernels, lower_for_gpu

HIDDEN, FFN, NUM_EXPERTS, NUM_SLOTS = 48, 80, 7, 6
NUM_ROWS = 3 * FFN
COLUMNS = {1: 4, 3: 8}
"""Columns of `Active` by number of requests; one is left unused."""

EXPERTS = {1: (1, 2, 5), 3: (0, 1, 2, 3, 4, 5, 6)}


def random(seed: int, *shape: int, dtype=jnp.float32, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def packed_layer(dtype, seed: int = 0) -> jax.Array:
    gate_up = np.asarray(random(seed, NUM_EXPERTS, 2 * FFN, HIDDEN, dtype=dtype, scale=0.2))
    down = np.asarray(random(seed + 1, NUM_EXPERTS, HIDDEN, FFN, dtype=dtype, scale=0.2))
    return jnp.asarray(pack(gate_up, down))


def activations(num_requests: int, dtype) -> tuple[jax.Array, jax.Array]:
    """A normed stream and a residual stream, padded to the columns of a tile."""
    width = 1 if num_requests == 1 else 16
    is_real = np.arange(width)[None, :] < num_requests
    x, y = (random(seed, HIDDEN, width, dtype=dtype) * is_real for seed in (7, 8))
    return x.astype(dtype), y.astype(jnp.float32)


def routing_weights(num_requests: int) -> np.ndarray:
    """What each column counts for each request; every second one for the first request only."""
    width = 1 if num_requests == 1 else 16
    weights = np.zeros((COLUMNS[num_requests], width), np.float32)
    for column in range(len(EXPERTS[num_requests])):
        weights[column, : num_requests if column % 2 else 1] = 0.1 * (column + 1)
    return weights


def active(num_requests: int, **columns: dict[int, int]) -> Active:
    """All experts missed and streamed past, but for the entries that `columns` changes."""
    table = np.zeros((_active.NUM_ROWS, COLUMNS[num_requests]), np.int32)
    experts = EXPERTS[num_requests]
    table[_active.EXPERT, : len(experts)] = experts
    table[_active.ACTIVE, : len(experts)] = 1
    table[_active.PARTNER] = -1
    for name, entries in columns.items():
        for column, entry in entries.items():
            table[getattr(_active, name), column] = entry
    weights = jnp.asarray(routing_weights(num_requests))
    return Active(jnp.asarray(table), weights, jnp.ones(1, jnp.int32))


def unused_slots(dtype) -> jax.Array:
    """Slots whose content must never reach an answer."""
    return jnp.full((NUM_SLOTS, NUM_ROWS, HIDDEN), 1e4, dtype)


@partial(jax.jit, static_argnums=(5, 6))
def compute(active, x, y, host, slots, gate_up_tile: Tile | None = None, down_tile=None):
    """Both kernels; returns slots, hidden values and the new residual stream."""
    how = Launch(is_interpreted=True)
    part = experts_gate_up_part(active, x, host, tile=gate_up_tile, is_interpreted=True)
    (slots,), ((inner,),) = launch("experts", [part], how, shared=(slots,))
    answered = experts_down(active, y, inner, host, slots, how, tile=down_tile)
    return answered.slots, inner, answered.x


def plain(num_requests: int, x, y, host) -> np.ndarray:
    """The same in float32, an expert at a time."""
    x, y, host = (np.asarray(array, np.float32) for array in (x, y, host))
    for column, expert in enumerate(EXPERTS[num_requests]):
        gate, up, down = np.split(host[expert], 3)
        inner = jax.nn.silu(gate @ x) * (up @ x)
        answer = down.reshape(HIDDEN, FFN) @ inner
        y = y + answer * routing_weights(num_requests)[column][None, :]
    return np.asarray(y)


def run(num_requests: int, slots, dtype=jnp.float32, **columns: dict[int, int]):
    x, y = activations(num_requests, dtype)
    return compute(active(num_requests, **columns), x, y, packed_layer(dtype), slots)


def everything_missed(num_requests: int, dtype=jnp.float32) -> np.ndarray:
    return np.asarray(run(num_requests, unused_slots(dtype), dtype)[2])


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_equals_plain_arithmetic(num_requests: int, dtype, tolerance: float):
    x, y = activations(num_requests, dtype)
    expected = plain(num_requests, x, y, packed_layer(dtype))
    found = np.asarray(everything_missed(num_requests, dtype), np.float32)
    error = np.abs(found - expected)[:, :num_requests].max()
    assert error <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("num_requests", [1, 3])
def test_what_streams_past_leaves_the_slots_alone(num_requests: int):
    slots = unused_slots(jnp.float32)
    after, _, _ = run(num_requests, slots, SLOT={0: 0, 1: 0})
    np.testing.assert_array_equal(after, slots)


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_answer_does_not_depend_on_what_is_resident(num_requests: int, dtype):
    host = packed_layer(dtype)
    experts = EXPERTS[num_requests]
    missed = everything_missed(num_requests, dtype)
    # All that there are slots for are hits; then the same, all misses that stay.
    columns = range(min(len(experts), NUM_SLOTS))
    places = {column: NUM_SLOTS - 1 - column for column in columns}
    full = unused_slots(dtype)
    for column, slot in places.items():
        full = full.at[slot].set(host[experts[column]])
    after, _, hit = run(num_requests, full, dtype, SLOT=places, LANDED=dict.fromkeys(columns, 240))
    np.testing.assert_array_equal(np.asarray(hit), missed)
    np.testing.assert_array_equal(after, full)
    after, _, entered = run(
        num_requests, unused_slots(dtype), dtype, SLOT=places, WRITE=dict.fromkeys(columns, 1)
    )
    np.testing.assert_array_equal(np.asarray(entered), missed)
    np.testing.assert_array_equal(after, full)


@pytest.mark.parametrize("num_requests", [1, 3])
# In the gate, at its end, in the up matrix, in the down matrix, and all but one row.
@pytest.mark.parametrize("num_landed", [1, 16, 37, 80, 129, 160, 201, 239])
@pytest.mark.parametrize("stays", [True, False])
def test_a_late_expert_is_read_from_both(num_requests: int, num_landed: int, stays: bool):
    host, slots = packed_layer(jnp.float32), unused_slots(jnp.float32)
    expert = EXPERTS[num_requests][1]
    slots = slots.at[4, :num_landed].set(host[expert, :num_landed])
    # A hit and a miss beside it.
    slots = slots.at[2].set(host[EXPERTS[num_requests][0]])
    after, _, found = run(
        num_requests,
        slots,
        SLOT={0: 2, 1: 4, 2: 1},
        LANDED={0: NUM_ROWS, 1: num_landed},
        WRITE={1: int(stays), 2: 1},
    )
    np.testing.assert_array_equal(np.asarray(found), everything_missed(num_requests))
    expected = slots.at[1].set(host[EXPERTS[num_requests][2]])
    if stays:
        expected = expected.at[4].set(host[expert])
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize(("loser", "winner"), [(0, 2), (2, 0), (1, 2)])
def test_a_hit_is_read_before_a_miss_takes_its_slot(num_requests: int, loser: int, winner: int):
    host = packed_layer(jnp.float32)
    experts = EXPERTS[num_requests]
    slots = unused_slots(jnp.float32).at[3].set(host[experts[loser]])
    after, _, found = run(
        num_requests,
        slots,
        SLOT={loser: 3, winner: 3},
        LANDED={loser: NUM_ROWS},
        WRITE={winner: 1},
        PARTNER={winner: loser},
        SKIP={loser: 1},
    )
    np.testing.assert_array_equal(np.asarray(found), everything_missed(num_requests))
    np.testing.assert_array_equal(after, slots.at[3].set(host[experts[winner]]))


def test_two_slots_change_hands_at_once():
    host, experts = packed_layer(jnp.float32), EXPERTS[3]
    slots = unused_slots(jnp.float32).at[0].set(host[experts[4]]).at[5].set(host[experts[1]])
    after, _, found = run(
        3,
        slots,
        SLOT={4: 0, 2: 0, 1: 5, 6: 5},
        LANDED={4: NUM_ROWS, 1: 33},
        WRITE={2: 1, 6: 1},
        PARTNER={2: 4, 6: 1},
        SKIP={4: 1, 1: 1},
    )
    np.testing.assert_array_equal(np.asarray(found), everything_missed(3))
    expected = slots.at[0].set(host[experts[2]]).at[5].set(host[experts[6]])
    np.testing.assert_array_equal(after, expected)


def test_undefined_hidden_values_of_unused_columns_do_not_count():
    """One request has three experts here, and a fourth column that nothing is known of."""
    _, y = activations(1, jnp.float32)
    host = packed_layer(jnp.float32)
    inner = jnp.full((4, FFN, 1), jnp.nan).at[:3].set(random(3, 3, FFN, 1))
    slots = unused_slots(jnp.float32)
    found = experts_down(active(1), y, inner, host, slots, Launch(is_interpreted=True))
    assert np.isfinite(np.asarray(found.x)).all()


@pytest.mark.parametrize(
    ("num_requests", "gate_up_tile", "down_tile"),
    [(1, Tile(4, 16, 4), Tile(16, 64, 8)), (3, Tile(16, 32, 4), Tile(16, 16, 4))],
)
def test_any_cut_gives_the_same_up_to_rounding(num_requests: int, gate_up_tile, down_tile):
    x, y = activations(num_requests, jnp.float32)
    slots = unused_slots(jnp.float32)
    host = packed_layer(jnp.float32)
    _, _, found = compute(active(num_requests), x, y, host, slots, gate_up_tile, down_tile)
    expected = everything_missed(num_requests)
    np.testing.assert_allclose(
        np.asarray(found)[:, :num_requests], expected[:, :num_requests], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_slots", [192, 1440])
@pytest.mark.parametrize(("width", "columns"), [(1, 4), (16, 64)])
def test_lowers_for_cuda_at_full_size(num_slots: int, width: int, columns: int):
    """Of a size where an array of all slots does not fit 32-bit offsets, without a GPU."""

    def step(active, x, y, host, slots):
        how = Launch(num_warps=4)
        part = experts_gate_up_part(active, x, host)
        (slots,), ((inner,),) = launch("experts", [part], how, shared=(slots,))
        return experts_down(active, y, inner, host, slots, how)

    def of(*shape: int, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    table = Active(
        of(_active.NUM_ROWS, columns, dtype=jnp.int32),
        of(columns, width, dtype=jnp.float32),
        of(1, dtype=jnp.int32),
    )
    shapes = (of(2048, width), of(2048, width, dtype=jnp.float32))
    program = lower_for_gpu(step, table, *shapes, of(60, 4224, 2048), of(num_slots, 4224, 2048))
    # Several requests need one more, which adds up their experts.
    assert count_kernels(program) == (2 if width == 1 else 3)
