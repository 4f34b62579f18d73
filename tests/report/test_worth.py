"""Efficiency scores, money and the study's fronts."""

import dataclasses
from pathlib import Path

import pytest

from moejax.errors import UsageError
from moejax.report import ReportData, load_data, parse_prices, write_report
from moejax.report._money import best_on_card, card_cost_table, memory_cost_table
from moejax.report._summary import speedup
from moejax.report._worth_text import worth_section

from ._factory import results, without_links, write_run
from ._further import full_results


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ReportData:
    return load_data(write_run(tmp_path_factory.mktemp("full"), full_results()))


def cells_of(table: str, first: str) -> list[str]:
    lines = without_links(table).splitlines()
    line = next(line for line in lines if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_prices_are_read():
    assert parse_prices(["h100=25000", "a=1.5, b=2"]) == {"h100": 25000.0, "a": 1.5, "b": 2.0}


@pytest.mark.parametrize("text", ["h100", "h100=free", "=3", "h100=0", "h100=inf", "a=1,a=2"])
def test_what_is_no_price_is_refused(text: str):
    with pytest.raises(UsageError) as caught:
        parse_prices([text])
    assert "--price NAME=USD" in caught.value.hint


def test_memory_is_valued_by_the_byte(data):
    row = cells_of(memory_cost_table(data), "`lru`")
    cell = data.summary.cell("lru", 1, "batched")
    gain = speedup(data.summary, "lru", "on_demand", 1, "batched")
    assert cell is not None
    assert gain is not None
    cost_usd = 1200 / 24e9 * cell.memory_bytes.mean
    assert row[2] == f"{cost_usd:.0f} USD"
    assert row[4] == f"{cost_usd / gain.mean:.0f} USD"
    assert row[5] == f"{1e3 * gain.mean / cost_usd:.2f}\N{MULTIPLICATION SIGN}"
    assert "the card at 1,200 USD (datasheet: a list of 2022)" in memory_cost_table(data)


def test_a_users_price_comes_before_the_profiles(data):
    mine = dataclasses.replace(data, prices_usd={"rtx-3090": 600.0, "large": 9000.0})
    assert "the card at 600 USD (as given with --price)" in memory_cost_table(mine)
    row = cells_of(card_cost_table(mine), "`large`")
    best = best_on_card(mine, "large", 1)
    assert best is not None
    assert best.strategy == "intelligent"
    rate = 1 / best.mean("latency_s")
    assert row[1] == "9,000 USD"
    assert row[4] == f"{9000 / rate:.0f} USD"
    assert row[-1] == "--price"


def test_no_price_is_invented(data):
    table = card_cost_table(data)
    assert "No source at hand gives a price of `small`, `large`" in table
    assert "| `large` |" not in table
    assert "--price small=USD" in table


def test_a_card_too_small_costs_nothing_a_token(data):
    mine = dataclasses.replace(data, prices_usd={"small": 100.0})
    assert cells_of(card_cost_table(mine), "`small`")[5] == "does not fit"


def test_a_price_of_a_card_that_is_not_in_the_run_is_refused(tmp_path: Path):
    write_run(tmp_path, results(strategies=("lru",), batch_sizes=(1,), num_runs=1))
    with pytest.raises(UsageError) as caught:
        write_report(tmp_path, prices_usd={"h100": 1.0})
    assert "no card 'h100'" in caught.value.cause
    assert not (tmp_path / "report.md").exists()


def test_scores_are_shares_of_the_oracles(data):
    text = "\n\n".join(worth_section(data))
    oracle = data.summary.cell("oracle", 1, "batched")
    own = data.summary.cell("intelligent", 1, "batched")
    assert oracle is not None
    assert own is not None
    row = cells_of(text, "`intelligent`")
    assert row[1] == f"{100 * oracle.latency_s.mean / own.latency_s.mean:.1f} %"
    assert row[2] == f"{100 * own.hit_ratio.mean / oracle.hit_ratio.mean:.1f} %"
    assert (row[3], row[5]) == ("87.8 %", "93.3 %")


def test_fronts_set_claims_beside_what_they_exclude(data):
    text = "\n\n".join(worth_section(data))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| speed, memory")]
    by_name = {row[1].strip("`"): [cell.strip(" |") for cell in row[2:]] for row in rows}
    # The study puts intelligent on the front though its own oracle beats it in both.
    assert by_name["intelligent"][:2] == ["yes", "beaten by `oracle`"]
    assert by_name["oracle"] == ["yes", "on it", "on it"]
    assert by_name["lru"][0] == "\N{EN DASH}"


def test_without_oracle_and_price_the_section_says_what_to_give(tmp_path: Path):
    plain = load_data(write_run(tmp_path, results(strategies=("lru", "top_k"), num_runs=2)))
    text = "\n\n".join(worth_section(plain))
    assert "### Efficiency scores" not in text
    assert "### The study's three fronts" in text
    assert "nan" not in text
