"""Streamed prefill: bit for bit what the resident program gives, two layers' experts at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.engine import Engine, _stream
from moejax.engine._programs import ProgramSettings
from moejax.engine._sampling import Sampling, make_draw
from moejax.engine._stream import StreamedPrefill
from moejax.offload import pack
from moejax.qwen_moe import Lookahead, QwenMoe, RoutedExperts
from moejax.qwen_moe.modeling import SparseMoeBlock

from ._tiny import CONFIG, random_model

NUM_TOKENS = [3, 16, 9]
SETTINGS = ProgramSettings(
    batch_size=3, num_tokens=16, num_positions=32, is_greedy=True, is_recording=True
)
# Layers 0, 2, 3 and 4 have experts.
DEEP = replace(CONFIG, num_hidden_layers=5)


@pytest.mark.parametrize(
    ("dtype", "config", "lookahead", "sampling"),
    [
        # A lookahead of three layers goes beyond the last one.
        (jnp.float32, CONFIG, Lookahead(3, 4), Sampling(0.8, 0.9)),
        (jnp.bfloat16, DEEP, Lookahead(2, 6), Sampling()),
        (jnp.bfloat16, replace(CONFIG, tie_word_embeddings=True), None, Sampling()),
        (jnp.float32, replace(CONFIG, mlp_only_layers=(0, 1, 2)), None, Sampling()),
    ],
)
def test_the_resident_program_bit_for_bit(dtype, config, lookahead, sampling):
    model = random_model(config, dtype=dtype)
    settings = SETTINGS._replace(
        is_greedy=sampling.is_greedy, is_recording=bool(config.moe_layers), lookahead=lookahead
    )
    draw = None if sampling.is_greedy else make_draw(sampling, 5, 7, 3)
    expected = _resident(model, settings, draw)
    given = StreamedPrefill(*_taken_apart(model))(settings, *_prompts(), draw)
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_every_layer_gets_its_own_experts():
    """With two layers' experts exchanged the result is another."""
    model, layers = _taken_apart(random_model())
    _, _, logits, _ = StreamedPrefill(model, layers)(SETTINGS, *_prompts(), None)
    _, _, wrong, _ = StreamedPrefill(model, layers[::-1])(SETTINGS, *_prompts(), None)
    assert np.abs(np.asarray(logits) - np.asarray(wrong)).max() > 0.1


def test_layers_of_a_kind_share_a_compile():
    prefill = StreamedPrefill(*_taken_apart(random_model()))
    settings = SETTINGS._replace(lookahead=Lookahead(2, 3))
    prefill.prepare(settings)
    assert prefill.num_compiles == {"embed": 1, "layer": 2, "head": 1}
    prefill(settings, *_prompts(), None)
    assert prefill.num_compiles == {"embed": 1, "layer": 2, "head": 1}
    # How long the texts will be and how tokens are chosen concerns the head alone.
    prefill.prepare(settings._replace(num_positions=64))
    prefill.prepare(settings._replace(is_greedy=False))
    assert prefill.num_compiles == {"embed": 1, "layer": 2, "head": 3}


def test_two_layers_are_on_the_device_at_most(monkeypatch):
    """Also where the next one is sent for; and there are two whenever a layer computes."""
    model, layers = _taken_apart(random_model(DEEP), memory_kind="pinned_host")
    send, before, during = _stream._send, [], []

    def count() -> int:
        return sum(
            array.shape == layers[0].shape and array.sharding.memory_kind == "device"
            for array in jax.live_arrays()
        )

    def watch(packed):
        assert packed.sharding.memory_kind == "pinned_host"
        before.append(count())
        return send(packed)

    monkeypatch.setattr(_stream, "_send", watch)
    prefill = StreamedPrefill(model, layers)
    prefill(SETTINGS, *_prompts(), None, on_layer=lambda *_: during.append(count()))
    assert before == [0, 1, 1, 1]
    assert during == [2, 2, 2, 1]
    assert count() == 0


def test_each_layer_is_shown_while_it_is_there():
    model = random_model(DEEP)
    shell, layers = _taken_apart(model)
    seen, log = [], []

    def show(moe_layer, packed, routing):
        seen.append((moe_layer, np.asarray(packed), np.asarray(routing.selected_experts)))
        log.append(("shown", moe_layer))
        return [_Filled(moe_layer, log)]

    _, _, _, routed = StreamedPrefill(shell, layers)(SETTINGS, *_prompts(), None, on_layer=show)
    assert [moe_layer for moe_layer, _, _ in seen] == [0, 1, 2, 3]
    assert routed is not None
    for moe_layer, packed, selected in seen:
        np.testing.assert_array_equal(packed, layers[moe_layer])
        np.testing.assert_array_equal(selected.reshape(3, 16, -1), routed.experts[:, :, moe_layer])
    # What is returned is waited for once, before the next call.
    waits = [("waited", layer) for layer in range(3)]
    shows = [("shown", layer) for layer in range(4)]
    assert log == [event for pair in zip(shows, waits, strict=False) for event in pair] + shows[3:]


class _Filled:
    """An array in the making that tells when it is waited for."""

    def __init__(self, moe_layer: int, log: list):
        self.moe_layer, self.log = moe_layer, log

    def block_until_ready(self):
        self.log.append(("waited", self.moe_layer))
        return self


def _prompts() -> tuple[np.ndarray, np.ndarray]:
    """Prompts of several lengths; what fills them up is not zero, and must not matter."""
    token_ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 16))
    return token_ids.astype(np.int32), np.array(NUM_TOKENS, np.int32)


def _resident(model: QwenMoe, settings: ProgramSettings, draw):
    engine = Engine(model)
    return engine._prefill_program(settings)(engine._params, *_prompts(), draw)


def _taken_apart(model: QwenMoe, memory_kind: str = "device") -> tuple[QwenMoe, list[jax.Array]]:
    """The model without its routed experts, and these, packed."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=memory_kind)
    layers = []
    for number in model.config.moe_layers:
        block = model.layers[number].mlp
        assert isinstance(block, SparseMoeBlock)
        experts = block.experts
        gate_up, down = (np.asarray(p[...]) for p in (experts.gate_up_proj, experts.down_proj))
        layers.append(jax.device_put(pack(gate_up, down), place))
    graph, routed, rest = nnx.split(model, RoutedExperts, ...)
    empty = jax.tree.map(lambda array: jnp.zeros(0, array.dtype), routed)
    return nnx.merge(graph, empty, rest), layers
