"""Details of the architecture done wrong, one at a time; a check of parity must notice each."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.qwen_moe import Routing, modeling

from ._reference_models import CONFIGS, Weights

Code = Callable[[pytest.MonkeyPatch], None]


class Wrong(NamedTuple):
    """A detail done wrong: in the config, in the weights, or in the code.

    Attributes:
      fields: Fields of `config.json` to replace.
      weights: Changes the tensors of the hub's layout.
      code: Replaces functions of the port.
      model: Which of the six models shows it.
    """

    fields: Mapping[str, Any] = MappingProxyType({})
    weights: Callable[[Weights], Weights] = lambda weights: weights
    code: Code = lambda patch: None
    model: str = "gqa"


def change(pattern: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], Weights]:
    """Edits every tensor whose name contains `pattern`."""

    def apply(weights: Weights) -> Weights:
        assert any(pattern in name for name in weights)
        return {name: edit(w) if pattern in name else w for name, w in weights.items()}

    return apply


def swap(one: str, other: str, within: str = "") -> Callable[[Weights], Weights]:
    """Exchanges the tensors whose names differ in `one` and `other`."""

    def apply(weights: Weights) -> Weights:
        pairs = {name: name.replace(one, other) for name in weights if one in name}
        pairs = {name: twin for name, twin in pairs.items() if within in name}
        assert pairs
        twins = pairs | {twin: name for name, twin in pairs.items()}
        return {name: weights[twins.get(name, name)] for name in weights}

    return apply


def leave_out(pattern: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if pattern not in name}


def share_keys_in_turn(weights: Weights) -> Weights:
    """Queries 0, 1, 2, 3 use keys 0, 1, 0, 1 instead of 0, 0, 1, 1."""

    def reorder(heads: np.ndarray) -> np.ndarray:
        return heads.reshape(4, 8, -1)[[0, 2, 1, 3]].reshape(heads.shape)

    weights = change("q_proj", reorder)(weights)
    return change("o_proj", lambda w: np.ascontiguousarray(reorder(w.T).T))(weights)


def replace_rotate(rotate: Callable[..., jax.Array]) -> Code:
    """`rotate` gets the right function first, then its arguments."""
    right = modeling.rotate
    return lambda patch: patch.setattr(modeling, "rotate", functools.partial(rotate, right))


def rotate_interleaved(rotate, x, positions, theta):
    """Neighbours as the two coordinates, as in the original paper."""
    halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    first, second = jnp.split(rotate(halves, positions, theta), 2, axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(x.shape)


def rotate_queries_one_late(rotate, x, positions, theta):
    is_query = x.shape[2] == CONFIGS["gqa"]["num_attention_heads"]
    return rotate(x, positions + is_query, theta)


def rotate_backwards(rotate, x, positions, theta):
    """The other sign alone would cancel in the product of queries and keys, so keys only."""
    is_query = x.shape[2] == CONFIGS["gqa"]["num_attention_heads"]
    return rotate(x, positions if is_query else -positions, theta)


def replace_route(edit: Callable[[Routing], Routing]) -> Code:
    right = modeling.SparseMoeBlock.route
    return lambda patch: patch.setattr(
        modeling.SparseMoeBlock, "route", lambda block, x: edit(right(block, x))
    )


def softmax_after_top_k(routing: Routing) -> Routing:
    chosen = jnp.take_along_axis(routing.router_logits, routing.selected_experts, axis=-1)
    return routing._replace(routing_weights=jax.nn.softmax(chosen, axis=-1))


def sigmoid_instead_of_softmax(routing: Routing) -> Routing:
    chosen = jnp.take_along_axis(routing.router_logits, routing.selected_experts, axis=-1)
    return routing._replace(routing_weights=jax.nn.sigmoid(chosen))


def swap_best_two(routing: Routing) -> Routing:
    order = jnp.array([1, 0, 2, 3])
    return routing._replace(routing_weights=routing.routing_weights[:, order])


def subtract_mean(patch: pytest.MonkeyPatch) -> None:
    right = modeling.RMSNorm.__call__
    patch.setattr(
        modeling.RMSNorm, "__call__", lambda norm, x: right(norm, x - x.mean(-1, keepdims=True))
    )


WRONG = {
    "rms_norm_eps 1e-5": Wrong({"rms_norm_eps": 1e-5}),
    "rope_theta 1e4": Wrong({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "rope_theta 1e6": Wrong(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, model="norm-topk"
    ),
    "RoPE interleaved": Wrong(code=replace_rotate(rotate_interleaved)),
    "RoPE of keys backwards": Wrong(code=replace_rotate(rotate_backwards)),
    "queries one position late": Wrong(code=replace_rotate(rotate_queries_one_late)),
    "no bias": Wrong({"qkv_bias": False}, leave_out("_proj.bias")),
    "no query bias": Wrong(weights=change("q_proj.bias", np.zeros_like)),
    "no key bias": Wrong(weights=change("k_proj.bias", np.zeros_like)),
    "no value bias": Wrong(weights=change("v_proj.bias", np.zeros_like)),
    "keys shared in turn": Wrong(weights=share_keys_in_turn),
    "scores not scaled": Wrong(weights=change("q_proj", lambda w: w * 8**0.5)),
    "top-3 instead of 4": Wrong({"num_experts_per_tok": 3}),
    "top-5 instead of 4": Wrong({"num_experts_per_tok": 5}),
    "norm_topk_prob set": Wrong({"norm_topk_prob": True}),
    "norm_topk_prob not set": Wrong({"norm_topk_prob": False}, model="norm-topk"),
    "softmax after top-k": Wrong(code=replace_route(softmax_after_top_k)),
    "sigmoid router": Wrong(code=replace_route(sigmoid_instead_of_softmax)),
    "weights of the best two swapped": Wrong(code=replace_route(swap_best_two)),
    "gate and up swapped": Wrong(weights=swap("gate_proj", "up_proj", ".experts.")),
    "gate and up of the shared expert swapped": Wrong(
        weights=swap("gate_proj", "up_proj", "shared_expert.")
    ),
    "gelu instead of silu": Wrong(code=lambda patch: patch.setattr(jax.nn, "silu", jax.nn.gelu)),
    "no shared expert": Wrong(weights=change("shared_expert.down_proj", np.zeros_like)),
    "shared expert without gate": Wrong(
        code=lambda patch: patch.setattr(jax.nn, "sigmoid", jnp.ones_like)
    ),
    "routed experts left out": Wrong(
        code=replace_route(lambda routing: routing._replace(routing_weights=jnp.zeros((48, 4))))
    ),
    "norms swapped": Wrong(weights=swap("input_layernorm", "post_attention_layernorm")),
    "norm weight counted from 1": Wrong(weights=change("layernorm", lambda w: w + 1)),
    "mean subtracted": Wrong(code=subtract_mean),
    "no last norm weight": Wrong(weights=change("model.norm", np.ones_like)),
    "head tied": Wrong({"tie_word_embeddings": True}, leave_out("lm_head")),
    "embedding scaled": Wrong(weights=change("embed_tokens", lambda w: w * 32**0.5)),
    "weights rounded to bfloat16": Wrong(
        weights=change(".weight", lambda w: w.astype(jnp.bfloat16).astype(np.float32))
    ),
}
"""What is wrong to how; every one shows in the logits of a prompt."""


def place_one_late(patch: pytest.MonkeyPatch) -> None:
    """New tokens are counted from one, prompts from zero."""
    right = modeling.Attention.__call__

    def attend(attention, x, positions, cached, implementation):
        return right(attention, x, positions + (x.shape[1] == 1), cached, implementation)

    patch.setattr(modeling.Attention, "__call__", attend)


def not_see_itself(patch: pytest.MonkeyPatch) -> None:
    right = modeling._sees
    patch.setattr(modeling, "_sees", lambda positions, num: right(positions - 1, num))


def see_everything(patch: pytest.MonkeyPatch) -> None:
    right = modeling._sees
    patch.setattr(modeling, "_sees", lambda positions, num: right(positions + num, num))


WRONG_CACHE: dict[str, Code] = {
    "new tokens one place late": place_one_late,
    "new tokens do not see themselves": not_see_itself,
    "tokens see what is not yet written": see_everything,
}
"""Mistakes that show only when a cache is used."""
