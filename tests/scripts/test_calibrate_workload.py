"""The report on the workloads is what its results.json says, and that is what the cards say."""

import sys
from pathlib import Path

import pytest

from moejax.results import read_json, to_plain
from moejax.workloads import WORKLOADS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import _workload_rankings as rankings
import calibrate_workload
import report_workloads


@pytest.fixture(scope="module")
def results():
    return read_json(report_workloads.FOLDER / "results.json")


def test_the_committed_page_is_that_of_the_committed_results(results):
    page = (report_workloads.FOLDER / "report.md").read_text(encoding="utf-8")
    assert page == report_workloads.page(results)


def test_figures_can_be_drawn(results):
    for draw in (report_workloads.curves, report_workloads.models):
        assert draw(results).axes


def test_the_cards_are_those_of_the_report(results):
    targeted = {name: workload for name, workload in WORKLOADS.items() if workload.targets}
    assert set(results["workloads"]) == set(targeted)
    for name, workload in targeted.items():
        record = results["workloads"][name]
        assert record["parameters"] == dict(workload.parameters)
        assert record["targets"] == to_plain(workload.targets)


def test_every_gated_figure_is_met(results):
    num_gated = 0
    for record in results["workloads"].values():
        for path, limit in record["tolerances"].items():
            if limit is not None:
                num_gated += 1
                assert abs(record["deviations"][path]) <= limit, path
    # Five sizes of three policies, two each of eight workloads, and five batch sizes.
    assert num_gated == 15 + 2 * 8 + 5


def test_rankings_agree_with_the_recordings_beside_them(results):
    """What the report says, whether the recordings are here or not."""
    found = {record["workload"]: record for record in results["rankings"]}
    assert set(found) == set(rankings.PAIRS)
    for name, record in found.items():
        assert record["parameters"] == dict(WORKLOADS[name].parameters)
        assert record["mean_tau"] == pytest.approx(sum(record["tau"]) / len(record["tau"]))
        assert record["mean_tau"] >= 0.6
        assert max(record["loss_ratio"]) <= 0.01
        assert record["is_same_ranking"]
        assert record["is_same_winner"]


@pytest.mark.slow
@pytest.mark.parametrize("name", rankings.PAIRS)
def test_rankings_are_found_again(results, recorded_trace, name):
    folder = recorded_trace(rankings.PAIRS[name].file).parent
    again = to_plain(rankings.rank_pair(folder, WORKLOADS[name]))
    kept = next(record for record in results["rankings"] if record["workload"] == name)
    assert again["slots"] == kept["slots"]
    assert again["mean_tau"] == pytest.approx(kept["mean_tau"], abs=0.15)
    assert again["mean_tau"] >= 0.6
    assert again["is_same_winner"]
    for side in ("workload_hit_ratio", "recorded_hit_ratio"):
        for row, before in zip(again[side], kept[side], strict=True):
            assert row == pytest.approx(before, abs=0.01)


def test_kept_rankings_of_another_card_are_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"rankings": [{"workload": "olmoe-1b-7b", "parameters": {"popularity": 1}}]}')
    with pytest.raises(calibrate_workload.UsageError, match="other parameters"):
        calibrate_workload._kept_rankings(path, [WORKLOADS["olmoe-1b-7b"]])


def test_a_card_without_targets_cannot_be_refitted(capsys):
    assert calibrate_workload.main(["--model", "uniform", "--check"]) == 2
    assert "no targets" in capsys.readouterr().err
