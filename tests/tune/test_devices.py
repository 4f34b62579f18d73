"""Plans for several devices: their law by hand, their search by brute force, their counts."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cards import Constant, load_hardware
from moejax.cost import layer_clock
from moejax.errors import InfeasibleBudgetError, UsageError
from moejax.simulate import lru_hit_curve, ranks, stream
from moejax.strategies import lru
from moejax.trace import Trace, batch_trace, share_of
from moejax.tune import Split, devices_problem, tier_problem, tune_devices
from moejax.tune._devices_search import best_slots, devices_step_s, step_times, uniform_slots
from moejax.tune._step import layer_costs

from ._tiers import EXPERT_BYTES, HARDWARE, model

NUM_LAYERS, NUM_EXPERTS, TOPK = 2, 6, 2
MODEL = replace(model(NUM_LAYERS, NUM_EXPERTS), num_experts_per_tok=TOPK)


def _trace(num_tokens: int = 60, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    worth = rng.gumbel(size=(num_tokens, NUM_LAYERS, NUM_EXPERTS)) + rng.normal(size=NUM_EXPERTS)
    return Trace(
        experts=worth.argsort(-1)[..., :TOPK].astype(np.uint8),
        num_experts=NUM_EXPERTS,
        request_start=np.array([0, num_tokens // 2, num_tokens]),
    )


def _curves(num_devices: int, trace: Trace | None = None):
    trace = trace or _trace()
    shares = [share_of(trace, device, num_devices) for device in range(num_devices)]
    return [
        lru_hit_curve(batch_trace(share, 2), share.num_experts, keep_steps=trace.num_tokens)
        for share in shares
    ]


def _problem(num_devices: int, *, num_slots: float = 2, hardware=HARDWARE, **options):
    misses = [curve.step_misses_warm for curve in _curves(num_devices)]
    budget_bytes = int(num_slots * EXPERT_BYTES)
    return devices_problem(
        hardware, MODEL, misses, budget_bytes=budget_bytes, batch_size=2, **options
    )


def _with_all_reduce(latency_s: float, bytes_per_s: float):
    constants = {
        "all_reduce_latency_s": Constant(latency_s, "s", "measured", None, "made up"),
        "all_reduce_bytes_per_s": Constant(bytes_per_s, "B/s", "measured", None, "made up"),
    }
    return replace(HARDWARE, constants={**HARDWARE.constants, **constants})


def test_one_device_obeys_the_law_of_the_tiers_step_by_step():
    problem = _problem(1, num_slots=5)
    (misses,) = problem.step_misses
    curve = _curves(1)[0]
    numbers = tier_problem(
        HARDWARE,
        MODEL,
        curve.hit_ratio_warm,
        curve.num_demands / curve.num_steps,
        budget_bytes=5 * EXPERT_BYTES,
        batch_size=2,
    ).numbers
    slots = np.array([3, 2])
    nothing = jnp.zeros(NUM_LAYERS)
    split = Split(jnp.asarray(slots, float), nothing, NUM_EXPERTS - slots + nothing, nothing)

    def one(step):
        return layer_costs(numbers, step, jnp.minimum(step, 1.0), split).latency_s.sum()

    expected = jax.vmap(one)(jnp.asarray(misses, float)) + numbers.clock.step_fixed_s
    np.testing.assert_allclose(step_times(problem.times, slots), expected, rtol=1e-5)


def test_a_layer_takes_as_long_as_its_slowest_device():
    problem = _problem(2)
    clock = layer_clock(HARDWARE, MODEL, batch_size=2)
    slots = np.array([2, 1])
    overlap = float(clock.overlap_ratio)
    expected = []
    for step in range(len(problem.step_misses[0])):
        step_s = float(clock.step_fixed_s)
        for layer in range(NUM_LAYERS):
            demands = [int(share[step, layer, 0]) for share in problem.step_misses]
            own_s = []
            for device, share in enumerate(problem.step_misses):
                misses = int(share[step, layer, slots[layer]])
                read_s = float(clock.expert_read_s[layer])
                pairs_s = 2 * TOPK / sum(demands) * float(clock.expert_token_s[layer])
                one_s = (read_s**8 + pairs_s**8) ** (1 / 8)
                resident_s = float(clock.shared_s) + (demands[device] - misses) * one_s
                wait_s = misses * float(clock.copy_s[layer])
                hidden_s = overlap * min(resident_s, wait_s)
                own_s.append(resident_s + misses * one_s + wait_s - hidden_s)
            step_s += float(clock.attention_s) + max(own_s)
        expected.append(step_s)
    np.testing.assert_allclose(step_times(problem.times, slots), expected, rtol=1e-5)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_no_split_of_the_budget_is_faster(num_devices, num_slots):
    problem = _problem(num_devices, num_slots=num_slots)
    splits = [
        np.array(split)
        for split in itertools.product(range(problem.most_slots + 1), repeat=NUM_LAYERS)
        if sum(split) <= num_slots
    ]
    slots = best_slots(problem)
    assert slots.sum() <= num_slots
    best_s = min(devices_step_s(problem.times, split) for split in splits)
    found_s = devices_step_s(problem.times, slots)
    assert found_s == pytest.approx(best_s, rel=1e-12)
    assert found_s <= devices_step_s(problem.times, uniform_slots(problem))


def test_the_plan_counts_what_the_ranks_count_on_the_shares():
    trace, num_devices = _trace(seed=3), 2
    misses = [curve.step_misses for curve in _curves(num_devices, trace)]
    plan = tune_devices(
        devices_problem(HARDWARE, MODEL, misses, budget_bytes=3 * EXPERT_BYTES, batch_size=2), 1.0
    )
    num_misses = num_demands = 0
    slots = plan.tiers[0].experts_per_layer
    for device in range(num_devices):
        share = share_of(trace, device, num_devices)
        source = stream(batch_trace(share, 2), share.num_experts)
        capacities = np.array(slots)[:, None]
        counts = ranks(lru(), source, capacities, jax.random.key(0), topk=share.topk)
        num_demands += counts.num_demands.sum()
        num_misses += counts.num_demands.sum() - counts.num_hits.sum()
    assert plan.hit_ratio == pytest.approx(1 - num_misses / num_demands, rel=1e-12)
    num_steps = len(misses[0])
    assert plan.fetched_bytes == pytest.approx(num_misses * EXPERT_BYTES / num_steps, rel=1e-12)


def test_forgiven_steps_add_up_to_the_forgiven_curve():
    (curve,) = _curves(1)
    expected = curve.num_demands[:, None] - curve.num_hits - curve.num_forgiven
    np.testing.assert_array_equal(curve.step_misses_warm.sum(axis=0), expected)
    # Kept from the middle on, steps know how many first touches came before them.
    late = lru_hit_curve(batch_trace(_trace(), 2), NUM_EXPERTS, keep_steps=10)
    np.testing.assert_array_equal(late.step_misses_warm, curve.step_misses_warm[-10:])
    with pytest.raises(ValueError, match="keep_steps"):
        _ = lru_hit_curve(batch_trace(_trace(), 2), NUM_EXPERTS).step_misses_warm


def test_an_all_reduce_is_paid_once_a_layer():
    without = tune_devices(_problem(2), 1.0)
    paid = tune_devices(_problem(2, hardware=_with_all_reduce(1e-5, 1e9)), 1.0)
    message_s = 1e-5 + 4 * 2 * MODEL.hidden_size / 1e9
    assert paid.all_reduce_s == pytest.approx(message_s)
    added_s = paid.step_latency_s - without.step_latency_s
    assert added_s == pytest.approx(NUM_LAYERS * message_s, rel=1e-6)
    assert (without.all_reduce_s, "taken as 0" in " ".join(without.warnings)) == (0.0, True)
    assert "taken as 0" not in " ".join(paid.warnings)


def test_links_that_share_the_host_are_slower_side_by_side():
    slow = Constant(0.5, "1", "measured", None, "made up")
    hardware = replace(HARDWARE, constants={**HARDWARE.constants, "links_beside_ratio": slow})
    plain, beside = (tune_devices(_problem(2, hardware=one), 1.0) for one in (HARDWARE, hardware))
    assert "side by side" in " ".join(plain.warnings)
    assert "side by side" not in " ".join(beside.warnings)
    # Each miss takes as much longer as its bytes do; what hides behind it stays the same.
    wait_s = EXPERT_BYTES / HARDWARE.value("pinned_h2d_bytes_per_s")
    slowest = np.max([share[..., 2] for share in _problem(2).step_misses], axis=0)
    slots = np.array([2, 2])
    added_s = step_times(_problem(2, num_slots=4, hardware=hardware).times, slots)
    added_s -= step_times(_problem(2, num_slots=4).times, slots)
    np.testing.assert_allclose(added_s, slowest.sum(axis=1) * wait_s, rtol=1e-4)
    # One device has its link to itself.
    assert step_times(_problem(1, hardware=hardware).times, slots) == pytest.approx(
        step_times(_problem(1).times, slots)
    )


def test_a_plan_knows_its_bound_and_one_device():
    problem = _problem(2, num_slots=3)
    plan = tune_devices(problem, 0.5)
    assert plan.speedup_ratio == 0.5 / plan.step_latency_s
    assert plan.used_bytes == plan.tiers[0].capacity_bytes == 3 * EXPERT_BYTES
    demands = sum(share[..., 0].sum(axis=1).mean() for share in problem.step_misses)
    hit_bytes = demands * EXPERT_BYTES - plan.fetched_bytes
    read_bytes = problem.rates.replicated_bytes + hit_bytes / 2
    link_s = plan.fetched_bytes / 2 / HARDWARE.value("pinned_h2d_bytes_per_s")
    expected_s = read_bytes / HARDWARE.value("vram_bytes_per_s") + link_s
    assert plan.links_and_memories_s == pytest.approx(expected_s)
    assert plan.links_and_memories_s < plan.step_latency_s
    slots = list(plan.tiers[0].experts_per_layer)
    assert plan.to_json()["slots_per_device"] == [slots, slots]


def test_all_experts_fit():
    plan = tune_devices(_problem(2, num_slots=6), 1.0)
    assert plan.tiers[0].experts_per_layer == (3, 3)
    assert (plan.hit_ratio, plan.fetched_bytes) == (1.0, 0.0)
    assert "nothing left to tune" in plan.warnings[-1]


def test_budgets_that_hold_no_plan_name_the_smallest():
    with pytest.raises(InfeasibleBudgetError, match="does not hold one expert"):
        _problem(2, num_slots=0.9)
    needed_bytes = (NUM_LAYERS * NUM_EXPERTS - 2 * 2) * EXPERT_BYTES
    with pytest.raises(InfeasibleBudgetError, match="exceed the pinned budget") as refused:
        _problem(2, pinned_budget_bytes=needed_bytes - 1)
    assert f"{needed_bytes}B" in refused.value.hint
    _problem(2, pinned_budget_bytes=needed_bytes)
    with pytest.raises(InfeasibleBudgetError, match="dense weights"):
        _problem(2, num_slots=1, include_dense=True)


def test_misses_of_another_model_are_refused():
    misses = [curve.step_misses_warm for curve in _curves(2)]
    with pytest.raises(UsageError, match="are not those of"):
        devices_problem(HARDWARE, MODEL, misses[:1], budget_bytes=EXPERT_BYTES)


def test_no_profile_guesses_an_all_reduce():
    assert "all_reduce_latency_s" not in load_hardware("rtx-3090").constants
