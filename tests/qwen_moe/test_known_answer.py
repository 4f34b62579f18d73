"""The script that compares a checkpoint with published logits: agrees, differs, does not know."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cards import load_model
from moejax.qwen_moe import params, read_config

from ._parity import load_script, read_golden
from ._reference_models import (
    CONFIGS,
    GOLDEN,
    make_weights,
    write_checkpoint,
    write_reference_model,
)

NUM_TOKENS = 8

Store = Callable[[np.ndarray], None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with its answers in a folder of the test's own."""
    module = load_script("check_known_answer")
    monkeypatch.setattr(module, "ANSWERS", tmp_path / "answers")
    return module


@pytest.fixture
def store(script: ModuleType) -> Store:
    """Stores logits [tokens, vocab] as the known answer of the model `gqa`."""

    def write(logits: np.ndarray) -> None:
        answer = {
            "schema": script.SCHEMA,
            "model": "gqa",
            "source": "a test",
            "sizes": script.sizes_of(read_config(CONFIGS["gqa"], "config.json")),
            "token_ids": read_golden("gqa")[0]["token_ids"][0, :NUM_TOKENS].tolist(),
            "mean_logits": logits.mean(-1).tolist(),
            "first_logits": logits[0, :30].tolist(),
            "tolerance": 1e-5,
        }
        script.ANSWERS.mkdir()
        (script.ANSWERS / "gqa.json").write_text(json.dumps(answer), encoding="utf-8")

    return write


def test_reference_logits_agree(script, store: Store, tmp_path: Path, capsys):
    store(read_golden("gqa")[0]["logits"][0, :NUM_TOKENS])
    folder = write_reference_model(tmp_path / "gqa", "gqa", "hub")
    assert script.main(["--model", str(folder), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agrees"] is True
    assert len(told["rows"]) == NUM_TOKENS + 30
    assert script.main(["--model", str(folder)]) == 0
    assert "38 of 38 numbers agree" in capsys.readouterr().out


def test_sums_are_float32_for_bfloat16_weights(script, store: Store, tmp_path: Path):
    """Rounded weights give the same logits however they are stored."""
    rounded = {name: w.astype(jnp.bfloat16) for name, w in make_weights("gqa").items()}
    config = CONFIGS["gqa"] | {"dtype": "bfloat16"}
    folder = write_checkpoint(tmp_path / "rounded", config, rounded)
    token_ids = read_golden("gqa")[0]["token_ids"][0, :NUM_TOKENS]
    store(script.read_prompt(params.load(folder, dtype="float32"), token_ids))
    assert params.load(folder).norm.weight.dtype == jnp.bfloat16
    assert script.main(["--model", str(folder)]) == 0


def test_other_weights_differ(script, store: Store, tmp_path: Path, capsys):
    store(read_golden("gqa")[0]["logits"][0, :NUM_TOKENS])
    weights = make_weights("gqa")
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(0.001)
    folder = write_checkpoint(tmp_path / "other", CONFIGS["gqa"], weights)
    assert script.main(["--model", str(folder)]) == 1
    told = capsys.readouterr()
    assert "DIFFERS" in told.out
    assert told.err.splitlines()[-3].startswith("error: ")


def test_unknown_model_is_refused(script, store: Store, tmp_path: Path, capsys):
    store(read_golden("gqa")[0]["logits"][0, :NUM_TOKENS])
    folder = write_reference_model(tmp_path / "mha", "mha", "hub")
    assert script.main(["--model", str(folder)]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert "error: no known answer for a model of 3 layers" in told.err
    assert "hint: Known: gqa." in told.err


def test_published_answer_is_stored_as_published():
    path = GOLDEN / "qwen1.5-moe-a2.7b.json"
    answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert answer["token_ids"] == [1, 306, 4658, 278, 6593, 310, 2834, 338]
    published = [-4.2125, -3.6416, -4.9136, -4.3005, -4.9938, -3.4393, -3.5195, -4.1621]
    assert answer["mean_logits"] == published
    assert len(answer["first_logits"]) == 30
    assert answer["tolerance"] == 0.01
    spec = load_model("qwen1.5-moe-a2.7b")
    assert answer["model"] == spec.hub_id
    assert answer["sizes"]["num_experts"] == spec.num_experts
    assert answer["sizes"]["num_hidden_layers"] == spec.num_layers
    assert answer["sizes"]["hidden_size"] == spec.hidden_size
