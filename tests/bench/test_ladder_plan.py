"""What a ladder measures, for the shape of a small model."""

import itertools

import pytest

from moejax.bench import ladder_plan, make_routing
from moejax.errors import UsageError
from moejax.qwen_moe import read_config
from moejax.qwen_moe.params import open_checkpoint

CONFIG = read_config(open_checkpoint("tiny-moe").config, "tiny-moe")
STRATEGIES = ("on_demand", "gate_look", "lru")


@pytest.fixture(scope="module")
def plan():
    return ladder_plan(CONFIG, "tiny-moe", STRATEGIES, (1, 4), 6)


def test_every_strategy_is_held_out_at_four_capacities_of_each_batch_size(plan):
    held_out = [one for one in plan if not one.is_fit]
    found = {(c.strategy, c.slots, c.batch_size) for c, _, _ in held_out}
    wanted = {(name, n, size) for name in STRATEGIES for n in (2, 4, 8, 12) for size in (1, 4)}
    assert found == wanted
    assert len(held_out) == len(wanted)


def test_the_fit_sees_no_routing_that_is_held_out(plan):
    fitted, held_out = (
        {one.recipe for one in plan if one.is_fit is kind} for kind in (True, False)
    )
    assert not fitted & held_out
    assert {recipe.kind for recipe in held_out} == {"requests"}
    assert {recipe.kind for recipe in fitted} == {"hit_ratio", "foreseeable"}


def test_the_fit_sees_what_each_strategy_costs_and_no_case_comes_twice(plan):
    hits = {one.case.strategy for one in plan if one.is_fit and one.recipe.hit_ratio == 1.0}
    assert hits == set(STRATEGIES)
    cases = [one.case for one in plan]
    assert len(set(cases)) == len(cases)


def test_cases_that_share_a_program_are_neighbours(plan):
    programs = [(one.case.batch_size, one.case.strategy) for one in plan]
    changes = sum(a != b for a, b in itertools.pairwise(programs))
    assert changes + 1 == len(set(programs))


def test_every_routing_can_be_made(plan):
    for recipe, size in {(one.recipe, one.case.batch_size) for one in plan}:
        routing = make_routing(recipe, CONFIG, "tiny-moe", size)
        assert routing.experts.shape == (6, 8, 2 * size)


def test_the_fit_has_lru_at_one_request_whatever_is_asked():
    plan = ladder_plan(CONFIG, "tiny-moe", ("fifo",), (4,), 6, slots=(3,))
    held_out = [one.case for one in plan if not one.is_fit]
    assert [(c.strategy, c.slots, c.batch_size) for c in held_out] == [("fifo", 3, 4)]
    alone = [one.recipe for one in plan if one.is_fit and one.case.batch_size == 1]
    assert len({recipe.hit_ratio for recipe in alone}) >= 4


def test_a_model_without_routing_has_no_ladder():
    with pytest.raises(UsageError, match="no workload is of a-model"):
        ladder_plan(CONFIG, "a-model", ("lru",), (1,), 6)
