import json
from pathlib import Path

import pytest

from moejax import cli
from moejax.cards import load_hardware, models_dir

TRANSFERS = models_dir() / "hardware" / "measurements" / "transfer.csv"
LATENCY_S, BYTES_PER_S = 8e-6, 20e9


@pytest.fixture
def fit(capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["fit", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def make_run(folder: Path, **changes) -> Path:
    """A run folder whose copies follow the law exactly."""
    sizes = [2**power for power in range(16, 26)]
    transfers = [
        {
            "kind": "transfer",
            "memory": "pinned",
            "direction": "h2d",
            "num_bytes": size,
            "samples_s": [LATENCY_S + size / BYTES_PER_S] * 7,
        }
        for size in sizes
    ]
    results = {
        "environment": {"device": "a test card"},
        "measured": {"transfer": transfers, "compute": []},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_run_becomes_a_profile(fit, tmp_path, is_folder):
    run = make_run(tmp_path / "run")
    out = tmp_path / "new" / "my-card.toml"
    code, printed, err = fit(run if is_folder else run / "results.json", "--out", out, "-o", "json")
    assert code == 0, err
    assert err == f"wrote {out}\n"
    profile = load_hardware(out)
    assert profile.name == "my-card"
    assert "a test card" in profile.title
    assert profile.value("copy_latency_s") == pytest.approx(LATENCY_S, rel=1e-3)
    assert profile.value("pinned_h2d_bytes_per_s") == pytest.approx(BYTES_PER_S, rel=1e-3)
    assert profile.kinds["pinned_h2d_bytes_per_s"] == "fitted"
    assert profile.kinds["matmul_flops"] == "assumed"
    constants = {record["name"]: record for record in json.loads(printed)}
    assert constants["copy_latency_s"]["value"] == profile.value("copy_latency_s")
    assert set(constants) == set(profile.constants)


def test_a_csv_is_fitted_with_its_evidence_told(fit, tmp_path):
    out = tmp_path / "card.toml"
    code, printed, err = fit(TRANSFERS, "--gpu", "RTX 3090", "--out", out)
    assert code == 0, err
    assert "held-out sizes: median error" in err
    assert "outside check, " in err
    assert "pinned_h2d_bytes_per_s" in printed
    assert load_hardware(out).value("pinned_h2d_bytes_per_s") == pytest.approx(25.3e9, rel=0.05)


def test_without_out_the_profile_itself_is_printed(fit, tmp_path):
    code, printed, err = fit(make_run(tmp_path / "run"))
    assert (code, err) == (0, "")
    (tmp_path / "copy.toml").write_text(printed)
    assert load_hardware(tmp_path / "copy.toml").name == "measured"


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": None},
        {"measured": {}},
        {"measured": []},
        {"measured": [{"transfer": []}]},
        {"measured": {"transfer": [], "compute": []}},
        {"measured": {"transfer": {}, "compute": []}},
        {"measured": {"transfer": [3], "compute": []}},
        {"measured": {"transfer": [{"kind": "transfer"}], "compute": []}},
    ],
)
def test_a_run_without_usable_measurements_is_a_bad_file(fit, tmp_path, changes):
    code, out, err = fit(make_run(tmp_path / "run", **changes))
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert "\n\nhint: " in err


@pytest.mark.parametrize(
    ("source", "arguments", "code"),
    [
        ("run", ("--out", "profile.json"), 2),
        ("run", ("--gpu", "RTX 3090"), 2),
        ("run", ("--base", "no-such-card"), 2),
        ("missing.csv", (), 4),
        ("missing", (), 4),
        ("empty", (), 4),
        ("words.csv", (), 4),
        ("list.json", (), 4),
    ],
)
def test_mistakes_have_their_codes_and_a_cure(fit, tmp_path, monkeypatch, source, arguments, code):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.csv").write_text("these,are,words\n1,2,3\n")
    (tmp_path / "list.json").write_text("[1]")
    found, out, err = fit(source, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "\n\nhint: " in err


def _devices_run(path: Path, **links) -> Path:
    known = {
        "all_reduces": [
            {"all_reduce_bytes": size, "all_reduce_s": {"samples": [each_s, each_s, 1.0]}}
            for size, each_s in ((8192, 1e-5), (131072, 2e-5))
        ],
        "alone_bytes_per_s": 5e10,
        "beside_bytes_per_s": 4e10,
    }
    rates = {"1": {"ceilings": {}}, "2": {"links": known | links}}
    path.write_text(json.dumps({"engine": {"cases": [], "rates": rates}}))
    return path


def test_a_run_over_devices_adds_what_joins_them(fit, tmp_path):
    run = _devices_run(tmp_path / "devices.json")
    code, _, err = fit(run)
    assert code == 2
    assert "--base" in err
    out = tmp_path / "two.toml"
    code, _, err = fit(run, "--base", "h200", "--out", out)
    assert code == 0, err
    profile = load_hardware(out)
    assert profile.name == "two"
    rate = (131072 - 8192) / 1e-5
    assert profile.value("all_reduce_bytes_per_s") == pytest.approx(rate)
    assert profile.value("all_reduce_latency_s") == pytest.approx(1e-5 - 8192 / rate)
    assert profile.value("links_beside_ratio") == 0.8
    assert profile.constants["matmul_flops"] == load_hardware("h200").constants["matmul_flops"]


@pytest.mark.parametrize("links", [{"all_reduces": [{}]}, {"alone_bytes_per_s": "fast"}])
def test_a_run_over_devices_without_its_links(fit, tmp_path, links):
    code, _, err = fit(_devices_run(tmp_path / "devices.json", **links), "--base", "h200")
    assert code == 4
    assert "are incomplete" in err
