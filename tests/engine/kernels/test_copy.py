from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.engine.kernels import _copy
from moejax.engine.kernels._copy import NUM_FIELDS, Prefetch, copy_part, schedule
from moejax.engine.kernels._parts import Launch, Part, launch
from moejax.errors import UsageError

from ._lowering import count_kernels, lower_for_gpu

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, NUM_ROWS, HIDDEN = 5, 3, 4, 90, 48
KERNELS = ("qkv", "route", "experts")
HOSTS = jax.random.normal(jax.random.key(0), (NUM_LAYERS, NUM_EXPERTS, NUM_ROWS, HIDDEN))
EMPTY = jnp.zeros((NUM_SLOTS, NUM_ROWS, HIDDEN))


def job(*, layer: int, expert: int, slot: int, issued: int, is_valid: bool = True) -> np.ndarray:
    fields = np.zeros(NUM_FIELDS, np.int32)
    named = [_copy.LAYER, _copy.EXPERT, _copy.SLOT, _copy.ISSUED, _copy.VALID]
    fields[named] = layer, expert, slot, issued, is_valid
    return fields


@partial(jax.jit, static_argnums=(0, 1, 2))
def copy(plan, kernel: str, num_warps: int, fields, event, slots, is_live=None):
    layer = event % NUM_LAYERS
    step = (event // NUM_LAYERS)[None]
    near = tuple(HOSTS[(layer + ahead) % NUM_LAYERS] for ahead in range(3))
    prefetch = Prefetch(fields, step, near)
    part = copy_part(prefetch, layer[None], NUM_LAYERS, plan, kernel, num_warps, is_live)
    (slots,), _ = launch("copy", [part], Launch(is_interpreted=True), shared=(slots,))
    return slots


@given(
    num_rows=st.integers(24, 20_000),
    layers_per_copy=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_the_last_row_lands_just_before_the_experts(num_rows: int, layers_per_copy: int):
    plan = schedule(num_rows, layers_per_copy)
    landed = [
        (layers - 1) * plan.rows_per_event + plan.rows_before_experts
        for layers in (layers_per_copy - 1, layers_per_copy)
    ]
    assert landed[0] < num_rows <= landed[1]
    assert min(plan[:3]) >= 0
    assert plan.rows_per_event == sum(plan[:3])
    assert plan.rows_before_experts == plan.rows_before("experts")


def test_rows_are_in_proportion_to_time():
    plan = schedule(4224, 3)
    times = np.array([11.5, 18, 26.5])
    shares = np.array(plan[:3]) / plan.rows_per_event
    np.testing.assert_allclose(shares, times / times.sum(), atol=1e-3)
    assert plan.rows_per_event == pytest.approx(4224 / (2 + 29.5 / 56), abs=1)


@pytest.mark.parametrize(("num_rows", "layers_per_copy"), [(24, 0), (3, 9)])
def test_an_impossible_schedule_is_refused(num_rows: int, layers_per_copy: int):
    with pytest.raises(UsageError) as caught:
        schedule(num_rows, layers_per_copy)
    assert str(layers_per_copy) in caught.value.cause


@pytest.mark.parametrize("num_warps", [1, 8])
def test_a_whole_schedule_fills_the_slot(num_warps: int):
    """Chosen in event 11, which is layer 1, for layer 3: copied in events 12 and 13."""
    plan = schedule(NUM_ROWS, 2)
    issued, slot = 11, 2
    expected = HOSTS[3, 1]
    slots, num_copied = EMPTY, 0
    for event in (12, 13):
        fields = job(layer=3, expert=1, slot=slot, issued=issued)
        for kernel in KERNELS:
            if event == 13 and kernel == "experts":
                assert num_copied >= NUM_ROWS
                np.testing.assert_array_equal(slots[slot], expected)
            slots = copy(plan, kernel, num_warps, fields, jnp.int32(event), slots)
            num_copied = min(num_copied + getattr(plan, kernel), NUM_ROWS)
            np.testing.assert_array_equal(slots[slot, :num_copied], expected[:num_copied])
            # At most a tile too many.
            reach = min(num_copied + 3 * (num_warps > 1), NUM_ROWS)
            assert not np.asarray(slots[slot, reach:]).any()
    np.testing.assert_array_equal(slots, EMPTY.at[slot].set(expected))


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_the_layer_that_is_copied_from_may_be_of_the_next_token(num_ahead: int):
    """At event 14, which is layer 4 of 5, layers 4, 0 and 1 are near."""
    plan = schedule(NUM_ROWS, 1)
    layer = (4 + num_ahead) % NUM_LAYERS
    fields = job(layer=layer, expert=2, slot=0, issued=13)
    slots = copy(plan, "route", 8, fields, jnp.int32(14), EMPTY)
    first, last = plan.qkv, plan.qkv + plan.route
    np.testing.assert_array_equal(slots[0, first:last], HOSTS[layer, 2, first:last])


@pytest.mark.parametrize(
    ("is_valid", "is_live", "event"), [(False, 1, 12), (True, 0, 12), (True, 1, 14), (True, 1, 11)]
)
def test_nothing_is_copied_without_a_job(is_valid: bool, is_live: int, event: int):
    """Without a valid one, with one that is given up, after its end, in the event that chose it."""
    plan = schedule(NUM_ROWS, 2)
    fields = job(layer=3, expert=1, slot=2, issued=11, is_valid=is_valid)
    slots = copy(
        plan, "experts", 8, fields, jnp.int32(event), EMPTY, jnp.array([is_live], jnp.int32)
    )
    np.testing.assert_array_equal(slots, EMPTY)


def test_a_live_job_goes_on():
    plan = schedule(NUM_ROWS, 2)
    fields = job(layer=3, expert=1, slot=2, issued=11)
    slots = copy(plan, "experts", 8, fields, jnp.int32(12), EMPTY, jnp.ones(1, jnp.int32))
    first, last = plan.rows_before("experts"), plan.rows_per_event
    np.testing.assert_array_equal(slots[2, first:last], HOSTS[3, 1, first:last])


def test_a_kernel_without_a_share_copies_nothing():
    plan = schedule(NUM_ROWS, 2)._replace(experts=0)
    fields = job(layer=1, expert=0, slot=0, issued=0)
    prefetch = Prefetch(jnp.asarray(fields), jnp.zeros(1, jnp.int32), (HOSTS[1],))
    assert copy_part(prefetch, jnp.ones(1, jnp.int32), NUM_LAYERS, plan, "experts", 4) is None


@pytest.mark.parametrize("num_warps", [1, 4])
def test_lowers_for_cuda_at_full_size(num_warps: int):
    plan = schedule(4224, 2)

    def step(layer, fields, step_number, hosts, slots, is_live):
        prefetch = Prefetch(fields, step_number, hosts)
        part = copy_part(prefetch, layer, 24, plan, "experts", num_warps, is_live)
        assert isinstance(part, Part)
        return launch("experts", [part], Launch(num_warps), shared=(slots,))

    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    fields = jax.ShapeDtypeStruct((NUM_FIELDS,), jnp.int32)
    host = jax.ShapeDtypeStruct((60, 4224, 2048), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((1440, 4224, 2048), jnp.bfloat16)
    program = lower_for_gpu(step, one, fields, one, (host, host, host), slots, one)
    assert count_kernels(program) == 1
