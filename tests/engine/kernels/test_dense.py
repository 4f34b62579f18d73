"""The dense kernels against the model's own layers, and their lowering for a GPU."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import ShapeDtypeStruct

from moejax.engine.kernels._dense import (
    Tile,
    head,
    output_part,
    qkv_part,
    shared_down_part,
    shared_up_part,
    sum_squares,
    tile_of,
)
from moejax.engine.kernels._dense_weights import (
    NUM_GATE_ROWS,
    DenseLayers,
    DenseWeights,
    pack_dense,
    padded_experts,
    supports,
)
from moejax.engine.kernels._parts import Launch, Part, launch, layer_number
from moejax.engine.kernels._router import router_part
from moejax.errors import UsageError
from moejax.qwen_moe import QwenMoe

from ._lowering import count_kernels, lower_for_gpu
from ._tiny import CONFIG, INTERPRETED, error, pad, tiny_model

LAYER, NUM_AHEAD = 1, 2
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}
# Requests, type, and tiles: one that splits every width, and the usual ones.
CASES = {
    "one-float32": (1, jnp.float32, Tile(4, 32, 4)),
    "one-bfloat16": (1, jnp.bfloat16, None),
    "three-float32": (3, jnp.float32, Tile(16, 32, 4)),
    "three-bfloat16": (3, jnp.bfloat16, None),
}


class Answers(NamedTuple):
    """What the kernels, or the model's layers, say about the same inputs."""

    qkv: jax.Array
    stream: jax.Array
    squares: jax.Array
    router_logits: jax.Array
    gate: jax.Array
    shared_hidden: jax.Array
    normed: jax.Array
    ahead: jax.Array
    answer: jax.Array
    logits: jax.Array


class Case(NamedTuple):
    tolerance: float
    found: Answers
    found_beside_junk: Answers
    wanted: Answers


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> Case:
    batch, dtype, tile = CASES[request.param]
    model = tiny_model(dtype=dtype)
    generator = np.random.default_rng(3)
    x, attended = (jnp.asarray(generator.normal(size=(batch, 96)), dtype) for _ in range(2))
    run = jax.jit(partial(run_kernels, tile=tile))
    weights = pack_dense(model)
    found, junk = (
        jax.tree.map(
            lambda y: jnp.moveaxis(y[..., :batch], -1, 0),
            run(weights, pad(x, filling), pad(attended, filling)),
        )
        for filling in (0.0, jnp.nan)
    )
    return Case(TOLERANCE[dtype], found, junk, nnx.jit(ask_model)(model, x, attended))


def run_kernels(
    weights: DenseWeights, x: jax.Array, attended: jax.Array, tile: Tile | None
) -> Answers:
    """One layer's kernels, the first beside another part and an array that they share."""
    layer, layers, eps = layer_number(LAYER), weights.layers, CONFIG.rms_norm_eps

    def mark(program, shared_ref, source_ref):
        shared_ref[program] = source_ref[program]

    marks = Part(2, mark, inputs=(jnp.array([5.0, 6.0]),))
    (shared,), (_, (qkv,)) = launch(
        "qkv",
        [marks, qkv_part(layer, layers, x, eps, tile=tile)],
        INTERPRETED,
        shared=(jnp.zeros(2),),
    )

    def alone(part: Part) -> tuple[jax.Array, ...]:
        return launch("kernel", [part], INTERPRETED)[1][0]

    stream, *squares = alone(output_part(layer, layers, x, attended, tile=tile))
    assert len(squares) == (x.shape[1] > 1)
    # What a kernel before did of a norm's work is taken, where several requests share it.
    done = jnp.stack([sum_squares(part) for part in jnp.split(x, 6)]) if squares else None
    logits, normed, ahead = alone(
        router_part(layer, layers, x, eps, squares=done, num_ahead=NUM_AHEAD, tile=tile)
    )
    (hidden,) = alone(shared_up_part(layer, layers, normed, tile=tile))
    (answer,) = alone(shared_down_part(layer, layers, x, logits, hidden, tile=tile))
    # The mark of the other part must have been set.
    qkv = jnp.where(shared[0] + shared[1] == 11, qkv, jnp.nan)
    count = padded_experts(CONFIG.num_experts)
    return Answers(
        qkv,
        stream,
        squares[0].sum(0) if squares else sum_squares(stream),
        logits[:count],
        logits[count],
        hidden,
        normed,
        ahead,
        answer,
        head(weights, x, eps, INTERPRETED, squares=done, tile=tile),
    )


