"""Batches, selections, demand and next use, each against plain Python."""

import numpy as np
import pytest

from moejax.errors import UsageError
from moejax.trace import (
    Trace,
    batch_tokens,
    batch_trace,
    demand_counts,
    next_use,
    select_requests,
    split_profile,
)

_LENGTHS = (3, 1, 0, 4, 2, 5)


def _trace(lengths=_LENGTHS, num_experts=9, seed=0) -> Trace:
    generator = np.random.default_rng(seed)
    every = np.tile(np.arange(num_experts, dtype=np.uint8), (sum(lengths), 2, 1))
    return Trace(
        experts=generator.permuted(every, axis=2)[..., :3],
        num_experts=num_experts,
        request_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        phase=(np.arange(sum(lengths)) % 3 != 0).astype(np.uint8),
        token_ids=np.arange(sum(lengths), dtype=np.int32),
    )


def _lockstep(lengths, batch_size):
    """A queue served step by step, as one would write it down."""
    start = np.concatenate([[0], np.cumsum(lengths)])
    waiting = [list(range(start[i], start[i + 1])) for i in range(len(lengths)) if lengths[i]]
    places: list[list[int]] = [[] for _ in range(batch_size)]
    steps = []
    while waiting or any(places):
        for place in range(batch_size):
            if not places[place] and waiting:
                places[place] = waiting.pop(0)
        steps.append([place.pop(0) if place else -1 for place in places])
    return steps


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_schedule_equals_a_plain_queue(batch_size, seed):
    lengths = tuple(np.random.default_rng(seed).integers(0, 6, 9)) if seed else _LENGTHS
    assert batch_tokens(_trace(lengths), batch_size).tolist() == _lockstep(lengths, batch_size)


def test_every_token_is_served_once():
    tokens = batch_tokens(_trace(), 3)
    assert sorted(tokens[tokens >= 0]) == list(range(sum(_LENGTHS)))


def test_batched_experts_are_those_of_the_scheduled_tokens():
    trace = _trace()
    tokens, batched = batch_tokens(trace, 4), batch_trace(trace, 4)
    assert batched.shape == (tokens.shape[0], 2, 4 * 3)
    assert batched.dtype == np.uint8
    for step, place in np.ndindex(tokens.shape):
        expected = 255 if tokens[step, place] < 0 else trace.experts[tokens[step, place]]
        assert np.all(batched[step, :, place * 3 : place * 3 + 3] == expected)


def test_one_place_replays_the_trace():
    trace = _trace()
    np.testing.assert_array_equal(batch_trace(trace, 1), trace.experts)


def test_steps_requests_and_phase():
    trace = _trace()
    full = batch_tokens(trace, 2)
    np.testing.assert_array_equal(batch_tokens(trace, 2, num_steps=3), full[:3])
    np.testing.assert_array_equal(batch_tokens(trace, 2, num_steps=999), full)
    assert batch_tokens(trace, 1, requests=[4, 0])[:, 0].tolist() == [8, 9, 0, 1, 2]
    decode = batch_tokens(trace, 1, phase="decode")[:, 0]
    assert decode.tolist() == np.flatnonzero(trace.phase == 1).tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 2, "num_steps": 0},
        {"batch_size": 2, "phase": "both"},
        {"batch_size": 2, "requests": [6]},
        {"batch_size": 2, "requests": [-1]},
        {"batch_size": 2, "requests": [2]},
    ],
)
def test_bad_batches(arguments):
    with pytest.raises(UsageError):
        batch_trace(_trace(), **arguments)


def test_selection_follows_the_order_given():
    trace = _trace()
    chosen = select_requests(trace, [3, 0])
    assert chosen.token_ids.tolist() == [4, 5, 6, 7, 0, 1, 2]
    assert chosen.request_start.tolist() == [0, 4, 7]
    np.testing.assert_array_equal(chosen.experts, trace.experts[chosen.token_ids])
    np.testing.assert_array_equal(chosen.phase, trace.phase[chosen.token_ids])
    assert chosen.sha256 != trace.sha256
    assert np.shares_memory(select_requests(trace, [3, 4]).experts, trace.experts)


@pytest.mark.parametrize("requests", [[6], [-1], [2], []])
def test_bad_selections(requests):
    with pytest.raises(UsageError):
        select_requests(_trace(), requests)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("lengths", [_LENGTHS, (1, 1), (7,), (0, 7, 0)])
def test_profile_and_test_share_no_token(share, lengths):
    trace = _trace(lengths)
    profile, test = split_profile(trace, share)
    assert profile.num_tokens >= 1
    assert test.num_tokens >= 1
    both = np.concatenate([profile.token_ids, test.token_ids])
    assert sorted(both) == list(range(trace.num_tokens))


def test_profile_takes_its_share_of_requests_from_everywhere():
    profile, test = split_profile(_trace((2,) * 40), 0.25)
    assert (profile.num_requests, test.num_requests) == (10, 30)
    gaps = np.diff(profile.token_ids[::2])
    assert np.all(gaps == 8)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_bad_share(share):
    with pytest.raises(UsageError, match="share"):
        split_profile(_trace(), share)
    with pytest.raises(UsageError, match="one token"):
        split_profile(_trace((1,)), 0.5)


def test_demand_counts_tokens():
    trace = _trace()
    batched = batch_trace(trace, 4)
    demand = demand_counts(batched, trace.num_experts)
    assert demand.dtype == np.uint8
    for step, layer, expert in np.ndindex(demand.shape):
        assert demand[step, layer, expert] == np.sum(batched[step, layer] == expert)


def test_demand_of_the_largest_batch():
    experts = np.zeros((1, 1, 255), np.uint8)
    assert demand_counts(experts, 2).tolist() == [[[255, 0]]]
    with pytest.raises(UsageError, match="256"):
        demand_counts(np.zeros((1, 1, 256), np.uint8), 2)


def test_demand_of_sixteen_bit_experts_in_blocks():
    experts = np.array([[[0, 65535]], [[4999, 7]]] * 300, np.uint16)
    demand = demand_counts(experts, 5000)
    assert demand.sum(axis=(1, 2)).tolist() == [1, 2] * 300
    assert demand[1, 0, 4999] == demand[599, 0, 7] == 1


def test_next_use_looks_strictly_ahead():
    trace = _trace()
    demand = demand_counts(batch_trace(trace, 2), trace.num_experts)
    following = next_use(demand)
    steps = demand.shape[0]
    assert following.dtype == np.int32
    for step, layer, expert in np.ndindex(demand.shape):
        later = [s for s in range(step + 1, steps) if demand[s, layer, expert]]
        assert following[step, layer, expert] == (later[0] if later else steps)
