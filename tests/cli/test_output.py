import csv
import io
import json

import numpy as np
import pytest

from moejax.cli._output import OutputFormat, emit

RECORDS = [
    {"strategy": "lru", "slots": 30, "hit_ratio": 0.6512, "step_latency_s": 0.0234},
    {"strategy": "oracle", "slots": 30, "hit_ratio": float("nan"), "fetched_bytes": 2_000_000_000},
]


@pytest.fixture
def printed(capsys):
    def show(records, output, **options) -> str:
        emit(records, OutputFormat(output), **options)
        return capsys.readouterr().out

    return show


def test_json_keeps_the_shape_and_full_precision(printed):
    assert json.loads(printed(RECORDS, "json")) == [
        RECORDS[0],
        {**RECORDS[1], "hit_ratio": None},
    ]
    assert json.loads(printed({"third": 1 / 3}, "json")) == {"third": 1 / 3}
    assert json.loads(printed([], "json")) == []
    assert json.loads(printed({"array": np.arange(3)}, "json")) == {"array": [0, 1, 2]}


def test_json_lines_hold_a_record_each(printed):
    lines = printed(RECORDS, "jsonl").splitlines()
    assert [json.loads(line)["strategy"] for line in lines] == ["lru", "oracle"]


def test_csv_has_the_union_of_the_keys(printed):
    text = printed([*RECORDS, {"strategy": 'a "b", c', "per_layer": [1, 2]}], "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0]["step_latency_s"] == "0.0234"
    assert rows[1]["hit_ratio"] == ""
    assert rows[2]["strategy"] == 'a "b", c'
    assert json.loads(rows[2]["per_layer"]) == [1, 2]


def test_a_table_shows_units_and_three_digits(printed):
    lines = printed(RECORDS, "table").splitlines()
    assert lines[1].split("  ")[0].strip() == "strategy"
    assert "step latency" in lines[1]
    assert "65.1 %" in lines[3]
    assert "23.4 ms" in lines[3]
    assert "2.00 GB" in lines[4]
    assert " - " in lines[4]


def test_a_table_in_a_pipe_is_never_cut(printed):
    long = "x" * 500
    assert long in printed([{"name": long, "count": 1}], "table")


def test_markdown_is_a_table_with_numbers_to_the_right(printed):
    lines = printed(RECORDS, "md", columns=["strategy", "hit_ratio"]).splitlines()
    assert lines == [
        "| strategy | hit |",
        "| --- | ---: |",
        "| lru | 65.1 % |",
        "| oracle | - |",
    ]
    assert "a\\|b" in printed([{"name": "a|b"}], "md")


def test_one_record_is_shown_field_by_field(printed):
    record = {
        "model": "tiny",
        "is_quick": True,
        "num_experts": 60,
        "total_params": 14_315_784_192,
        "all_hit_tokens_per_s": 87.96,
        "link_bytes_per_s": 25.4e9,
        "warnings": [],
        "share": 0.125,
    }
    assert printed(record, "md").splitlines()[2:] == [
        "| model | tiny |",
        "| is quick | yes |",
        "| experts | 60 |",
        "| total params | 14,315,784,192 |",
        "| all hit tokens/s | 88 |",
        "| link | 25.4 GB/s |",
        "| warnings | - |",
        "| share | 0.125 |",
    ]


def test_markup_in_data_is_text(printed):
    assert "[bold]x[/bold]" in printed([{"name": "[bold]x[/bold]"}], "table")


def test_no_escape_codes_leave_without_a_terminal(printed):
    assert "\x1b" not in printed(RECORDS, "table", title="A title")
