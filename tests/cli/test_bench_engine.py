import json

import numpy as np
import pytest

from moejax import cli
from moejax.bench import EngineBench
from moejax.trace import Trace, save_trace

from ._checkpoint import CONFIG, write_checkpoint

SMALL = "--num-steps 3 --no-measure"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def trace(folder):
    """Two requests, so that one can be learned from."""
    shape = (60, len(CONFIG.moe_layers), CONFIG.num_experts)
    order = np.argsort(np.random.default_rng(0).random(shape), axis=-1)
    experts = order[..., : CONFIG.num_experts_per_tok].astype(np.uint8)
    path = folder / "t.safetensors"
    save_trace(Trace(experts, CONFIG.num_experts, np.array([0, 30, 60])), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder):
    return write_checkpoint(folder / "model")


def bench(*words: str) -> int:
    return cli.main(["bench", "--engine", *" ".join(words).split()])


def test_a_replay_gives_results_and_a_table(checkpoint, trace, tmp_path, capsys):
    out = tmp_path / "run"
    code = bench(
        f"--model {checkpoint} --replay {trace} --strategies lru --slots 2,4 --no-check",
        f"{SMALL} --out {out} -o json",
    )
    assert code == 0
    printed, told = capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    rows = json.loads(printed)
    assert [row["slots"] for row in rows] == [2, 4]
    for row, record in zip(rows, results["engine"], strict=True):
        assert row["step_s"] == record["step_s"]["median"]
        assert record["replayed"] is True
        assert record["simulator_counts_equal"] is True
        assert record["bit_identical"] is None
        assert len(record["step_s"]["samples"]) == 3
    few, many = (record["misses_per_step"] for record in results["engine"])
    assert few > many
    assert results["schema"] == "moejax.bench-engine/1"
    assert results["trace"]["num_tokens"] == 30
    assert "wrote" in told
    assert "2 cases" in told


def test_an_interrupt_keeps_what_is_measured(trace, checkpoint, tmp_path, monkeypatch, capsys):
    measured = iter(["first"])

    def measure(self, case, **given):
        try:
            return {"strategy": next(measured)}
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(EngineBench, "measure", measure)
    command = f"--model {checkpoint} --replay {trace} --strategies lru --slots 2,4 {SMALL}"
    assert bench(command, f"--out {tmp_path}") == 130
    assert "1 of 2 cases are in" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results.json").read_text())["engine"]) == 1


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        ("--engine --strategies oracle", 2, "oracle needs the future"),
        ("--engine --strategies top_k", 2, "top_k needs a profile"),
        ("--engine --slots 17", 2, "--slots 17 exceeds the 16 experts"),
        ("--engine --slots a", 2, "--slots: 'a' is not a list"),
        ("--engine --batch-sizes 17", 2, "--batch-sizes: 17 is out of range"),
        ("--engine --scopes row", 2, "--scopes: 'row' is not known"),
        ("--engine --trace small-moe", 2, "--trace has no meaning for a real engine"),
        ("--engine --budget 2GB", 2, "--budget has no meaning"),
        ("--engine --replay small-moe", 4, "small-moe has (layers, experts, topk) (24, 60, 4)"),
        ("--engine --replay no-such.safetensors", 4, "no-such.safetensors"),
        ("--engine --random-weights --prompts p.txt", 2, "--prompts says nothing"),
        ("--engine --random-weights --model mixtral-8x7b", 4, "mixtral"),
        ("--replay small-moe", 2, "--replay has no meaning in a simulation"),
        ("--num-steps 3", 2, "--num-steps has no meaning in a simulation"),
        ("--random-weights", 2, "--random-weights has no meaning in a simulation"),
        ("--slots 4,8", 2, "--slots 4,8 is more than one number"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, code, cause, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *words.split()]) == code
    told = capsys.readouterr().err
    assert cause in told
    assert "hint: " in told
    assert list(tmp_path.rglob("results.json")) == []


def test_a_trace_that_is_too_short_is_told(checkpoint, trace, tmp_path, capsys):
    command = f"--model {checkpoint} --replay {trace} --num-steps 40 --no-measure --out {tmp_path}"
    assert bench(command) == 2
    assert "holds 30 steps at batch 1 and a case takes 56" in capsys.readouterr().err
