"""The registry of workloads and the traces they make."""

import dataclasses
from types import MappingProxyType

import jax
import numpy as np
import pytest

from moejax.cards import load_model
from moejax.errors import BadFileError, UsageError
from moejax.trace import validate_trace
from moejax.workloads import WORKLOADS, _latent, default_workload, make_trace, read_workload

NUM_TOKENS = 24


@pytest.fixture(scope="module", params=sorted(WORKLOADS))
def drawn(request):
    workload = WORKLOADS[request.param]
    return workload, make_trace(workload, num_requests=2, tokens_per_request=NUM_TOKENS, seed=3)


def test_registry_is_read_only_and_keyed_by_name():
    assert default_workload in WORKLOADS
    assert all(workload.name == name for name, workload in WORKLOADS.items())
    with pytest.raises(TypeError):
        WORKLOADS["mine"] = WORKLOADS[default_workload]
    with pytest.raises(TypeError):
        WORKLOADS[default_workload].parameters["popularity"] = 0.0


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_shape_is_that_of_the_model_card(name):
    workload = WORKLOADS[name]
    model = load_model(workload.model)
    assert workload.num_layers == model.num_moe_layers
    assert workload.num_experts == model.num_experts
    assert workload.num_experts_per_tok == model.num_experts_per_tok


def test_trace_is_complete(drawn):
    workload, trace = drawn
    validate_trace(trace)
    topk = workload.num_experts_per_tok
    assert trace.experts.shape == (2 * NUM_TOKENS, workload.num_layers, topk)
    assert trace.experts.dtype == np.uint8
    assert trace.lookahead.shape == (2 * NUM_TOKENS, workload.num_layers, 3, 2 * topk)
    assert trace.request_start.tolist() == [0, NUM_TOKENS, 2 * NUM_TOKENS]
    assert (trace.phase == 1).all()
    assert trace.workload == workload.name
    assert "synthetic" in trace.source
    weights = trace.routing_weights.astype(np.float32)
    assert (weights[..., :-1] >= weights[..., 1:]).all()
    assert (weights.sum(axis=-1) <= 1.01).all()


def test_experts_are_distinct_and_in_range(drawn):
    workload, trace = drawn
    ranked = np.sort(trace.experts, axis=-1)
    assert (ranked[..., 1:] > ranked[..., :-1]).all()
    assert ranked.max() < workload.num_experts


def test_lookahead_ends_with_the_layers(drawn):
    workload, trace = drawn
    for depth in range(1, 4):
        ahead = trace.lookahead[:, :, depth - 1]
        assert (ahead[:, -depth:] == 255).all()
        assert (ahead[:, :-depth] < workload.num_experts).all()
        ranked = np.sort(ahead[:, :-depth], axis=-1)
        assert (ranked[..., 1:] > ranked[..., :-1]).all()


def test_seed_decides_the_requests(drawn):
    workload, trace = drawn
    again = make_trace(workload, num_requests=2, tokens_per_request=NUM_TOKENS, seed=3)
    other = make_trace(workload, num_requests=2, tokens_per_request=NUM_TOKENS, seed=4)
    longer = make_trace(workload, num_requests=3, tokens_per_request=NUM_TOKENS, seed=3)
    assert again.sha256 == trace.sha256 != other.sha256
    np.testing.assert_array_equal(again.lookahead, trace.lookahead)
    np.testing.assert_array_equal(longer.experts[: 2 * NUM_TOKENS], trace.experts)
    assert not np.array_equal(trace.experts[:NUM_TOKENS], trace.experts[NUM_TOKENS:])


def test_routing_is_drawn_on_a_cpu_whatever_the_default_device(monkeypatch):
    inner, devices = _latent._route_request, []

    def route(*arguments, **options):
        devices.append(jax.config.jax_default_device)
        return inner(*arguments, **options)

    monkeypatch.setattr(_latent, "_route_request", route)
    make_trace(WORKLOADS[default_workload], num_requests=1, tokens_per_request=4, seed=0)
    assert devices == [jax.local_devices(backend="cpu")[0]]


