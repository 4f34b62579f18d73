import json

import pytest

from moejax import cli
from moejax.cards import models_dir


@pytest.fixture
def estimate(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["estimate", *arguments])
        return code, *capsys.readouterr()

    return run


def test_sizes_of_the_default_model(estimate):
    code, out, err = estimate("-o", "json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["model"] == "qwen1.5-moe-a2.7b"
    assert record["expert_bytes"] == 17_301_504
    assert record["routed_bytes"] == 24_914_165_760
    assert record["all_miss_bytes"] == 24 * 4 * 17_301_504
    assert record["cliff_slots"] == 93
    assert 0 < record["all_hit_step_s"] < record["all_miss_step_s"]
    # 1.661 GB a token over 25 to 26 GB/s.
    assert record["link_ceiling_tokens_per_s"] == pytest.approx(15.5, rel=0.03)


def test_a_budget_buys_slots(estimate):
    code, out, _ = estimate("--budget", "2GB", "-o", "json")
    record = json.loads(out)
    assert code == 0
    assert record["num_slots"] == 115
    assert record["slots_per_layer"] == pytest.approx(115 / 24)
    assert record["warnings"] == []


def test_a_pool_below_the_cliff_is_warned_of(estimate):
    code, out, _ = estimate("--budget", "1GB", "-o", "json")
    record = json.loads(out)
    assert code == 0
    assert record["num_slots"] == 57
    assert "cycle of 93" in record["warnings"][0]


def test_dense_weights_share_the_budget(estimate):
    code, out, _ = estimate("--budget", "8GB", "--include-dense", "-o", "json")
    record = json.loads(out)
    assert code == 0
    rest_bytes = 8 * 10**9 - record["smallest_dense_budget_bytes"]
    assert record["num_slots"] == 1 + rest_bytes // record["expert_bytes"]


@pytest.mark.parametrize(
    ("arguments", "smallest"),
    [(("--budget", "17MB"), 17_301_504), (("--budget", "0"), 17_301_504)],
)
def test_too_small_a_budget_names_the_smallest_one(estimate, arguments, smallest):
    code, out, err = estimate(*arguments)
    assert (code, out) == (3, "")
    assert f"at least {smallest}B" in err
    code, _, _ = estimate("--budget", f"{smallest}B")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--budget", "plenty"), 2),
        (("--model", "no-such-model"), 2),
        (("--hardware", "no-such-card"), 2),
        (("--model", "missing/config.json"), 4),
        (("--hardware", "missing.toml"), 4),
        (("--batch-size", "256"), 2),
        (("--context-tokens", "0"), 2),
    ],
)
def test_mistakes_have_their_codes_and_a_cure(estimate, arguments, code):
    found, out, err = estimate(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "\n\nhint: " in err
    assert "Traceback" not in err


def test_the_table_shows_units(estimate):
    code, out, _ = estimate("--budget", "2GB")
    assert code == 0
    assert "17.3 MB" in out
    assert "all miss tokens/s" in out


def test_a_profile_that_says_how_sure_it_is_gives_intervals(estimate):
    profile = models_dir().parent / "reports" / "h100-engine" / "this-machine.toml"
    code, out, _ = estimate("--hardware", str(profile), "--batch-size", "4", "-o", "json")
    record = json.loads(out)
    assert code == 0
    for name in ("all_hit", "all_miss"):
        low_s, high_s = record[f"{name}_interval_s"]
        assert low_s < record[f"{name}_step_s"] < high_s < 1.5 * low_s


def test_another_profile_says_that_it_gives_none(estimate):
    code, out, err = estimate("--hardware", "h200")
    assert code == 0
    assert "all hit interval" in out
    assert "does not say how sure it is" in out
    assert err == ""