def ask_model(model: QwenMoe, x: jax.Array, attended: jax.Array) -> Answers:
    layer = model.layers[LAYER]
    attention, block = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm(x), layer.post_attention_layernorm(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    shared = block.shared_expert
    gate = block.shared_expert_gate(after)
    stream = x + attention.o_proj(attended)
    following = [model.layers[(LAYER + 1 + ahead) % 2] for ahead in range(NUM_AHEAD)]
    ahead = [other.mlp.gate(other.post_attention_layernorm(x)) for other in following]
    return Answers(
        qkv=jnp.concatenate([project(before) for project in projections], axis=1),
        stream=stream,
        squares=sum_squares(stream.T),
        router_logits=block.route(after).router_logits,
        gate=gate[:, 0],
        shared_hidden=jax.nn.silu(shared.gate_proj(after)) * shared.up_proj(after),
        normed=after,
        ahead=jnp.stack(ahead, axis=1),
        answer=x + jax.nn.sigmoid(gate) * shared(after),
        logits=model.logits(model.norm(x)),
    )


@pytest.mark.parametrize("name", Answers._fields)
def test_equals_the_layers(case, name):
    found, wanted = getattr(case.found, name), getattr(case.wanted, name)
    if name in ("router_logits", "ahead"):
        assert not found[..., CONFIG.num_experts :].any(), "padded experts are zero"
        found = found[..., : CONFIG.num_experts]
    assert error(found, wanted) < case.tolerance


def test_padding_columns_do_no_harm(case):
    """Not a bit of a request changes with what lies in the columns behind the batch."""
    for found, beside_junk in zip(case.found, case.found_beside_junk, strict=True):
        np.testing.assert_array_equal(found, beside_junk)


def test_types(case):
    dtype = case.wanted.qkv.dtype
    wide = {"squares", "router_logits", "gate", "ahead", "answer", "logits"}
    for name, found in case.found._asdict().items():
        assert found.dtype == (jnp.float32 if name in wide else dtype), name


def test_layers_differ():
    """The number of the layer is read: another layer gives another answer."""
    weights = pack_dense(tiny_model())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(96, 1)), jnp.float32)

    @jax.jit
    def project(layer):
        part = qkv_part(layer, weights.layers, x, CONFIG.rms_norm_eps)
        return launch("qkv", [part], INTERPRETED)[1][0][0]

    assert error(project(layer_number(0)), project(layer_number(1))) > 0.1


def test_packing_takes_the_parameters_out():
    kept, consumed = tiny_model(), tiny_model()
    untouched = pack_dense(kept)
    packed = pack_dense(consumed, is_consumed=True)
    jax.tree.map(np.testing.assert_array_equal, packed, untouched)
    assert kept.layers[0].self_attn.q_proj.weight.size > 0
    layer = consumed.layers[0]
    for owner in (layer.input_layernorm, layer.self_attn.q_proj, layer.mlp.gate):
        assert owner.weight[...].size == 0
    assert layer.self_attn.k_proj.bias[...].size == 0
    assert layer.mlp.experts.down_proj[...].size > 0


def test_packing_without_biases_and_with_a_tied_head():
    model = tiny_model(replace(CONFIG, qkv_bias=False, tie_word_embeddings=True), jnp.bfloat16)
    packed = pack_dense(model)
    assert packed.head is packed.embedding
    assert packed.layers.qkv_bias.shape == (2, 160)
    assert packed.layers.qkv_bias.dtype == jnp.bfloat16
    assert not packed.layers.qkv_bias.any()
    assert padded_experts(6) == 16
    assert padded_experts(60) == 64


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"mlp_only_layers": (1,)}, "layer 1 has no routed experts"),
        ({"hidden_size": 72}, "hidden_size 72"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size 24"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size 0"),
        ({"num_attention_heads": 2}, "head_dim 48"),
        ({"num_attention_heads": 12}, "head_dim 8"),
        ({"vocab_size": 10}, "vocab_size 10"),
        ({"num_hidden_layers": 200_000, "hidden_size": 96}, "elements"),
    ],
)
def test_says_what_it_cannot_run(change, cause):
    assert supports(CONFIG) is None
    reason = supports(replace(CONFIG, **change))
    assert reason is not None
    assert cause in reason


def test_refuses_to_pack_what_it_cannot_run():
    with pytest.raises(UsageError) as refusal:
        pack_dense(tiny_model(replace(CONFIG, mlp_only_layers=(0,))))
    assert "layer 0" in refusal.value.cause
    assert "xla" in refusal.value.hint


@pytest.mark.parametrize("batch_pad", [1, 16])
@pytest.mark.parametrize("kernel", ["qkv", "output", "router", "shared_up", "shared_down", "head"])
def test_lowers_for_a_gpu(kernel, batch_pad):
    """At the size of Qwen1.5-MoE-A2.7B; needs no GPU."""
    layers = 24
    array = partial(ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = DenseWeights(
        DenseLayers(
            input_norm=array((layers, 2048)),
            qkv=array((layers, 6144, 2048)),
            qkv_bias=array((layers, 6144)),
            output=array((layers, 2048, 2048)),
            post_norm=array((layers, 2048)),
            router=array((layers, 64 + NUM_GATE_ROWS, 2048)),
            shared_gate_up=array((layers, 2 * 5632, 2048)),
            shared_down=array((layers, 2048, 5632)),
        ),
        embedding=array((151936, 2048)),
        final_norm=array((2048,)),
        head=array((151936, 2048)),
    )
    logits = ShapeDtypeStruct((64 + NUM_GATE_ROWS, batch_pad), jnp.float32)

    def run(weights, layer, x, hidden, logits):
        if kernel == "head":
            return head(weights, x, 1e-6)
        layers = weights.layers
        part = {
            "qkv": lambda: qkv_part(layer, layers, x, 1e-6),
            "output": lambda: output_part(layer, layers, x, x),
            "router": lambda: router_part(layer, layers, x, 1e-6, num_ahead=2),
            "shared_up": lambda: shared_up_part(layer, layers, x),
            "shared_down": lambda: shared_down_part(layer, layers, x, logits, hidden),
        }[kernel]()
        tile = tile_of(kernel, batch_pad)
        return launch(kernel, [part], Launch(tile.num_warps, tile.num_stages))[1][0]

    program = lower_for_gpu(
        run,
        weights,
        ShapeDtypeStruct((1,), jnp.int32),
        array((2048, batch_pad)),
        array((5632, batch_pad)),
        logits,
    )
    assert count_kernels(program) == 1
