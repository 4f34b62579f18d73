"""How sure plans are: a clear gain is told from noise, and equal plans tie."""

import dataclasses

import numpy as np
import pytest

from moejax.cards import Hardware, Uncertainty, load_hardware, load_model
from moejax.tune import certainty, is_tie, tier_problem, tune

MODEL = load_model("tiny-moe")
SIZES = {"batch_size": 1, "context_tokens": 64}


def profile(spread_ratio: float = 0.02) -> Hardware:
    return dataclasses.replace(load_hardware("rtx-3090"), uncertainty=Uncertainty(spread_ratio, 20))


def problem(hardware: Hardware, *, skew: float, strategy: str = "lru", seed: int = 0):
    """Layers whose misses fall fast or slowly with slots: the more skew, the more a plan gains."""
    slots = np.arange(MODEL.num_experts + 1) / MODEL.num_experts
    steepness = np.where(np.arange(MODEL.num_moe_layers) % 2, 1 + skew, 1 / (1 + skew))
    hit_ratio = slots[None] ** (1 / steepness[:, None])
    demands = np.full(MODEL.num_moe_layers, float(MODEL.num_experts_per_tok))
    rng = np.random.default_rng(seed)
    draws = rng.random((64, MODEL.num_moe_layers, MODEL.num_experts_per_tok))
    misses = (draws[..., None] > hit_ratio[None, :, None]).sum(2).astype(float)
    return tier_problem(
        hardware,
        MODEL,
        hit_ratio,
        demands,
        budget_bytes=6 * MODEL.num_moe_layers * MODEL.expert_bytes,
        strategy=strategy,
        sample_misses=misses,
        **SIZES,
    )


def sure(hardware, question, lru=None):
    return certainty(tune(question), question, lru, hardware, MODEL, **SIZES)


def test_a_clear_gain_is_told_from_a_tie():
    hardware = profile(spread_ratio=0.002)
    clear, none = (sure(hardware, problem(hardware, skew=skew)) for skew in (6.0, 0.0))
    assert clear.beats_uniform_probability > 0.95
    assert clear.ties == ()
    assert 0.3 < none.beats_uniform_probability < 0.7
    assert none.ties == ("uniform", "lru")


def test_noise_makes_a_tie_of_what_was_clear():
    hardware = profile(spread_ratio=0.5)
    found = sure(hardware, problem(hardware, skew=6.0))
    assert is_tie(found.beats_uniform_probability)
    low_s, high_s = found.latency_interval_s
    assert high_s > 2 * low_s


def test_the_plan_lies_in_its_interval():
    hardware = profile()
    question = problem(hardware, skew=2.0)
    found = sure(hardware, question)
    low_s, high_s = found.latency_interval_s
    assert low_s < tune(question).step_latency_s < high_s


def test_another_strategy_is_held_against_lru():
    hardware = profile()
    poor = problem(hardware, skew=0.0, strategy="lfu")
    numbers = poor.numbers._replace(num_misses=poor.numbers.num_misses * 0 + 2.0)
    poor = dataclasses.replace(poor, numbers=numbers, check_misses=None)
    found = sure(hardware, poor, problem(hardware, skew=0.0))
    assert found.beats_lru_probability < 0.05
    assert "lru" not in found.ties


def test_a_profile_that_does_not_say_gives_none():
    hardware = load_hardware("rtx-3090")
    assert sure(hardware, problem(hardware, skew=1.0)) is None


@pytest.mark.parametrize(("chance", "tie"), [(0.04, False), (0.5, True), (0.94, True), (1, False)])
def test_only_a_sure_winner_breaks_a_tie(chance, tie):
    assert is_tie(chance) is tie
