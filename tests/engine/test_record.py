"""Recording: the trace says what the router did, and an interrupted recording goes on."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.engine import Engine, Sampling, default_lookahead, record
from moejax.errors import UsageError
from moejax.qwen_moe import Lookahead, QwenMoe
from moejax.simulate import ranks, replay
from moejax.strategies import STRATEGIES
from moejax.trace import Trace, batch_trace, load_trace, validate_trace

from ._tiny import CONFIG, ONE_LAYER, plain_forward, random_model

PROMPTS = [[7, 8, 9], [1], list(range(12)), [5, 5, 5, 5, 6]]
LOOKAHEAD = Lookahead(depth=2, width=4)
NONE = 255
SETTINGS = {
    "max_new_tokens": 6,
    "batch_size": 3,
    "sampling": Sampling(0.9, 0.95),
    "seed": 4,
    "lookahead": LOOKAHEAD,
    "model_name": "tiny",
    "source": "a test",
    "licence": "CC0-1.0",
}


@pytest.fixture(scope="module")
def model() -> QwenMoe:
    return random_model()


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model)


@pytest.fixture(scope="module")
def recorded(engine, tmp_path_factory):
    """A recording that nothing went wrong with."""
    path = tmp_path_factory.mktemp("recorded") / "t.safetensors"
    progress = []
    trace = record(engine, PROMPTS, out=path, on_progress=lambda *x: progress.append(x), **SETTINGS)
    return path, trace, progress


def test_the_file_is_the_trace(recorded):
    path, trace, progress = recorded
    loaded = load_trace(path)
    validate_trace(loaded)
    for name in ("experts", "phase", "token_ids", "routing_weights", "lookahead", "request_start"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trace, name))
    assert (loaded.model, loaded.source, loaded.licence) == ("tiny", "a test", "CC0-1.0")
    assert loaded.is_router_order
    assert loaded.num_experts == CONFIG.num_experts
    # As the checkpoint stores them: three matrices in bfloat16.
    assert loaded.expert_bytes.tolist() == [3 * 16 * 8 * 2] * 2
    assert [path.name for path in path.parent.iterdir()] == ["t.safetensors"]
    assert progress == [(done, 4, "") for done in (0, 3, 4)]


def test_requests_are_prompts_and_new_tokens_but_the_last(engine, recorded):
    _, trace, _ = recorded
    assert np.diff(trace.request_start).tolist() == [len(prompt) + 5 for prompt in PROMPTS]
    for request, prompt in enumerate(PROMPTS):
        begin, end = trace.request_start[request : request + 2]
        assert trace.token_ids[begin:end][: len(prompt)].tolist() == prompt
        assert trace.phase[begin:end].tolist() == [0] * len(prompt) + [1] * 5
    how = {"sampling": SETTINGS["sampling"], "seed": 4, "record": True, "lookahead": LOOKAHEAD}
    generation = engine.generate(PROMPTS[:3], max_new_tokens=6, **how).finish()
    for request, text in enumerate(generation.token_ids):
        end = trace.request_start[request + 1]
        assert trace.token_ids[end - 5 : end].tolist() == text[:-1]


def test_routing_is_that_of_a_plain_forward(model, recorded):
    """Also shows that padding leaves no trace: its tokens would shift all others."""
    _, trace, _ = recorded
    tokens, owner = _padded(trace)
    _, routings = plain_forward(model, tokens)
    experts = np.stack([routing.selected_experts for routing in routings], axis=1)[owner]
    weights = np.stack([routing.routing_weights for routing in routings], axis=1)[owner]
    np.testing.assert_array_equal(trace.experts, experts)
    np.testing.assert_allclose(trace.routing_weights, weights, atol=1e-3)
    assert np.unique(trace.experts).tolist() == list(range(CONFIG.num_experts))


def test_lookahead_is_what_the_next_gate_says_of_the_stream(model, recorded):
    _, trace, _ = recorded
    tokens, owner = _padded(trace)
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(PROMPTS), 1))
    # Layers 0 and 2 have experts: of layer 2's gate layer 0 asks, of any other nobody.
    attend = jax.jit(lambda *x: model.layers[0].attend(*x))
    stream, _ = attend(model.embed_tokens(tokens), positions)
    wide = np.asarray(stream, np.float64).reshape(-1, CONFIG.hidden_size)[owner]
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps)
    normed *= np.asarray(model.layers[2].post_attention_layernorm.weight[...])
    logits = normed @ np.asarray(model.layers[2].mlp.gate.weight[...]).T
    expected = np.argsort(-logits, axis=-1)[:, : LOOKAHEAD.width]
    assert trace.lookahead.shape == (trace.num_tokens, 2, 2, 4)
    np.testing.assert_array_equal(trace.lookahead[:, 0, 0], expected)
    assert np.all(trace.lookahead[:, 0, 1] == NONE)
    assert np.all(trace.lookahead[:, 1] == NONE)


def test_texts_do_not_depend_on_the_batch_size(engine, recorded, tmp_path):
    _, trace, _ = recorded
    settings = {**SETTINGS, "batch_size": 1}
    other = record(engine, PROMPTS, out=tmp_path / "t.safetensors", **settings)
    np.testing.assert_array_equal(other.token_ids, trace.token_ids)
    np.testing.assert_array_equal(other.experts, trace.experts)


def test_an_interrupted_recording_goes_on(engine, recorded, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "t.safetensors"
    generate, asked = engine.generate, []

    def fail_in_the_second_batch(prompts, **options):
        asked.append(options["first_request"])
        if len(asked) == 2:
            raise _PowerCutError
        return generate(prompts, **options)

    monkeypatch.setattr(engine, "generate", fail_in_the_second_batch)
    with pytest.raises(_PowerCutError):
        record(engine, PROMPTS, out=path, **SETTINGS)
    assert not path.exists()
    record(engine, PROMPTS, out=path, **SETTINGS)
    assert asked == [0, 3, 3]
    assert path.read_bytes() == recorded[0].read_bytes()
    assert [path.name for path in path.parent.iterdir()] == ["t.safetensors"]


def test_parts_of_another_recording_are_not_mixed_in(engine, recorded, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    folder = tmp_path / "t.safetensors.parts"
    _interrupt_after(engine, monkeypatch, num_batches=1)
    with pytest.raises(_PowerCutError):
        record(engine, PROMPTS, out=path, **SETTINGS)
    for change in ({"seed": 5}, {"batch_size": 2}, {"lookahead": Lookahead(1, 4)}):
        (name,) = change
        with pytest.raises(UsageError) as caught:
            record(engine, PROMPTS, out=path, **{**SETTINGS, **change})
        assert caught.value.cause.endswith(f"other {name}")
        assert str(folder) in caught.value.hint
    with pytest.raises(UsageError, match="other prompts"):
        record(engine, PROMPTS[::-1], out=path, **SETTINGS)
    with pytest.raises(UsageError, match="other weights"):
        record(Engine(random_model(seed=1)), PROMPTS, out=path, **SETTINGS)
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_settings_may_change_before_there_is_a_part(engine, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    _interrupt_after(engine, monkeypatch, num_batches=0)
    for seed in (0, 1):
        with pytest.raises(_PowerCutError):
            record(engine, PROMPTS, out=path, **{**SETTINGS, "seed": seed})


@pytest.mark.parametrize("name", ["thesis.txt", "settings.json", "00000000.safetensors"])
def test_a_foreign_folder_is_left_alone(engine, tmp_path, name):
    folder = tmp_path / "t.safetensors.parts"
    folder.mkdir()
    (folder / name).write_text('"years of work"')
    with pytest.raises(UsageError, match="was not made by a recording") as caught:
        record(engine, PROMPTS, out=tmp_path / "t.safetensors", **SETTINGS)
    assert "another --out" in caught.value.hint
    assert "elete" not in caught.value.hint
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_file_where_the_parts_go_is_left_alone(engine, tmp_path):
    place = tmp_path / "t.safetensors.parts"
    place.write_text("years of work")
    with pytest.raises(UsageError, match="was not made by a recording"):
        record(engine, PROMPTS, out=tmp_path / "t.safetensors", **SETTINGS)
    assert place.read_text() == "years of work"


def test_damaged_and_lost_parts_are_recorded_again(engine, recorded, tmp_path, monkeypatch):
    path, notes = tmp_path / "t.safetensors", []
    folder = tmp_path / "t.safetensors.parts"
    settings = {**SETTINGS, "batch_size": 1, "out": path, "on_note": notes.append}
    with monkeypatch.context() as patch:
        _interrupt_after(engine, patch, num_batches=1)
        with pytest.raises(_PowerCutError):
            record(engine, PROMPTS, **settings)
    torn, lost, _ = sorted(folder.glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-7])
    lost.unlink()
    generate, asked = engine.generate, []

    def listen(prompts, **options):
        asked.append(options["first_request"])
        return generate(prompts, **options)

    monkeypatch.setattr(engine, "generate", listen)
    # What is left is looked at before the first token.
    record(engine, PROMPTS, on_progress=lambda *_: asked.append(len(notes)), **settings)
    assert asked == [2, 0, 2, 1, 2, 2, 3, 2]
    assert [file.name in note for file, note in zip((torn, lost), notes, strict=True)] == [True] * 2
    assert all(note.startswith("recording again: ") for note in notes)
    np.testing.assert_array_equal(load_trace(path).experts, recorded[1].experts)


def test_two_runs_do_not_write_one_trace(engine, recorded, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    lock = tmp_path / "t.safetensors.parts" / "lock"
    _interrupt_after(engine, monkeypatch, num_batches=0)
    with pytest.raises(_PowerCutError):
        record(engine, PROMPTS, out=path, **SETTINGS)
    assert not lock.exists()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.write_text(str(other.pid))
    with pytest.raises(UsageError, match=f"another run, process {other.pid}, is writing"):
        record(engine, PROMPTS, out=path, **SETTINGS)
    assert lock.read_text() == str(other.pid)
    other.communicate(b"\n")
    # That process has ended; nor does our own number, garbage or nothing keep us out.
    for owner in (other.pid, os.getpid(), -1, "", "x", 10**30):
        lock.write_text(str(owner))
        with pytest.raises(_PowerCutError):
            record(engine, PROMPTS, out=path, **SETTINGS)
        assert not lock.exists()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"batch_size": 0}, "a batch of 0"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"max_new_tokens": 60}, "prompt 2 has 12 tokens"),
        ({"seed": -1}, "seed -1"),
        ({"lookahead": Lookahead(1, 100)}, "100 experts"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], [1], [1, 99]]}, "prompt 2 holds token 99"),
    ],
)
def test_nothing_is_written_for_impossible_settings(engine, tmp_path, change, cause):
    with pytest.raises(UsageError, match=cause):
        record(engine, **{"prompts": PROMPTS, "out": tmp_path / "t", **SETTINGS, **change})
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_place_for_a_trace(engine, tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        record(engine, PROMPTS, out=tmp_path, **SETTINGS)


def test_a_request_ends_before_its_stop_token(engine, recorded, tmp_path):
    """Also where other requests go on, so that the token was read after all."""
    _, trace, _ = recorded
    begin = trace.request_start[0] + len(PROMPTS[0])
    stop = int(trace.token_ids[begin + 2])
    settings = {**SETTINGS, "stop_token_ids": [stop]}
    short = record(engine, PROMPTS[:3], out=tmp_path / "t.safetensors", **settings)
    first = np.flatnonzero(trace.token_ids[begin : begin + 5] == stop)[0]
    assert short.request_start[1] == len(PROMPTS[0]) + first
    np.testing.assert_array_equal(
        short.token_ids[: short.request_start[1]], trace.token_ids[: short.request_start[1]]
    )
    assert short.num_tokens > len(PROMPTS[0]) + first + len(PROMPTS[1]) + len(PROMPTS[2])


def test_without_lookahead_and_with_one_new_token(tmp_path):
    engine = Engine(random_model(ONE_LAYER))
    settings = {**SETTINGS, "lookahead": None, "max_new_tokens": 1, "batch_size": 1}
    trace = record(engine, [[4, 5]], out=tmp_path / "t.safetensors", **settings)
    assert trace.lookahead is None
    assert trace.token_ids.tolist() == [4, 5]
    assert trace.phase.tolist() == [0, 0]


def test_a_recording_can_be_replayed(recorded):
    _, trace, _ = recorded
    experts = batch_trace(trace, 2)
    strategy = STRATEGIES["lru"].make(None)
    slots = np.array([0, CONFIG.num_experts])
    counts = ranks(strategy, replay(experts, 6), slots, jax.random.key(0), topk=trace.topk)
    misses = counts.num_demands[:, None] - counts.num_hits
    # Without a slot everything misses; with one for each, every expert misses once.
    assert counts.num_hits[:, 0].tolist() == [0, 0]
    assert misses[:, 1].tolist() == [np.unique(trace.experts[:, layer]).size for layer in (0, 1)]


def test_default_lookahead():
    assert default_lookahead(CONFIG) == Lookahead(1, 4)
    assert default_lookahead(random_model().config, depth=1) == Lookahead(1, 4)


class _PowerCutError(Exception):
    """What happens in the middle of a recording."""


def _padded(trace: Trace) -> tuple[jax.Array, np.ndarray]:
    """Requests as one padded batch, and where in it, flattened, the trace's tokens are."""
    length = np.diff(trace.request_start)
    tokens = np.zeros((length.size, length.max()), np.int32)
    is_token = np.arange(length.max())[None] < length[:, None]
    tokens[is_token] = trace.token_ids
    return jnp.asarray(tokens), np.flatnonzero(is_token)


def _interrupt_after(engine: Engine, monkeypatch, num_batches: int):
    generate = engine.generate

    def interrupt(prompts, **options):
        if options["first_request"] >= num_batches * SETTINGS["batch_size"]:
            raise _PowerCutError
        return generate(prompts, **options)

    monkeypatch.setattr(engine, "generate", interrupt)
