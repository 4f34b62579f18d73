"""Statistics on routing whose answers are known."""

import numpy as np
import pytest

from moejax.trace import Trace, import_trace, statistics


def _trace(experts, lengths=None, num_experts=8) -> Trace:
    experts = np.asarray(experts, np.uint8)
    lengths = (experts.shape[0],) if lengths is None else lengths
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Trace(experts=experts, num_experts=num_experts, request_start=start)


def test_a_constant_trace():
    told = statistics(_trace([[[0, 1], [2, 3]]] * 10, lengths=(5, 5)))
    assert told.reuse_ratio == 1
    assert told.reuse_chance_ratio == 0.25
    assert told.gini == pytest.approx(0.75)
    assert told.max_mean_load_ratio == pytest.approx(4)
    assert told.next_layer_recall_ratio == 1


def test_flat_routing_without_reuse():
    experts = [[[2 * (t % 4), 2 * (t % 4) + 1]] for t in range(16)]
    told = statistics(_trace(experts))
    assert told.reuse_ratio == 0
    assert told.gini == pytest.approx(0)
    assert told.max_mean_load_ratio == pytest.approx(1)
    assert told.next_layer_recall_ratio is None
    assert told.per_layer_next_layer_recall_ratio == ()


def test_reuse_stops_at_requests_and_gaps():
    one = _trace([[[0, 1]], [[0, 2]], [[3, 2]]])
    assert statistics(one).reuse_ratio == pytest.approx(0.5)
    cut = _trace([[[0, 1]], [[0, 2]], [[3, 2]]], lengths=(1, 2))
    assert statistics(cut).reuse_ratio == pytest.approx(0.5)
    split = _trace([[[0, 1]], [[0, 1]], [[3, 2]]], lengths=(1, 2))
    assert statistics(split).reuse_ratio == 0
    gap = _trace([[[0, 1]], [[255, 255]], [[0, 1]], [[0, 4]]])
    assert statistics(gap).reuse_ratio == pytest.approx(0.5)


def test_recall_of_layers_that_determine_each_other():
    generator = np.random.default_rng(0)
    first = generator.permuted(np.tile(np.arange(8), (400, 1)), axis=1)[:, :2]
    noise = generator.permuted(np.tile(np.arange(8), (400, 1)), axis=1)[:, :2]
    trace = _trace(np.stack([first, (first * 3 + 1) % 8, noise], axis=1), lengths=(100,) * 4)
    told = statistics(trace)
    assert told.per_layer_next_layer_recall_ratio[0] == 1
    assert told.per_layer_next_layer_recall_ratio[1] == pytest.approx(0.25, abs=0.06)


def test_too_short_to_tell():
    told = statistics(_trace([[[0, 1], [2, 3]]]))
    assert told.reuse_ratio is None
    assert told.next_layer_recall_ratio is None
    nothing = statistics(_trace([[[255, 255], [2, 3]]] * 2))
    assert nothing.per_layer_gini[0] is None
    assert nothing.gini == pytest.approx(0.75)


def test_recorded_reuse(recorded_trace):
    trace = import_trace(recorded_trace("qwen3-30b-a3b_bigmoe-edge_top6.npz"))
    told = statistics(trace)
    # The recording's own report: the previous token's experts are 38.0 % of a decode step's.
    assert told.reuse_ratio == pytest.approx(0.38, abs=0.03)
    assert told.gini > 0.5
