import copy
import math
from pathlib import Path
from typing import Any

import pytest

from moejax.errors import UsageError
from moejax.report import Comparison, compare, read_run
from moejax.report._compare import A_FASTER, B_FASTER, TIE, UNKNOWN

from ._factory import results, write_run


def run_of(**options) -> dict[str, Any]:
    return results(strategies=("on_demand", "lru"), batch_sizes=(1, 2), **options)


def sped_up(content: dict[str, Any], factor: float) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    for row in changed["grid"]:
        row["latency_s"] = {name: value / factor for name, value in row["latency_s"].items()}
    return changed


def comparison(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    return compare(read_run(write_run(folder / "a", a)), read_run(write_run(folder / "b", b)))


def test_the_same_run_ties_with_itself(tmp_path: Path):
    content = run_of()
    found = comparison(tmp_path, content, content)
    assert found.is_paired
    assert found.differences == ()
    assert len(found.rows) == 4
    assert {row.verdict for row in found.rows} == {TIE}
    assert all(row.b_over_a[2:] == (1.0, 1.0) for row in found.rows)


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, B_FASTER), (0.95, A_FASTER)])
def test_pairs_tell_what_the_spread_of_draws_would_hide(tmp_path, factor, verdict):
    content = run_of()
    for row in content["grid"]:
        # Draws differ far more than the runs do.
        scale = 1 + 0.2 * row["run"]
        row["latency_s"] = {name: scale * value for name, value in row["latency_s"].items()}
    changed = sped_up(content, factor)
    found = comparison(tmp_path / "paired", content, changed)
    assert {row.verdict for row in found.rows} == {verdict}
    assert found.rows[0].b_over_a.mean == pytest.approx(1 / factor)
    changed["settings"]["seed"] = 1
    apart = comparison(tmp_path / "apart", content, changed)
    assert not apart.is_paired
    assert {row.verdict for row in apart.rows} == {TIE}
    assert apart.rows[0].b_over_a.mean == pytest.approx(1 / factor)
    assert math.isnan(apart.rows[0].b_over_a.std)


def test_it_says_what_differs_and_only_that(tmp_path: Path):
    a, b = run_of(), run_of()
    b["settings"]["slots"] = 16
    b["hardware"]["constants"]["matmul_flops"]["value"] = 1e12
    b["environment"] |= {"commit": "other", "date": "2026-01-01T00:00:00+00:00", "argv": ["x"]}
    del b["trace"]["licence"]
    found = {one.field: one[1:] for one in comparison(tmp_path, a, b).differences}
    assert found == {
        "settings/slots": (30, 16),
        "hardware/constants/matmul_flops/value": (75.5e12, 1e12),
        "environment/commit": ("0123abc", "other"),
        "trace/licence": ("Apache-2.0", None),
    }


def test_what_only_one_has_is_counted(tmp_path: Path):
    found = comparison(
        tmp_path, run_of(num_runs=2), results(strategies=("lru",), batch_sizes=(2, 4), num_runs=2)
    )
    assert [(row.key.strategy, row.key.batch_size) for row in found.rows] == [("lru", 2)]
    assert (found.num_only_a, found.num_only_b) == (3, 1)


def test_one_draw_settles_nothing(tmp_path: Path):
    content = run_of(num_runs=1)
    found = comparison(tmp_path, content, sped_up(content, 2.0))
    assert {row.verdict for row in found.rows} == {UNKNOWN}


def test_runs_that_cannot_be_compared(tmp_path: Path):
    with pytest.raises(UsageError, match=r"tiny-moe") as caught:
        comparison(tmp_path / "models", run_of(), run_of(model="tiny-moe"))
    assert caught.value.hint
    lfu = results(strategies=("lfu",), batch_sizes=(1,), num_runs=2)
    with pytest.raises(UsageError, match="nothing in common: one has on_demand, lru at batch 1, 2"):
        comparison(tmp_path / "points", run_of(), lfu)
