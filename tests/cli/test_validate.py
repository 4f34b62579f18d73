import json
from pathlib import Path
from types import MappingProxyType

import pytest

from moejax import cli, workloads
from moejax.cards import models_dir
from moejax.cli import _outside
from moejax.cli._outside_hardware import HardwareFigure
from moejax.cli._outside_workloads import gated_figures
from moejax.trace import save_trace

from ._checkpoint import write_checkpoint
from ._tiny import make_trace

FIELDS = ["check", "expected", "ours", "tolerance", "ok", "source"]


@pytest.fixture
def validate(capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["validate", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("validate") / "t.safetensors"
    save_trace(make_trace(), path)
    return path


def test_sound_files_are_told_apart(validate, trace, tmp_path, capsys):
    card = models_dir() / "tiny-moe.toml"
    profile = models_dir() / "hardware" / "h100.toml"
    folder = tmp_path / "run"
    bench = f"bench --trace {trace} --no-measure --quick --strategies on_demand --batch-sizes 1"
    assert cli.main([*bench.split(), "--runs", "1", "--slots", "0", "--out", str(folder)]) == 0
    paths = [trace, card, profile, folder, folder / "results.json"]
    capsys.readouterr()
    code, out, err = validate(*paths, "-o", "json")
    assert (code, err) == (0, "")
    records = json.loads(out)
    kinds = ["trace", "model", "hardware", "run", "run"]
    assert [(record["path"], record["kind"]) for record in records] == [
        (str(path), kind) for path, kind in zip(paths, kinds, strict=True)
    ]
    assert all(record["ok"] and record["problem"] is None for record in records)


@pytest.mark.parametrize(
    ("name", "content", "kind", "problem"),
    [
        ("t.safetensors", b"\x00" * 9, "trace", "does not begin like a safetensors file"),
        ("card.toml", b"[config]\nhidden_size = 1", "model", "lacks 'name'"),
        ("card.toml", b"[constants.vram_bytes]\nvalue = nan", "hardware", "lacks 'unit'"),
        ("card.toml", b"[constants", None, "cannot be read"),
        ("other.toml", b"a = 1", None, "neither [config] nor [constants]"),
        ("config.json", b'{"model_type": "gpt2"}', "model", "gpt2"),
        ("profile.json", b'{"constants": {}}', "hardware", "no [constants.NAME] tables"),
        ("results.json", b'{"schema": "moejax.bench/0"}', "run", "'moejax.bench/0'"),
        ("results.json", b"{", "run", "is not JSON"),
        ("t.npz", b"PK", None, "no ending that tells what it is"),
    ],
)
def test_a_bad_file_is_reported_beside_the_good(
    validate, trace, tmp_path, name, content, kind, problem
):
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = validate(path, trace, "-o", "json")
    assert code == 4
    bad, good = json.loads(out)
    assert (bad["path"], bad["kind"], bad["ok"]) == (str(path), kind, False)
    assert problem in bad["problem"]
    assert good["ok"]
    assert err == f"error: 1 of 2 paths is not sound\n\nhint: {bad['hint']}\n"


def test_a_folder_is_a_run_or_a_checkpoint(validate, tmp_path):
    code, out, err = validate(tmp_path, tmp_path / "none", "-o", "json")
    assert code == 4
    assert "neither results.json nor config.json" in json.loads(out)[0]["problem"]
    assert "does not exist" in json.loads(out)[1]["problem"]
    assert "error: 2 of 2 paths are not sound" in err
    config = {"model_type": "mixtral", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = validate(tmp_path, "-o", "json")
    assert (code, json.loads(out)[0]["kind"]) == (4, "model")


def test_the_weights_of_a_checkpoint_are_checked(validate, tmp_path):
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())

    def check() -> dict:
        return json.loads(validate(tmp_path, "-o", "json")[1])[0]

    sound = check()
    assert sound["ok"]
    assert "shapes and places of 67 tensors in 1 file, not their values" in sound["checked"]
    weights.write_bytes(content[:-4])
    assert not check()["ok"]
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert "embed_tokens.weight has shape [256, 16], not [300, 16]" in check()["problem"]
    weights.unlink()
    bare = check()
    assert bare["ok"]
    assert "there are no *.safetensors" in bare["checked"]
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in check()["problem"]


def test_a_table_says_what_is_wrong(validate, tmp_path):
    code, out, _ = validate(models_dir() / "olmoe-1b-7b.toml", tmp_path / "none.toml")
    assert code == 4
    assert all(word in out for word in ("olmoe-1b-7b", "model", "yes", "no", "not a file"))


def test_our_numbers_agree_with_outside_ones(validate):
    code, out, err = validate("-o", "json")
    assert code == 0, err
    checks = json.loads(out)
    assert all(list(check) == FIELDS for check in checks)
    known = [check for check in checks if check["ok"] is None]
    assert all(check["ok"] is not False and check["source"] for check in checks)
    assert err.startswith(f"all {len(checks) - len(known)} checks hold\n")
    # A miss is known only where its source says why.
    assert [check["check"] for check in known] == [
        "rtx-3090: median error of 4 published decode steps"
    ]
    assert "rented box, decode.csv: few misses" in known[0]["source"]
    assert known[0]["ours"] > known[0]["tolerance"] == 0.15
    by_name = {check["check"]: check for check in checks}
    assert by_name["experts that 2GB hold"]["ours"] == 115
    for strategy, slots, expected in [
        *(("lru", slots, ratio) for slots, ratio in zip(SLOTS, LRU, strict=True)),
        *(("lfu", slots, ratio) for slots, ratio in zip(SLOTS, LFU, strict=True)),
        *(("oracle", slots, ratio) for slots, ratio in zip(SLOTS, BELADY, strict=True)),
    ]:
        check = by_name[f"qwen1.5-moe: {strategy}, hit ratio with {slots} slots a layer"]
        assert check["expected"] == expected
        assert abs(check["ours"] - expected) <= check["tolerance"] == 0.03


@pytest.mark.parametrize(
    "check",
    [
        "olmoe-1b-7b: lru, hit ratio with 16 slots a layer",
        "olmoe-1b-7b: oracle, hit ratio of a pool with 16 slots a layer",
    ],
)
def test_workloads_of_other_models_are_checked_against_published_figures(monkeypatch, check):
    chosen = MappingProxyType({"olmoe-1b-7b": workloads.WORKLOADS["olmoe-1b-7b"]})
    monkeypatch.setattr(workloads, "WORKLOADS", chosen)
    found = {figure.label: figure for figure in gated_figures(seed=1)}
    assert len(found) == 2
    figure = found[check]
    assert figure.tolerance == 0.03
    assert abs(figure.ours - figure.expected) <= 0.03
    assert "2505.16056" in figure.source


SLOTS = (4, 8, 16, 30, 45)
LRU = (0.19, 0.28, 0.43, 0.65, 0.86)
LFU = (0.14, 0.24, 0.40, 0.65, 0.86)
BELADY = (0.39, 0.53, 0.70, 0.86, 0.95)
"""Published curves as arXiv:2505.16056 shows them."""


def test_a_miss_is_a_failure(validate, monkeypatch):
    """The all-miss ceiling of another link than the published one."""
    monkeypatch.setattr(_outside, "_LINK_BYTES_PER_S", 13e9)
    monkeypatch.setattr(_outside, "_check_workload", lambda seed: iter(()))
    monkeypatch.setattr(_outside, "gated_figures", lambda seed: iter(()))
    monkeypatch.setattr(_outside, "hardware_figures", lambda: iter(()))
    code, out, err = validate("-o", "json")
    assert code == 1
    missed = [check for check in json.loads(out) if check["ok"] is False]
    assert [check["check"] for check in missed] == ["all-miss ceiling at 26 GB/s, tokens/s"]
    assert "error: 1 of " in err
    assert "hint: " in err


def test_a_miss_that_nobody_explained_is_a_failure(monkeypatch):
    figure = HardwareFigure("x: median error", 0.2, 0.15, "", "a source")
    monkeypatch.setattr(_outside, "hardware_figures", lambda: iter([figure]))
    (check,) = _outside._check_decode()
    assert check.ok is False
    explained = figure._replace(explained="a reason")
    monkeypatch.setattr(_outside, "hardware_figures", lambda: iter([explained]))
    (check,) = _outside._check_decode()
    assert (check.ok, check.source) == (None, "a source: a reason")


def test_measurements_of_a_card_are_printed_by_source(validate):
    code, out, err = validate("--hardware", "rtx-3090")
    assert code == 0
    for words in ("neurall README, rented box, on rtx-3090", "not predictable: the hit ratio"):
        assert words in out
    assert "misses the target: few misses" in err
    assert "published 28.3 ms + 45.9 ms x miss ratio" in err
    code, out, _ = validate("--hardware", "rtx-3090", "-o", "json")
    found = json.loads(out)
    assert code == 0
    assert len(found["decode"]) == sum(one["num_rows"] for one in found["decode_sources"])
    assert found["rates"]


def test_programs_get_a_record_for_each_measurement(validate):
    code, out, _ = validate("--hardware", "h200", "-o", "jsonl")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {record["kind"] for record in records} == {"rate", "own"}
    for record in records:
        assert record["error_ratio"] == pytest.approx(record["predicted"] / record["measured"] - 1)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--hardware", "rtx-3099"], "unknown hardware 'rtx-3099'"),
        (["--hardware", "reports/h100-engine/this-machine.toml"], "there is no measurement of"),
        (["--hardware", "h100", "a.toml"], "--hardware with paths"),
    ],
)
def test_hardware_that_nobody_measured_is_refused(validate, arguments, cause):
    code, out, err = validate(*arguments)
    assert (code, out) == (2, "")
    assert f"error: {cause}" in err
    assert "hint: " in err


def test_help_names_the_codes(validate):
    code, out, _ = validate("--help")
    assert code == 0
    assert "Example: moejax validate" in out
