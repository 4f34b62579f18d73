import json
from pathlib import Path

import numpy as np
import pytest

from moejax import cli
from moejax.trace import TRACES, load_trace, trace_note

NUM_TOKENS, NUM_LAYERS, TOPK, NUM_EXPERTS = 40, 3, 2, 8


@pytest.fixture
def trace(capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["trace", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    ids = np.argsort(random.random((NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS)), axis=-1)[..., :TOPK]
    path = tmp_path / "recording.npz"
    np.savez(path, expert_ids=ids.astype(np.int16), offsets=np.array([0, 15, NUM_TOKENS]))
    return path


def test_a_recording_becomes_a_trace_beside_it(trace, recording):
    code, out, _ = trace(
        "import", recording, "--num-experts", NUM_EXPERTS, "--licence", "MIT",
        "--source", "a test", "-o", "json",
    )  # fmt: skip
    assert code == 0
    record = json.loads(out)
    imported = load_trace(recording.with_suffix(".safetensors"))
    assert record["file"] == str(recording.with_suffix(".safetensors"))
    assert (record["num_tokens"], record["num_layers"], record["topk"]) == imported.experts.shape
    assert (record["num_requests"], record["num_experts"]) == (2, NUM_EXPERTS)
    assert (record["licence"], record["source"]) == ("MIT", "a test")
    assert record["sha256"] == imported.sha256
    assert np.array_equal(imported.experts, np.load(recording)["expert_ids"])


def test_a_guess_is_told_on_stderr(trace, recording, tmp_path):
    code, out, err = trace("import", recording, "--out", tmp_path / "t.safetensors", "-o", "json")
    assert code == 0
    assert "warning: the number of experts was not stated" in err
    assert json.loads(out)["num_experts"] == NUM_EXPERTS


def test_a_model_tells_the_number_of_experts(trace, recording):
    code, out, err = trace("import", recording, "--model", "mixtral-8x7b", "-o", "json")
    assert (code, err) == (0, "")
    assert (json.loads(out)["model"], json.loads(out)["num_experts"]) == ("mixtral-8x7b", 8)


def test_info_adds_the_statistics(trace, recording, tmp_path):
    path = tmp_path / "t.safetensors"
    assert trace("import", recording, "--num-experts", NUM_EXPERTS, "--out", path)[0] == 0
    code, out, err = trace("info", path, "-o", "json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["num_tokens"] == NUM_TOKENS
    assert record["reuse_chance_ratio"] == pytest.approx(TOPK / NUM_EXPERTS)
    for key in ("reuse_ratio", "gini", "next_layer_recall_ratio"):
        assert 0 <= record[key] <= 1
    code, out, _ = trace("info", path)
    assert code == 0
    assert "next layer recall" in out
    assert "per layer" not in out


@pytest.mark.parametrize("name", TRACES)
def test_info_says_what_a_shipped_trace_is(trace, name):
    code, out, err = trace("info", name, "-o", "json")
    assert (code, err) == (0, f"note: {trace_note(name)}\n")
    record = json.loads(out)
    assert (record["file"], record["model"], record["note"]) == (name, name, trace_note(name))


def test_a_note_does_not_widen_the_table(trace):
    code, out, err = trace("info", "tiny-moe")
    assert (code, err) == (0, f"note: {trace_note('tiny-moe')}\n")
    assert "note" not in out
    assert max(map(len, out.splitlines())) < 150


def test_info_takes_a_name_behind_a_dot_for_a_file(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = trace("info", "./tiny-moe")
    assert code == 4
    assert err.startswith("error: tiny-moe")
    code, _, err = trace("info", "tiny-mo")
    assert code == 4
    assert "Those are small-moe and tiny-moe" in err


@pytest.mark.parametrize(
    ("command", "field", "expected"),
    [
        # With room for one token's experts, hits are what the next token uses again.
        ("simulate --strategy lru --slots 2", "hit_ratio", pytest.approx(0.304, abs=5e-4)),
        ("tune-cache --budget 1GB", "trace", "tiny-moe"),
        (
            "bench --no-measure --quick --strategies on_demand --batch-sizes 1 --runs 1",
            "fetched_bytes",
            8 * 2 * 49_152,
        ),
    ],
)
def test_commands_know_shipped_traces_by_name(capsys, tmp_path, command, field, expected):
    out = ["--out", str(tmp_path / "run")] if command.startswith("bench") else []
    assert cli.main([*command.split(), "--trace", "tiny-moe", *out, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    record = found[0] if isinstance(found, list) else found
    assert record[field] == expected


def test_a_workload_is_drawn_by_its_seed(trace, tmp_path):
    traces = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        path = tmp_path / f"{name}.safetensors"
        code, out, _ = trace(
            "make", "--workload", "uniform", "--requests", 2, "--tokens", 10,
            "--seed", seed, "--out", path, "-o", "json",
        )  # fmt: skip
        assert code == 0
        assert json.loads(out)["workload"] == "uniform"
        assert json.loads(out)["num_tokens"] == 20
        traces.append(load_trace(path).experts)
    assert np.array_equal(traces[0], traces[1])
    assert not np.array_equal(traces[0], traces[2])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("import", "missing.npz"), 4),
        (("import", "cut.npz"), 4),
        (("import", "recording.npz", "--out", "trace.npz"), 2),
        (("import", "recording.npz", "--num-experts", "0"), 2),
        (("import", "recording.npz", "--num-experts", "4"), 4),
        (("import", "recording.npz", "--model", "no-such-model"), 2),
        (("import", "recording.npz", "--out", "recording.npz/t.safetensors"), 2),
        (("info", "missing.safetensors"), 4),
        (("info", "cut.npz"), 4),
        (("info", "."), 4),
        (("make", "--out", "t.safetensors", "--workload", "no-such"), 2),
        (("make", "--out", "t.safetensors", "--requests", "0"), 2),
        (("make", "--out", "t.safetensors", "--tokens", "-1"), 2),
        (("make", "--out", "t.npz"), 2),
    ],
)
def test_mistakes_have_their_codes_and_a_cure(
    trace, recording, tmp_path, monkeypatch, arguments, code
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.npz").write_bytes(recording.read_bytes()[:100])
    found, out, err = trace(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
