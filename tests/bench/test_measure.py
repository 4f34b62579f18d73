import gc
import math

import pytest

from moejax.bench import measure_machine
from moejax.bench._measure_sample import sample_probes


@pytest.fixture(scope="module")
def measured():
    calls: list[tuple[int, int, str]] = []
    records = measure_machine(quick=True, seed=0, progress=lambda *call: calls.append(call))
    return records, calls


def test_every_sample_is_kept_and_summarised(measured):
    records, _ = measured
    assert set(records) == {"transfer", "compute"}
    for record in records["transfer"] + records["compute"]:
        samples_s = record["samples_s"]
        assert len(samples_s) >= 7
        assert all(math.isfinite(sample_s) and sample_s > 0 for sample_s in samples_s)
        assert record["median_s"] == sorted(samples_s)[len(samples_s) // 2]


def test_transfers_sweep_sizes(measured):
    transfers = [record for record in measured[0]["transfer"] if record["memory"] == "host"]
    assert [record["num_bytes"] for record in transfers] == [2**power for power in range(16, 25)]
    for record in transfers:
        assert record["kind"] == "transfer"
        assert record["direction"] == "h2h"
        bandwidth = record["num_bytes"] / record["median_s"]
        assert record["bandwidth_bytes_per_s"] == pytest.approx(bandwidth)
        # Between a slow disk and the fastest memory there is.
        assert 1e8 < bandwidth < 1e13


def test_compute_sweeps_tokens_and_experts(measured):
    compute = measured[0]["compute"]
    shapes = {(record["num_tokens"], record["num_experts"]) for record in compute}
    assert shapes == {(1, 1), (4, 1), (16, 1), (64, 1), (1, 4), (4, 4), (16, 4)}
    for record in compute:
        num_weights = record["num_experts"] * 3 * 2048 * 1408
        itemsize = {"float32": 4, "bfloat16": 2}[record["dtype"]]
        assert record["kind"] == "compute"
        assert record["num_bytes"] == num_weights * itemsize
        assert record["num_flops"] == 2 * record["num_tokens"] * num_weights
        assert record["compile_s"] >= 0


def test_four_experts_take_longer_than_one(measured):
    fastest_s = {
        record["num_experts"]: min(record["samples_s"])
        for record in measured[0]["compute"]
        if record["num_tokens"] == 16
    }
    assert fastest_s[4] > fastest_s[1]


def test_progress_reaches_the_end_of_both_sweeps(measured):
    _, calls = measured
    ends = [(num_done, label) for num_done, num_all, label in calls if num_done == num_all]
    assert [label for _, label in ends] == ["copies", "experts"]


def test_rounds_visit_every_probe_in_changing_order():
    visits: list[tuple[int, str]] = []
    probes = [lambda index, name=name: visits.append((index, name)) for name in "abcd"]
    samples_s = sample_probes(probes, num_samples=12, seed=0)
    assert [len(samples) for samples in samples_s] == [12] * 4
    orders = {
        tuple(name for index, name in visits if index == round_index) for round_index in range(12)
    }
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(orders) > 1
    assert {index for index, _ in visits if index < 0} == {-2, -1}


def test_garbage_collection_is_off_only_while_sampling():
    states = []
    sample_probes([lambda index: states.append(gc.isenabled())], num_samples=3, seed=0)
    assert states[-3:] == [False] * 3
    assert gc.isenabled()

    def fail(index: int) -> None:
        if index == 1:
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        sample_probes([fail], num_samples=3, seed=0)
    assert gc.isenabled()
