import json

import jax

import moejax
from moejax import cli


def test_env_lists_what_there_is(capsys):
    assert cli.main(["env", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == ""
    assert record["backend"] == jax.default_backend()
    assert record["versions"]["moejax"] == moejax.__version__
    assert {"qwen1.5-moe-a2.7b", "gpt-oss-20b", "tiny-moe"} <= set(record["models"])
    assert {"rtx-3090", "h100"} <= set(record["hardware"])
    assert "qwen1.5-moe" in record["workloads"]
    assert record["traces"] == ["small-moe", "tiny-moe"]
    assert record["strategies"][:5] == ["on_demand", "oracle", "multi_look", "top_k", "intelligent"]


def test_env_reads_well_as_a_table(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "rtx-3090" in out
    assert f"moejax {moejax.__version__}" in out
