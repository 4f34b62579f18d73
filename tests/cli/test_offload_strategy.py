"""Strategies of several devices, each counting its own share of one profile."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from moejax.cli._offload_strategy import make_strategies
from moejax.qwen_moe import QwenMoeConfig
from moejax.strategies import CacheShape
from moejax.trace import Trace, save_trace

from ._checkpoint import CONFIG


@pytest.fixture
def config() -> QwenMoeConfig:
    return replace(CONFIG, num_experts=6, num_experts_per_tok=2)


@pytest.fixture
def profile(tmp_path, config):
    layers = len(config.moe_layers)
    order = np.random.default_rng(0).random((90, layers, 6)).argsort(-1)
    experts = order[..., :2].astype(np.uint8)
    path = tmp_path / "profile.safetensors"
    save_trace(Trace(experts, 6, np.array([0, 45, 90], np.int64)), path)
    return path


@pytest.mark.parametrize("name", ["top_k", "intelligent", "multi_look"])
def test_states_have_one_shape_where_devices_own_unequally_many(name, config, profile):
    strategies = make_strategies(name, config, profile, 4)
    shape = CacheShape(len(config.moe_layers), 2, 2, 1)
    states = [strategy.init(shape) for strategy in strategies]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(state)] for state in states]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)]) for state in states]
    assert not np.array_equal(leaves[0], leaves[1]), "devices learned the same of other experts"


def test_one_device_learns_from_all_of_the_profile(config, profile):
    (alone,) = make_strategies("top_k", config, profile)
    state = alone.init(CacheShape(len(config.moe_layers), 6, 2, 1))
    assert float(np.asarray(state.num_uses).sum()) == 90 * 2 * len(config.moe_layers)
