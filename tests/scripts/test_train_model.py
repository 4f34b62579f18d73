"""Training of the small models, in miniature: its experts, its loss, its resuming."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import BadFileError, UsageError
from moejax.qwen_moe import QwenMoeConfig, experts
from moejax.qwen_moe.params import load
from moejax.qwen_moe.tokenizer import open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_model
import training_data
import training_experts
import training_run
import training_step

CONFIG = QwenMoeConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
    norm_topk_prob=False,
    initializer_range=0.2,
    eos_token_ids=(0,),
)
RECIPE = train_model.Recipe(
    is_bytes=False,
    batch_size=4,
    sequence_length=16,
    learning_rate=0.02,
    warmup_steps=2,
    capacity_ratio=1.5,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def corpus():
    # A text that can be learned: it counts up, from anywhere.
    text = ((np.arange(3000) + np.arange(3000) // 700) % 32).astype(np.uint16)
    return training_data.Corpus(text, {"a": text[:100], "b": text[200:277]}, np.full(32, 2))


@pytest.fixture(scope="module", autouse=True)
def fast_compiles():
    """Random numbers of the kind that compiles fastest, and programs that run only a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_prng_impl("unsafe_rbg"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def weights():
    # As a training begins: the same program.
    return training_run.open_state(Path("no-state"), CONFIG, 0, "", False)[0].weights


def draw_pairs(num_tokens, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (num_tokens, 16), dtype)
    weights, selected = jax.lax.top_k(jax.random.uniform(keys[1], (num_tokens, 6)), 2)
    gate_up = jax.random.normal(keys[2], (6, 16, 16), dtype)
    down = jax.random.normal(keys[3], (6, 16, 8), dtype)
    return x, selected.astype(jnp.int32), weights, gate_up, down, keys[4]


@pytest.mark.parametrize("num_tokens", [1, 256])
def test_buckets_compute_what_the_package_does(num_tokens):
    x, selected, weights, gate_up, down, key = draw_pairs(num_tokens)
    probe = jax.random.normal(key, x.shape)

    def value(implementation):
        def weighted(x, weights, gate_up, down):
            y = experts(x, selected, weights, gate_up, down, implementation=implementation)
            return (probe * y).sum(), y

        return jax.jit(jax.grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))

    ours, y = value(training_experts.bucketed(6.0))(x, weights, gate_up, down)
    theirs, expected = value("scan")(x, weights, gate_up, down)
    np.testing.assert_allclose(y, expected, atol=2e-4)
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-3)


def test_full_buckets_drop_the_last_choices_and_nothing_else():
    num_tokens = 256
    x, _, weights, gate_up, down, _ = draw_pairs(num_tokens)
    # All first choices are expert 0: its bucket is full before the second choices come.
    selected = jnp.stack([jnp.zeros(num_tokens, jnp.int32), 1 + jnp.arange(num_tokens) % 5], 1)
    capacity = training_experts.bucket_rows(2 * num_tokens, 6, 1.5)
    assert capacity == 128
    kept = jnp.arange(num_tokens) < capacity
    y = jax.jit(training_experts.bucketed(1.5))(x, selected, weights, gate_up, down)
    counted = weights.at[:, 0].multiply(kept)
    expected = experts(x, selected, counted, gate_up, down, implementation="scan")
    np.testing.assert_allclose(y, expected, atol=2e-4)


def test_token_losses_equal_the_formula_in_value_and_gradient():
    keys = jax.random.split(jax.random.key(1), 4)
    hidden, head = (jax.random.normal(key, (24, 8)) for key in keys[:2])
    labels = jax.random.randint(keys[2], (24,), 0, 24)
    probe = jax.random.normal(keys[3], (24,))

    def plain(hidden, head):
        log_probabilities = jax.nn.log_softmax(hidden @ head.T)
        return -(probe * jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]).sum()

    def chunked(hidden, head):
        return (probe * training_step._token_losses(hidden, head, labels, 8)).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head) for f in (chunked, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


def test_stacked_layers_are_the_packages_model(weights):
    # As many windows as training evaluates at once: the same program.
    tokens = jax.random.randint(jax.random.key(1), (train_model.EVALUATION_WINDOWS, 17), 0, 32)
    losses = training_step.make_evaluation(CONFIG, attention="xla")(weights, tokens)
    model = training_step.to_model(CONFIG, weights, jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(16)[None, :], (len(tokens), 16))
    logits = jax.jit(lambda tokens: model(tokens, positions)[0])(tokens[:, :-1])
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2)[..., 0]
    # The package's router multiplies in bfloat16, so a close call may go to another expert.
    assert np.abs(losses - expected).mean() < 0.02


