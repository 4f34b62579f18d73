"""Every way of computing the routed experts against the sum that defines them."""

import functools
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.errors import UsageError
from moejax.qwen_moe import EXPERTS, choose_experts, experts
from moejax.results import read_json

HIDDEN, FFN = 8, 6
# Largest difference, as a share of the largest number: rounding of the type and a little more.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# num_tokens, num_experts, topk; `buckets` computes 32 rows of an expert at a time.
SHAPES = {
    "one token": (1, 5, 2),
    "one expert each": (7, 5, 1),
    "every expert": (3, 4, 4),
    "one expert in all": (5, 1, 1),
    "no multiple of a bucket": (37, 2, 1),
}
# A program of `unrolled` grows with every token.
NUM_TOKENS = {"unrolled": 5}


def draw_inputs(num_tokens, num_experts, topk, *, dtype="float32", seed=0, favourite=None):
    """Arguments of `experts`: a token's choices are distinct, and may all start with one expert."""
    rng = np.random.default_rng(seed)
    scores = rng.random((num_tokens, num_experts))
    if favourite is not None:
        scores[:, favourite] = 2.0
    selected_experts = np.argsort(-scores, axis=1)[:, :topk].astype(np.int32)
    arrays = (
        rng.standard_normal((num_tokens, HIDDEN)),
        rng.uniform(0.05, 1.0, (num_tokens, topk)),
        rng.standard_normal((num_experts, 2 * FFN, HIDDEN)) / HIDDEN**0.5,
        rng.standard_normal((num_experts, HIDDEN, FFN)) / FFN**0.5,
    )
    x, routing_weights, gate_up_proj, down_proj = (jnp.asarray(array, dtype) for array in arrays)
    routing_weights = routing_weights.astype(jnp.float32)
    return x, jnp.asarray(selected_experts), routing_weights, gate_up_proj, down_proj


def loop(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """The definition: for each token, for each of its experts."""
    x, routing_weights, gate_up_proj, down_proj = (
        np.asarray(array, np.float64) for array in (x, routing_weights, gate_up_proj, down_proj)
    )
    total = np.zeros_like(x)
    for token, chosen in enumerate(np.asarray(selected_experts)):
        for choice, expert in enumerate(chosen):
            gate, up = np.split(gate_up_proj[expert] @ x[token], 2)
            y = down_proj[expert] @ (gate / (1 + np.exp(-gate)) * up)
            total[token] += routing_weights[token, choice] * y
    return total


def differentiable_loop(x, selected_experts, routing_weights, gate_up_proj, down_proj):
    """The same in jax, for its gradients."""
    rows = []
    for token, chosen in enumerate(np.asarray(selected_experts)):
        row = jnp.zeros(HIDDEN)
        for choice, expert in enumerate(chosen):
            gate, up = jnp.split(gate_up_proj[expert] @ x[token], 2)
            y = down_proj[expert] @ (jax.nn.silu(gate) * up)
            row = row + routing_weights[token, choice] * y
        rows.append(row)
    return jnp.stack(rows)


@functools.cache
def compiled(name):
    return jax.jit(functools.partial(experts, implementation=name))


def assert_equals_the_loop(name, inputs):
    found, expected = compiled(name)(*inputs), loop(*inputs)
    assert found.shape == inputs[0].shape
    assert found.dtype == inputs[0].dtype
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert error <= TOLERANCE[str(found.dtype)] * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPERTS)
def test_every_implementation_is_the_loop(name, shape):
    assert_equals_the_loop(name, draw_inputs(*SHAPES[shape]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", EXPERTS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), favourite=st.none() | st.integers(0, 6))
def test_any_routing_is_computed(name, dtype, seed, favourite):
    """Including all tokens to one expert, which then fills more than one bucket."""
    num_tokens = NUM_TOKENS.get(name, 40)
    inputs = draw_inputs(num_tokens, 7, 3, dtype=dtype, seed=seed, favourite=favourite)
    assert_equals_the_loop(name, inputs)


@pytest.mark.parametrize("name", EXPERTS)
def test_gradients_are_the_loops(name):
    x, selected_experts, *rest = draw_inputs(4, 3, 2, favourite=1)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def value(function, x, rest):
        return (function(x, selected_experts, *rest) * cotangent).sum()

    implementation = functools.partial(experts, implementation=name)
    found = jax.jit(jax.grad(functools.partial(value, implementation), argnums=(0, 1)))(x, rest)
    expected = jax.grad(functools.partial(value, differentiable_loop), argnums=(0, 1))(x, rest)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(other).max()) > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
def test_what_nobody_chose_counts_for_nothing(name):
    x, selected_experts, routing_weights, *weights = draw_inputs(3, 4, 2)
    huge = [jnp.concatenate([array, jnp.full_like(array[:1], 1e9)]) for array in weights]
    found = compiled(name)(x, selected_experts, routing_weights, *huge)
    expected = loop(x, selected_experts, routing_weights, *weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_choice_is_an_implementation(platform):
    for num_tokens in (1, 2, 3, 8, 9, 64, 65, 2048, 2049):
        assert choose_experts(num_tokens, platform) in EXPERTS


def test_the_choice_is_the_fastest_of_the_sweep():
    """Within a tenth, on the GPU whose times are committed."""
    report = read_json(Path(__file__).parents[2] / "reports" / "h100-model" / "results.json")
    times: dict[int, dict[str, float]] = {}
    for run in report["runs"]:
        if run["result"]["environment"]["backend"] == "gpu":
            for row in run["result"].get("experts", []):
                if "layer" in row:
                    found_s = statistics.median(row["layer"]["samples"])
                    times.setdefault(row["num_tokens"], {})[row["implementation"]] = found_s
    assert {1, 2, 4, 8, 16, 64, 256, 2048} <= set(times)
    for num_tokens, by_name in times.items():
        chosen_s = by_name[choose_experts(num_tokens, "gpu")]
        assert chosen_s <= 1.1 * min(by_name.values()), num_tokens


def test_auto_is_the_choice():
    inputs = draw_inputs(3, 4, 2)
    chosen = choose_experts(3, jax.default_backend())
    np.testing.assert_array_equal(compiled("auto")(*inputs), compiled(chosen)(*inputs))


def test_a_function_may_be_given():
    inputs = draw_inputs(3, 4, 2)
    found = experts(*inputs, implementation=lambda x, *rest: -x)
    np.testing.assert_array_equal(found, -inputs[0])


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError) as caught:
        experts(*draw_inputs(1, 2, 1), implementation="grouped")
    assert "'grouped'" in str(caught.value)
    assert all(name in caught.value.hint for name in ("auto", *EXPERTS))
