"""The report on the small models is what its committed inputs say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.cards import models_dir
from moejax.errors import BadFileError
from moejax.results import read_json
from moejax.trace import TRACES, Trace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import report_small_models
import small_models_page
import small_models_routing

FOLDER = models_dir().parent / "reports" / "small-models"


@pytest.fixture(scope="module")
def results() -> dict:
    return read_json(FOLDER / "results.json")


def test_the_page_is_that_of_its_results(results):
    assert small_models_page.page(results) == (FOLDER / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", report_small_models.MODELS)
def test_results_are_those_of_the_logs(results, name):
    assert report_small_models.read_log(FOLDER / name / "log.jsonl") == results["training"][name]
    recorded = report_small_models.read_recording(FOLDER / name / "statistics.json")
    assert recorded == results["recording"][name]


def test_the_recordings_are_the_traces_that_come_along(results):
    assert set(results["routing"]) == set(TRACES)
    for name in TRACES:
        header = (models_dir() / "traces" / f"{name}.safetensors").read_bytes()[:4096]
        assert results["recording"][name]["trace"]["sha256"].encode() in header


def test_folders_are_dropped_from_commands_only():
    record = {"environment": {"argv": ["a.py", "--out", "x/y/", "/z"], "seed": 0}, "text": "a/b"}
    expected = {"environment": {"argv": ["a.py", "--out", "y", "z"], "seed": 0}, "text": "a/b"}
    assert report_small_models.drop_folders(record) == expected
    assert report_small_models.drop_folders({"text": "a/b"}) == {"text": "a/b"}


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "{",
        json.dumps({"kind": "end", "is_complete": True}),
        "\n".join(json.dumps({"kind": kind}) for kind in ("start", "train", "heldout", "end")),
    ],
)
def test_a_log_that_does_not_end_is_refused(tmp_path, lines):
    (tmp_path / "log.jsonl").write_text(lines)
    with pytest.raises(BadFileError):
        report_small_models.read_log(tmp_path / "log.jsonl")


def test_hits_are_counted_by_hand():
    # One layer; experts 0 1 0 2 0: with one slot the first touch alone is forgiven.
    text = np.array([0, 1, 0, 2, 0]).reshape(1, 5, 1, 1)
    lru = small_models_routing.hit_ratio_warm([text], 4, None)
    np.testing.assert_allclose(lru, [0, 1 / 5, 4 / 5, 5 / 5, 5 / 5])
    oracle = small_models_routing.hit_ratio_warm([text], 4, [1, 2])
    np.testing.assert_allclose(oracle, [3 / 5, 4 / 5])


def test_domains_in_order_do_not_hide_what_pairs_tell():
    # Layer 1 repeats layer 0, and the two halves of the texts share no expert.
    first = np.concatenate([np.tile([0, 1], 20), np.tile([2, 3], 20)])
    experts = np.stack([first, first], axis=1)[..., None].astype(np.uint8)
    trace = Trace(experts=experts, num_experts=4, request_start=np.arange(0, 81, 10))
    found = small_models_routing.describe(trace)
    assert found["next_layer_recall_ratio"] == 1
    assert found["in_order_next_layer_recall_ratio"] < 0.6


def test_labels_are_counted_where_they_stand():
    labels = np.array(["b", "b", "a", "c", "c"])
    assert list(small_models_routing.count_in_order(labels).items()) == [
        ("b", 2),
        ("a", 1),
        ("c", 2),
    ]
