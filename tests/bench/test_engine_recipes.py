import dataclasses

import numpy as np
import pytest

from moejax.bench import RoutingRecipe, make_profile, make_routing
from moejax.cards import models_dir, read_card
from moejax.errors import UsageError
from moejax.qwen_moe import read_config

MADE = RoutingRecipe("hit_ratio", 6, 3, slots=4, hit_ratio=0.5)
DRAWN = RoutingRecipe("requests", 6, 1, source="tiny-moe")


@pytest.fixture(scope="module")
def config():
    fields = {"max_position_embeddings": 512} | read_card(models_dir() / "tiny-moe.toml")["config"]
    return read_config(fields, "tiny-moe")


@pytest.mark.parametrize(
    ("recipe", "label"),
    [
        (MADE, "50 % hits of 4 slots"),
        (MADE._replace(num_distinct=3), "50 % hits of 4 slots, 3 experts"),
        (
            MADE._replace(kind="foreseeable", slots=8, hit_ratio=0.9),
            "foreseeable misses of 8 slots",
        ),
        (DRAWN, "tiny-moe, seed 1"),
    ],
)
def test_a_recipe_gives_the_same_routing_again(config, recipe, label):
    batch_size = 1 if recipe.kind == "foreseeable" else 2
    routing = make_routing(recipe, config, "tiny-moe", batch_size)
    again = make_routing(RoutingRecipe(**recipe._asdict()), config, "tiny-moe", batch_size)
    assert routing.name == label
    assert routing.experts.shape == (6, 8, 2 * batch_size)
    np.testing.assert_array_equal(routing.experts, again.experts)
    np.testing.assert_array_equal(routing.lookahead, again.lookahead)
    other = make_routing(recipe._replace(seed=8), config, "tiny-moe", batch_size)
    assert not np.array_equal(routing.experts, other.experts)


def test_requests_share_their_profile_and_nothing_else(config):
    profiles = [make_profile(recipe, config, "tiny-moe") for recipe in (DRAWN, MADE)]
    again = make_profile(DRAWN._replace(seed=5), config, "tiny-moe")
    uses = [np.asarray(profile.num_uses) for profile in (*profiles, again)]
    np.testing.assert_array_equal(uses[0], uses[2])
    assert not np.array_equal(uses[0], uses[1])


def test_requests_of_another_shape_are_refused(config):
    half = dataclasses.replace(config, num_hidden_layers=4)
    with pytest.raises(UsageError, match=r"\(8, 16, 2\), the model \(4, 16, 2\)"):
        make_routing(DRAWN, half, "tiny-moe", 1)
