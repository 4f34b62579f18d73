"""Checks of engines on several devices, run in a process of their own: a CPU in eight parts."""

import json
import sys
import traceback

import jax
import numpy as np

from moejax.bench import adding_in_order
from moejax.devices import Team, team
from moejax.engine import COUNTS, OffloadEngine
from moejax.offload import ExpertStore, SlotPlan
from moejax.simulate import replay
from moejax.strategies import STRATEGIES, learn_profile
from moejax.trace import Trace, share_of

from ._offloaded import (
    FOR_KERNELS,
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_STEPS,
    TOPK,
    WITH_A_GAP,
    check_counts,
    decode,
    predictable,
    recorded,
    take_apart,
)

MISSES = COUNTS.index("misses")
# As many slots in all, so that they share a program.
PLANS = [SlotPlan("layer", slots) for slots in ((1, 1, 2), (2, 1, 1))]
PROMPTS = [[3, 14, 15, 9, 2, 6], [5, 3]]


def bits_are_those_of_one_device_that_adds_in_the_same_order():
    for num_devices, batch_size in ((2, 1), (3, 3)):
        engine = make_engine("lru", num_devices)
        runs = [decode(engine, batch_size, NUM_STEPS, plan=plan) for plan in PLANS]
        assert engine.num_compiles == {"decode": 1}
        check_counts_of_shares(engine, batch_size, recorded(WITH_A_GAP, batch_size)[2], runs[-1])
        with adding_in_order(num_devices):
            twin = decode(make_engine("lru", 1), batch_size, NUM_STEPS)
        for ours in runs:
            np.testing.assert_array_equal(ours.logits, twin.logits)
            np.testing.assert_array_equal(ours.token_ids, twin.token_ids)
        other = decode(make_engine("lru", 1), batch_size, NUM_STEPS)
        np.testing.assert_array_equal(other.token_ids, twin.token_ids)
        np.testing.assert_allclose(other.logits, twin.logits, rtol=0, atol=1e-5)
        assert np.any(other.logits != twin.logits), "the order of sums leaves no trace: no control"


def more_devices_than_divide_the_experts_count_what_the_simulator_counts():
    engine = make_engine("lfu", 5)
    steps = decode(engine, 3, NUM_STEPS)
    check_counts_of_shares(engine, 3, recorded(WITH_A_GAP, 3)[2], steps)


def each_device_learns_from_its_share_and_hears_of_it():
    experts, taught = (predictable(steps, seed)[0] for steps, seed in ((NUM_STEPS, 1), (300, 9)))
    said = np.random.default_rng(0).integers(0, NUM_EXPERTS, (NUM_STEPS, NUM_LAYERS, 2, TOPK))
    said = said.astype(np.uint8)
    heard = np.asarray(replay(experts, NUM_EXPERTS, lookahead=said[:, :, :, None]).lookahead)
    profiles = [learn_profile(share_of(_trace(taught), device, 2)) for device in range(2)]
    for name in ("intelligent", "gate_look"):
        engine = make_engine([STRATEGIES[name].make(profile) for profile in profiles], 2)
        table = engine.replay_table(experts, 1, lookahead=heard)
        steps = decode(engine, 1, NUM_STEPS, table=table)
        by_request = experts.reshape(NUM_STEPS, NUM_LAYERS, 1, TOPK)
        check_counts_of_shares(engine, 1, by_request, steps, said=said)
    in_kernels = make_engine("gate_look", 2, kernels="interpret")
    table = in_kernels.replay_table(experts, 1, lookahead=heard)
    ours, rows = decode(in_kernels, 1, 8, table=table).counts, COUNTS.index("fetched_rows")
    np.testing.assert_array_equal(ours[..., :rows], steps.counts[:8, ..., :rows])