def test_what_later_gates_would_choose_is_left_out_and_nothing_else_changes(drawn):
    workload, trace = drawn
    blind = make_trace(
        workload, num_requests=2, tokens_per_request=NUM_TOKENS, seed=3, with_lookahead=False
    )
    assert blind.lookahead is None
    validate_trace(blind)
    for name in ("experts", "routing_weights", "token_ids", "request_start"):
        np.testing.assert_array_equal(getattr(blind, name), getattr(trace, name))


def test_lookahead_knows_more_the_nearer_the_layer():
    trace = make_trace(
        WORKLOADS[default_workload], num_requests=2, tokens_per_request=NUM_TOKENS, seed=3
    )
    recall = [_lookahead_recall(trace, depth) for depth in (1, 2, 3)]
    assert 0.6 < recall[2] < recall[1] < recall[0] < 0.95


def test_predictable_lookahead_is_always_right_and_adversarial_never_better_than_chance():
    recall = {}
    for name in ("predictable", "adversarial"):
        trace = make_trace(WORKLOADS[name], num_requests=4, tokens_per_request=128, seed=1)
        recall[name] = _lookahead_recall(trace, 1)
    assert recall["predictable"] == 1.0
    assert recall["adversarial"] < 0.1


def test_adversarial_cycle_repeats_until_settled_and_never_after():
    workload = WORKLOADS["adversarial"]
    trace = make_trace(workload, num_requests=1, tokens_per_request=128, seed=1)
    cycle = int(workload.parameters["phase_tokens"])
    settled = int(workload.parameters["settle_tokens"])
    sets = np.sort(trace.experts, axis=-1)
    np.testing.assert_array_equal(sets[:cycle], sets[cycle : 2 * cycle])
    later = sets[settled : settled + cycle] == sets[settled + cycle : settled + 2 * cycle]
    assert later.all(axis=-1).mean() < 0.2
    per_layer = [len(np.unique(sets[:cycle, layer])) for layer in range(workload.num_layers)]
    assert set(per_layer) == {int(workload.parameters["cycle_experts"])}


@pytest.mark.parametrize(
    "bad", [{"num_requests": 0}, {"tokens_per_request": 0}, {"seed": -1}, {"seed": 2**32}]
)
def test_counts_out_of_range_are_usage_errors(bad):
    settings = {"num_requests": 1, "tokens_per_request": 1, "seed": 0, **bad}
    with pytest.raises(UsageError, match="is"):
        make_trace(WORKLOADS["uniform"], **settings)


def test_unknown_router_is_a_usage_error():
    workload = dataclasses.replace(WORKLOADS["uniform"], router="oracular")
    with pytest.raises(UsageError, match="oracular"):
        make_trace(workload, num_requests=1, tokens_per_request=1, seed=0)


@pytest.mark.parametrize("text", ["name = ", 'name = "x"', 'nonsense = 1\nname = "x"'])
def test_a_broken_card_is_a_bad_file(tmp_path, text):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(BadFileError, match=r"broken\.toml"):
        read_workload(path)


def test_a_missing_card_is_a_bad_file():
    with pytest.raises(BadFileError, match="no-such-workload"):
        read_workload("no-such-workload")


def test_more_than_255_experts_take_two_bytes():
    workload = dataclasses.replace(
        WORKLOADS["predictable"],
        num_layers=2,
        num_experts=300,
        parameters=MappingProxyType({"cycle_experts": 0, "settle_tokens": 0, "phase_tokens": 1}),
    )
    trace = make_trace(workload, num_requests=1, tokens_per_request=200, seed=0)
    assert trace.experts.dtype == trace.lookahead.dtype == np.uint16
    assert trace.experts.max() > 255
    assert (trace.lookahead[:, -1] == 2**16 - 1).all()


def _lookahead_recall(trace, depth):
    expected = trace.lookahead[:, :-depth, depth - 1, : trace.topk]
    actual = trace.experts[:, depth:]
    return (expected[..., :, None] == actual[..., None, :]).any(axis=-1).mean()
