"""Streamed prefill: bit for bit what the resident program gives, two layers' experts at a time."""

import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.engine import DenseModel, Engine, OffloadEngine, _stream, prepare_model
from moejax.engine._programs import ProgramSettings
from moejax.engine._sampling import Sampling, make_draw
from moejax.engine._stream import StreamedPrefill
from moejax.errors import UsageError
from moejax.offload import SlotPlan, pack
from moejax.qwen_moe import Lookahead, QwenMoe, RoutedExperts, abstract
from moejax.qwen_moe.modeling import SparseMoeBlock
from moejax.strategies import STRATEGIES

from ._offloaded import take_apart
from ._tiny import CONFIG, random_model

NUM_TOKENS = [3, 16, 9]
SETTINGS = ProgramSettings(
    batch_size=3, num_tokens=16, num_positions=32, is_greedy=True, is_recording=True
)
# Layers 0, 2, 3 and 4 have experts.
DEEP = replace(CONFIG, num_hidden_layers=5)
FOR_KERNELS = replace(
    CONFIG,
    hidden_size=32,
    num_hidden_layers=2,
    mlp_only_layers=(),
    moe_intermediate_size=16,
    shared_expert_intermediate_size=32,
)


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


@pytest.mark.parametrize(
    ("dtype", "config", "lookahead"),
    [
        (jnp.float32, FOR_KERNELS, Lookahead(2, 3)),
        (
            jnp.bfloat16,
            replace(FOR_KERNELS, tie_word_embeddings=True, qkv_bias=False, num_experts=16),
            None,
        ),
    ],
)
def test_stacked_weights_give_the_same_bits(dtype, config, lookahead):
    """What kernels decode with, cut into layers again."""
    model, layers = _taken_apart(random_model(config, dtype=dtype))
    settings = SETTINGS._replace(lookahead=lookahead)
    expected = StreamedPrefill(model, layers)(settings, *_prompts(), None)
    stacked = prepare_model(model, "interpret")
    assert isinstance(stacked, DenseModel)
    prefill = StreamedPrefill(stacked, layers)
    jax.tree.map(np.testing.assert_array_equal, prefill(settings, *_prompts(), None), expected)
    assert prefill.num_compiles == {"embed": 1, "layer": 1, "head": 1}


def test_dense_weights_are_there_once():
    """Several engines, after they have read a prompt, hold what one of them says it does."""
    before = {id(array) for array in jax.live_arrays()}
    shell, store = take_apart(FOR_KERNELS)
    model = prepare_model(shell, "interpret")
    plan, strategy = SlotPlan("layer", (2, 2)), STRATEGIES["lru"].make(None)
    engines = [OffloadEngine(model, store, plan, strategy, kernels="interpret") for _ in range(2)]
    for engine in engines:
        engine.read(SETTINGS, *_prompts(), None)
    del shell, model
    gc.collect()
    experts = sum(layer.nbytes for layer in store.layers)
    alive = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    dense = engines[0].device_bytes["dense"]
    parameters = nnx.state(abstract(FOR_KERNELS, jnp.float32), nnx.Not(RoutedExperts))
    assert dense > 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert alive == dense + experts


def test_a_model_is_left_as_it_was_unless_it_is_prepared():
    model, store = take_apart(FOR_KERNELS)
    plan, strategy = SlotPlan("layer", (2, 2)), STRATEGIES["lru"].make(None)
    OffloadEngine(model, store, plan, strategy, kernels="interpret")
    weight = model.layers[1].self_attn.q_proj.weight
    assert weight[...].size == FOR_KERNELS.hidden_size**2
    assert prepare_model(model, "xla") is model
    prepared = prepare_model(model, "interpret")
    assert model.layers[1].self_attn.q_proj.weight[...].size == 0
    with pytest.raises(UsageError, match="prepared for kernels"):
        OffloadEngine(prepared, store, plan, strategy, kernels="xla")


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