def test_balance_is_one_when_even_and_counts_what_is_dropped(weights):
    gate = jnp.zeros_like(weights["layers.mlp.gate.weight"])
    tokens = jax.random.randint(jax.random.key(1), (16, 17), 0, 32)
    losses = jax.jit(
        lambda gate: training_step._losses(
            {**weights, "layers.mlp.gate.weight": gate},
            tokens,
            config=CONFIG,
            capacity_ratio=1.0,
            attention="xla",
        )
    )
    total, (loss, balance, dropped) = losses(gate)
    # Even probabilities, although top-k of equal numbers takes experts 0 and 1 every time.
    np.testing.assert_allclose(balance, 1, rtol=1e-5)
    np.testing.assert_allclose(total - loss, 0.001 * 2 * 2, rtol=1e-2)
    capacity = training_experts.bucket_rows(2 * 256, 6, 1.0)
    np.testing.assert_allclose(dropped, 1 - 2 * capacity / 512, rtol=1e-6)


def test_training_learns_and_goes_on_where_it_was_stopped(tmp_path, corpus):
    limits = training_run.Limits(num_steps=6)
    assert train_model.train(CONFIG, RECIPE, corpus, tmp_path / "whole", limits)
    for part in range(2):
        is_complete = train_model.train(
            CONFIG,
            RECIPE,
            corpus,
            tmp_path / "parts",
            replace(limits, stop_after=3),
            is_resumed=part > 0,
        )
        assert is_complete == (part > 0)
    whole, parts = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert whole == parts
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in log] == [
        *("start", "heldout", "end"),
        *("start", "train", "heldout", "end"),
    ]
    heldout = [line["loss"]["all"] for line in log if line["kind"] == "heldout"]
    assert heldout[1] < heldout[0]
    assert log[-3]["learning_rate"] < RECIPE.learning_rate
    assert {"a", "b", "all"} == log[-2]["bits_per_byte"].keys()
    model = load(tmp_path / "parts" / "model")
    assert model.config == replace(CONFIG, initializer_range=0.2)


def test_a_state_is_neither_overwritten_nor_resumed_otherwise(tmp_path, corpus):
    limits = training_run.Limits(num_steps=4, stop_after=1)
    with pytest.raises(UsageError):
        train_model.train(CONFIG, RECIPE, corpus, tmp_path, limits, is_resumed=True)
    train_model.train(CONFIG, RECIPE, corpus, tmp_path, limits)
    with pytest.raises(UsageError):
        train_model.train(CONFIG, RECIPE, corpus, tmp_path, limits)
    with pytest.raises(BadFileError):
        train_model.train(CONFIG, RECIPE, corpus, tmp_path, limits, seed=1, is_resumed=True)


def test_windows_cover_the_corpus_once_an_epoch():
    starts = training_data.window_starts(1000, 10, seed=3, first=0, count=98)
    assert starts.min() >= 0
    assert starts.max() + 10 + 1 <= 1000
    assert len(set(starts // 10)) == 98
    later = training_data.window_starts(1000, 10, seed=3, first=90, count=20)
    np.testing.assert_array_equal(later[:8], starts[90:])
    assert set(later[8:] % 10) != set(starts % 10)


def test_bytes_come_back_from_bpe_ids(tmp_path):
    text = "Grüße, naïve\n\t世界 0"
    alphabet = training_data.byte_alphabet()
    names = ["<|endoftext|>", "".join(alphabet[byte] for byte in "世界".encode()), *alphabet]
    vocabulary = {name: token for token, name in enumerate(names)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    spellings = training_data.read_spellings(tmp_path / "tokenizer.json")
    ids = np.array([1, *(2 + np.frombuffer(text.encode(), np.uint8)), 0, 1], np.uint16)
    decoded = training_data.to_bytes(ids, spellings).tobytes()
    assert decoded == f"世界{text}\0世界".encode()


def test_the_byte_tokenizer_is_read_by_the_package(tmp_path):
    train_model.write_tokenizer(tmp_path, replace(RECIPE, is_bytes=True), tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    text = "Grüße\n  世界\x7f"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([*text.encode(), 0]) == text
    assert tokenizer.eos_ids == (0,)


def test_a_time_becomes_a_number_of_steps_when_pace_is_known(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training_run.time, "monotonic", lambda: clock[0])
    limits = training_run.Limits(run_s=320, total_s=620, started_s=0)
    progress = training_run.Progress()
    pace = training_run.Pace(limits, progress)
    clock[0] = 50.0  # compiling
    while not (pace.is_over(progress) or pace.is_complete(progress)):
        clock[0] += 1.0
        progress = replace(progress, step=progress.step + 1)
        progress = pace.plan(progress, lambda: None)
    assert not pace.is_complete(progress)
    assert progress.num_steps == 35 + int(0.98 * (620 - 85 - 20))
    assert progress.decay_from == int(0.8 * progress.num_steps)
    # The second run is slower: at the decay, the number of steps is set right.
    clock[0] = 0.0
    pace = training_run.Pace(limits, replace(progress, elapsed_s=300.0))
    progress = replace(progress, elapsed_s=300.0)
    while not (pace.is_over(progress) or pace.is_complete(progress)):
        clock[0] += 1.25
        progress = replace(progress, step=progress.step + 1)
        progress = pace.plan(progress, lambda: None)
    assert pace.is_complete(progress)
    assert progress.decay_from < progress.num_steps < 500
    assert 290 < clock[0] <= 300
