"""Published rates and our own runs beside the shipped profiles."""

import csv
import json

import pytest

from moejax.bench.outside import (
    compare_profile,
    predict_own,
    predict_rates,
    summarise_own,
    summarise_rates,
)
from moejax.cards import HARDWARE, load_hardware, models_dir
from moejax.errors import UsageError

FOLDER = models_dir() / "hardware" / "measurements"


@pytest.mark.parametrize("profile", HARDWARE)
def test_only_rows_that_made_no_constant_are_predicted(profile):
    rows = predict_rates(profile)
    assert rows
    used = set()
    for file in ("transfer.csv", "compute.csv"):
        with (FOLDER / file).open(encoding="utf-8", newline="") as table:
            used |= {
                (row["gpu"], row["source"], row["note"], row.get("tflops") or row.get("gb_per_s"))
                for row in csv.DictReader(table)
                if row["used_for"] != "check"
            }
    for row in rows:
        scale = 1e12 if row.quantity == "compute" else 1e9
        shown = f"{row.published_per_s / scale:.6g}"
        assert (row.gpu, row.source, row.note, shown) not in used


def test_rates_are_those_of_the_cost_model():
    rows = predict_rates("rtx-4090")
    hardware = load_hardware("rtx-4090")
    peak = hardware.value("matmul_flops")
    small = next(row for row in rows if row.size == "1024 x 1024 x 1024")
    assert 0.99 * peak < small.predicted_per_s < peak
    copy = next(row for row in rows if row.quantity == "copies")
    assert copy.predicted_per_s == pytest.approx(hardware.value("pinned_h2d_bytes_per_s"), rel=1e-3)
    summaries = {one["quantity"]: one for one in summarise_rates(rows)}
    assert summaries["compute"]["num_rows"] == sum(row.quantity == "compute" for row in rows)
    assert summaries["compute"]["worst_error_ratio"] == max(
        abs(row.error_ratio) for row in rows if row.quantity == "compute"
    )


def test_copies_of_a_batch_are_taken_one_by_one():
    """32 copies of 64 KiB, of which the table gives all bytes together."""
    rows = [row for row in predict_rates("rtx-3090") if row.size == "65.5 kB"]
    assert len(rows) == 2
    one_s = 5.34767e-6 + 65536 / 25.433e9
    assert all(row.predicted_per_s == pytest.approx(65536 / one_s, rel=1e-4) for row in rows)


def test_an_unknown_profile_is_named():
    with pytest.raises(UsageError, match="rtx-3099"):
        predict_rates("rtx-3099")


def test_own_runs_are_predicted_case_by_case():
    records = predict_own("h200")
    path = models_dir().parent / "reports" / "h200-engine" / "results.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    steps = [record for record in records if record["quantity"] == "step"]
    assert len(steps) == len(run["engine"])
    assert [step["measured"] for step in steps] == [
        pytest.approx(row["step_s"]["median"]) for row in run["engine"]
    ]
    link = next(record for record in records if record["quantity"] == "pinned_h2d_bytes_per_s")
    assert link["predicted"] == load_hardware("h200").value("pinned_h2d_bytes_per_s")
    assert link["measured"] == run["ceilings"]["link_bytes_per_s"]
    groups = summarise_own(records)
    assert sum(group["num_rows"] for group in groups) == len(records)


def test_runs_that_are_not_there_are_left_out(tmp_path):
    assert predict_own("h100", tmp_path) == []
    assert predict_own("rtx-3090") == []


def test_a_profile_is_compared_with_its_own_card_only():
    found = compare_profile("rtx-4090")
    assert not found["decode"]
    assert not found["own"]
    assert {row["profile"] for row in found["rates"]} == {"rtx-4090"}
