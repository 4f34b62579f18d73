"""What is kept and said of the recording of a small model, on traces whose answers are known."""

import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.errors import BadFileError
from moejax.trace import Trace, validate_trace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import record_model

LAYERS, EXPERTS = 3, 8


def make_trace(num_requests, num_new, favourites):
    """Two prompt tokens and some new ones a request; requests use their domain's experts."""
    generator = np.random.default_rng(0)
    length = 2 + num_new
    experts = np.stack(
        [
            generator.permuted(
                np.tile(favourites[request % len(favourites)], (length, LAYERS, 1)), axis=-1
            )
            for request in range(num_requests)
        ]
    ).reshape(-1, LAYERS, 2)
    # The gate names the truth one layer on, and the wrong experts two layers on.
    lookahead = np.full((experts.shape[0], LAYERS, 2, 3), 255, np.uint8)
    lookahead[:, :-1, 0, :2] = experts[:, 1:, ::-1]
    lookahead[:, :-1, 0, 2] = (experts[:, 1:].max(-1) + 1) % EXPERTS
    lookahead[:, :-2, 1] = (experts[:, 2:].max(-1)[..., None] + [1, 2, 3]) % EXPERTS
    return Trace(
        experts=experts.astype(np.uint8),
        num_experts=EXPERTS,
        request_start=np.arange(num_requests + 1) * length,
        phase=np.tile(np.repeat(np.array([0, 1], np.uint8), [2, num_new]), num_requests),
        routing_weights=np.full(experts.shape, 0.5, np.float16),
        token_ids=np.arange(experts.shape[0], dtype=np.int32),
        lookahead=lookahead,
        expert_bytes=np.full(LAYERS, 7),
        is_router_order=True,
    )


@pytest.fixture
def trace():
    """Requests 0 to 3 are of one domain, 4 to 7 of another."""
    return make_trace(8, 5, [[0, 1]] * 4 + [[5, 6]] * 4)


def test_only_generated_tokens_are_kept(trace):
    decoded = record_model.keep_decode(trace)
    assert decoded.num_tokens == 8 * 5
    np.testing.assert_array_equal(np.diff(decoded.request_start), 5)
    np.testing.assert_array_equal(decoded.token_ids, trace.token_ids[trace.phase == 1])
    assert decoded.routing_weights is None
    assert decoded.expert_bytes is None
    validate_trace(decoded)


def test_a_limit_in_bytes_drops_requests_evenly(trace):
    counts = {"a": 4, "b": 4}
    decoded = record_model.keep_decode(trace)
    whole, kept = record_model.fit(decoded, counts, 2**20)
    assert kept == counts
    assert whole.num_requests == 8
    num_bytes = 5 * (LAYERS * (2 + 2 * 3) + 4 + 1)
    part, kept = record_model.fit(decoded, counts, 2**14 + 5 * 8 + 4 * num_bytes)
    assert kept == {"a": 2, "b": 2}
    np.testing.assert_array_equal(part.experts[:10], decoded.experts[:10])
    np.testing.assert_array_equal(part.experts[10:], decoded.experts[20:30])
    with pytest.raises(BadFileError):
        record_model.fit(decoded, counts, 2**14)


def test_domains_that_share_no_expert_are_as_far_apart_as_can_be(trace):
    found = record_model.describe_domains(trace, {"a": 4, "b": 4})
    assert found["within_domain_distance"] == 0
    assert found["between_domains_distance"] == 1
    assert found["pinned_0.25"] == {
        "same_domain_hit_ratio": 1,
        "other_domain_hit_ratio": 0,
        "chance_ratio": 0.25,
    }


def test_domains_that_route_alike_are_told_so():
    trace = make_trace(8, 5, [[2, 3]])
    found = record_model.describe_domains(trace, {"a": 4, "b": 4})
    assert found["between_domains_distance"] == 0
    assert found["pinned_0.5"]["other_domain_hit_ratio"] == 1


def test_lookahead_recall_is_of_the_layer_that_was_meant(trace):
    found = record_model.lookahead_recall(trace)
    assert found == {"1": {"best_2": 1.0, "best_3": 1.0}, "2": {"best_2": 0.0, "best_3": 0.0}}
