"""Experts dealt out among devices: the shares of a routing, against the routing itself."""

import jax
import numpy as np
import pytest

from moejax.errors import UsageError
from moejax.simulate import ranks, replay
from moejax.strategies import lru
from moejax.trace import Trace, batch_trace, demand_counts, share_of, validate_trace

NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS, TOPK = 40, 2, 11, 4
ABSENT = 255


def _trace(seed: int = 0) -> Trace:
    """Requests of ten tokens, some of whose places name no expert, with all that a trace holds."""
    rng = np.random.default_rng(seed)
    every = np.tile(np.arange(NUM_EXPERTS, dtype=np.uint8), (NUM_TOKENS, NUM_LAYERS, 1))
    experts = rng.permuted(every, axis=2)[..., :TOPK]
    experts[rng.random(experts.shape) < 0.1] = ABSENT
    lookahead = rng.permuted(every, axis=2)[:, :, None, :6]
    lookahead[:, -1] = ABSENT
    return Trace(
        experts=experts,
        num_experts=NUM_EXPERTS,
        request_start=np.arange(0, NUM_TOKENS + 1, 10, dtype=np.int64),
        phase=(np.arange(NUM_TOKENS) % 10 > 2).astype(np.uint8),
        routing_weights=rng.random(experts.shape).astype(np.float16),
        lookahead=lookahead,
        expert_bytes=np.array([100, 200]),
        is_router_order=True,
    )


@pytest.mark.parametrize("num_devices", [2, 3, 8, 11])
def test_shares_are_the_whole_dealt_out(num_devices):
    trace = _trace()
    whole = demand_counts(batch_trace(trace, 3), NUM_EXPERTS)
    for device in range(num_devices):
        share = share_of(trace, device, num_devices)
        validate_trace(share)
        assert share.num_experts == len(range(NUM_EXPERTS)[device::num_devices])
        demand = demand_counts(batch_trace(share, 3), share.num_experts)
        np.testing.assert_array_equal(demand, whole[:, :, device::num_devices])
        assert share.sha256 != trace.sha256
        np.testing.assert_array_equal(share.request_start, trace.request_start)


def test_a_token_keeps_the_order_and_the_weights_of_its_router():
    trace = _trace()
    num_devices = 3
    for device in range(num_devices):
        share = share_of(trace, device, num_devices)
        for token, layer in np.ndindex(NUM_TOKENS, NUM_LAYERS):
            pairs = zip(
                trace.experts[token, layer].tolist(),
                trace.routing_weights[token, layer].tolist(),
                strict=True,
            )
            mine = [(e, w) for e, w in pairs if e < NUM_EXPERTS and e % num_devices == device]
            empty = share.topk - len(mine)
            assert share.experts[token, layer].tolist() == (
                [e // num_devices for e, _ in mine] + [ABSENT] * empty
            )
            assert share.routing_weights[token, layer].tolist() == (
                [w for _, w in mine] + [0.0] * empty
            )


def test_gates_rank_as_among_all_experts():
    trace = _trace()
    whole = replay(trace.experts, NUM_EXPERTS, lookahead=trace.lookahead[:, :, :, None]).lookahead
    for device in range(2):
        share = share_of(trace, device, 2)
        mine = replay(share.experts, share.num_experts, lookahead=share.lookahead[:, :, :, None])
        np.testing.assert_array_equal(mine.lookahead, whole[..., device::2])


def test_one_device_sees_the_trace_itself():
    trace = _trace()
    assert share_of(trace, 0, 1) is trace


def test_a_device_of_one_expert_has_room_for_one():
    share = share_of(_trace(), 10, 11)
    assert (share.num_experts, share.topk) == (1, 1)


@pytest.mark.parametrize(
    ("device", "num_devices", "cause"),
    [(0, 0, "0 devices"), (0, 12, "12 devices"), (2, 2, "device 2"), (-1, 2, "device -1")],
)
def test_no_such_device(device, num_devices, cause):
    with pytest.raises(UsageError, match=cause):
        share_of(_trace(), device, num_devices)


def _plain_lru_hits(events: list[set[int]], capacity: int) -> int:
    """A cache that keeps the last used of an event and what it held, the lower number first."""
    last_use: dict[int, int] = {}
    num_hits = 0
    for now, demand in enumerate(events):
        num_hits += len(demand & last_use.keys())
        last_use |= dict.fromkeys(demand, now)
        kept = sorted(last_use, key=lambda expert: (-last_use[expert], expert))[:capacity]
        last_use = {expert: last_use[expert] for expert in kept}
    return num_hits


def test_devices_are_caches_of_their_own():
    num_devices, capacity = 3, 2
    trace = _trace()
    num_hits = 0
    for device in range(num_devices):
        share = share_of(trace, device, num_devices)
        lane = replay(batch_trace(share, 2), share.num_experts, with_future=False)
        counts = ranks(lru(), lane, np.array([capacity]), jax.random.key(0), topk=share.topk)
        num_hits += int(counts.num_hits.sum())
    expected = 0
    for layer in range(NUM_LAYERS):
        events = [set(ids.tolist()) - {ABSENT} for ids in batch_trace(trace, 2)[:, layer]]
        for device in range(num_devices):
            mine = [{e for e in event if e % num_devices == device} for event in events]
            expected += _plain_lru_hits(mine, capacity)
    assert num_hits == expected > 0
