"""The report on the simulator is what its results.json says."""

import copy
import statistics
import sys
from pathlib import Path

import pytest

from moejax.results import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import report_simulator


@pytest.fixture(scope="module")
def results():
    return read_json(report_simulator.FOLDER / "results.json")


def test_the_committed_page_is_that_of_the_committed_results(results):
    page = (report_simulator.FOLDER / "report.md").read_text(encoding="utf-8")
    assert page == report_simulator.page(results)


def test_a_figure_that_misses_its_bar_is_called_missed(results):
    slower = copy.deepcopy(results)
    slower["cpu"]["records"][0]["sweeps"][0]["ours_s"] = 1.01
    slower["cpu"]["records"][1]["cells_equal"] -= 1
    slower["gpu"]["fill"]["request_capacities_per_s"] = 19e9
    slower["experiment"]["warm"]["experiment_s"]["median"] = 15.1
    before, after = report_simulator.goals(results), report_simulator.goals(slower)
    changed = [new[0] for old, new in zip(before, after, strict=True) if old[3] != new[3]]
    assert changed == [
        "five strategies x 8 capacities",
        "cells equal to libcachesim or plain numpy",
        "request-capacities a second on one GPU",
        "250-point experiment on the timeline, warm",
    ]


def test_the_experiment_is_the_whole_one_and_its_records_are_equal(results):
    experiment = results["experiment"]
    assert experiment["num_points"] == 250
    assert experiment["records_equal"]
    assert len(experiment["warm_samples"]) >= 5
    assert "+dirty" not in experiment["environment"]["commit"]
    times = [one["experiment_s"] for one in experiment["warm_samples"]]
    assert experiment["warm"]["experiment_s"] == {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
    }
