"""Traces that come with moejax: they are what their cards say."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from moejax.cards import load_model, models_dir
from moejax.errors import BadFileError
from moejax.trace import TRACES, find_trace, load_trace, trace_note, validate_trace

FOLDER = models_dir() / "traces"
MOST_BYTES = 9_000_000


def test_the_names_are_those_of_the_cards_and_the_files():
    assert TRACES == ("small-moe", "tiny-moe")
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(TRACES)


def test_they_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_of_the_model_that_its_card_names(name):
    trace = load_trace(name)
    validate_trace(trace)
    card = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    assert (card["name"], card["model"], card["source"] != "") == (name, trace.model, True)
    model = load_model(trace.model)
    shape = (trace.num_layers, trace.num_experts, trace.topk)
    assert shape == (model.num_layers, model.num_experts, model.num_experts_per_tok)
    # Sizes are the card's: then --model puts another model of this shape in its place.
    assert trace.expert_bytes is None
    assert trace.licence == "Apache-2.0"


@pytest.mark.parametrize(("name", "num_texts"), [("small-moe", 90), ("tiny-moe", 50)])
def test_a_trace_is_what_its_note_says(name, num_texts):
    note = trace_note(name)
    assert note.startswith("Learned routing of our own small model")
    assert "\n" not in note
    trace = load_trace(name)
    shape = f"{trace.num_layers} layers, {trace.num_experts} experts, top-{trace.topk}"
    assert shape in note
    assert f"{num_texts} texts" in note
    assert trace.num_requests == num_texts
    assert trace.phase is not None
    assert (trace.phase == 1).all()
    assert trace.lookahead is not None
    assert trace.lookahead.shape[2] == 3
    # The gates were asked for more experts than a token uses, and the nearest layer's know most.
    assert trace.lookahead.shape[3] > trace.topk
    named = trace.lookahead[:, :-1, 0, :]
    is_named = (trace.experts[:, 1:, :, None] == named[:, :, None, :]).any(-1)
    assert np.mean(is_named) > 0.75


def test_a_name_behind_a_dot_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_trace("small-moe") == FOLDER / "small-moe.safetensors"
    assert find_trace("./small-moe") == Path("small-moe")
    assert trace_note("./small-moe") == trace_note("mine.safetensors") == ""
    with pytest.raises(BadFileError):
        load_trace("./small-moe")


def test_a_wrong_name_is_told_the_right_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFileError) as caught:
        load_trace("smal-moe")
    assert "'smal-moe' is neither a file nor a trace" in str(caught.value)
    assert all(name in caught.value.hint for name in TRACES)
    (tmp_path / "mine").touch()
    assert find_trace("mine") == Path("mine")