def kernels_give_the_same_whatever_lies_in_slots():
    experts = predictable(NUM_STEPS, seed=1)[0]
    engine, alone = (make_engine("lru", n, kernels="interpret") for n in (2, 1))
    table = engine.replay_table(experts, 1)
    runs = [decode(engine, 1, NUM_STEPS, plan=plan, table=table) for plan in PLANS]
    by_request = experts.reshape(NUM_STEPS, NUM_LAYERS, 1, TOPK)
    check_counts_of_shares(engine, 1, by_request, runs[-1])
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    # Interpreted kernels become other instructions next to other ones: bits are for a GPU to show.
    batched = [decode(engine, 3, 3)]
    with adding_in_order(2):
        one = decode(alone, 1, NUM_STEPS, table=alone.replay_table(experts, 1))
        batched.append(decode(alone, 3, 3))
    np.testing.assert_array_equal(runs[0].token_ids, one.token_ids)
    np.testing.assert_allclose(runs[0].logits, one.logits, rtol=0, atol=3e-5)
    np.testing.assert_array_equal(*(each.token_ids for each in batched))
    np.testing.assert_allclose(*(each.logits for each in batched), rtol=0, atol=3e-5)


def texts_are_those_of_one_device():
    texts, counts = [], []
    for num_devices in (1, 3):
        engine = make_engine("lru", num_devices)
        found = engine.generate(PROMPTS, max_new_tokens=8).finish()
        texts.append(found.token_ids)
        counts.append(np.asarray(found.counts).sum((0, 1)))
        assert engine.num_compiles == {"decode": 1}
    assert texts[0] == texts[1]
    # As many demands, and fewer misses: every device brings two slots a layer.
    assert counts[0][0] == counts[1][0]
    assert counts[0][MISSES] > counts[1][MISSES] > 0


def check_counts_of_shares(engine, batch_size, experts, steps, *, said=None):
    """Every device's counts are those of the simulator on its share of the routing.

    Args:
      engine: The engine.
      batch_size: Requests.
      experts: Of every step, layer, request and choice.
      steps: What the engine did with them.
      said: What the next gates named, if they were asked.
    """
    num_devices = engine.sizes.num_devices
    by_token = experts.swapaxes(1, 2).reshape(-1, NUM_LAYERS, TOPK)
    of_devices = steps.counts.reshape(NUM_STEPS, num_devices, NUM_LAYERS, -1)
    assert of_devices[..., MISSES].sum() > 0
    for device in range(num_devices):
        share = share_of(_trace(by_token, said), device, num_devices)
        own = share.experts.reshape(NUM_STEPS, batch_size, NUM_LAYERS, -1).swapaxes(1, 2)
        own = own.reshape(NUM_STEPS, NUM_LAYERS, -1)
        heard = None if said is None else share.lookahead[:, :, :, None]
        lane = replay(own, share.num_experts, lookahead=heard)
        counts = of_devices[:, device][:, None][None]
        check_counts(engine, engine._strategies[device], lane, [engine.plan], counts)


def make_engine(strategy, num_devices, *, kernels="xla"):
    if isinstance(strategy, str):
        strategy = STRATEGIES[strategy].make(None)
    model, store = take_apart(WITH_A_GAP if kernels == "xla" else FOR_KERNELS)
    store = _spread(store, num_devices)
    return OffloadEngine(model, store, PLANS[-1], strategy, kernels=kernels, layers_per_copy=2)


def _spread(store: ExpertStore, num_devices: int) -> ExpertStore:
    if num_devices == 1:
        return store
    members, num_own = team(num_devices), store.layout.share(num_devices).num_experts

    def deal_out(layer):
        dealt = np.zeros((num_devices, num_own, *layer.shape[1:]), layer.dtype)
        for device in range(num_devices):
            own = layer[device::num_devices]
            dealt[device, : len(own)] = own
        return members.place(dealt.reshape(-1, *layer.shape[1:]), Team.OWN)

    layers = tuple(deal_out(np.asarray(layer)) for layer in store.layers)
    return ExpertStore(store.layout, layers, members)


def _trace(experts, lookahead=None) -> Trace:
    start = np.array([0, len(experts)], np.int64)
    return Trace(np.asarray(experts, np.uint8), NUM_EXPERTS, start, lookahead=lookahead)


CHECKS = (
    bits_are_those_of_one_device_that_adds_in_the_same_order,
    more_devices_than_divide_the_experts_count_what_the_simulator_counts,
    each_device_learns_from_its_share_and_hears_of_it,
    kernels_give_the_same_whatever_lies_in_slots,
    texts_are_those_of_one_device,
)


def main() -> None:
    """Runs every check and prints what went wrong, by name."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    found = {}
    for check in CHECKS:
        try:
            check()
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
