"""Rung 2 against the same events written down on an absolute clock, in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.simulate import Record, replay
from moejax.simulate._prefetch import MAX_PREFETCHES
from moejax.strategies import Predictor, lru, on_demand, with_prefetch

NUM_LAYERS, NUM_EXPERTS, TOPK = 4, 12, 3
# Unequal slots: none, fewer than an event demands, about half, all.
SLOTS = np.array([[0, 2, 6, 12], [2, 2, 2, 2], [4, 7, 3, 5], [12, 6, 2, 9]], np.int32)


def given(table):
    """A predictor that says what a table [steps, layers, depth, experts] holds."""

    def step(state, access):
        event, num_layers = access.event, table.shape[1]
        return state, jnp.asarray(table)[event // num_layers, event % num_layers]

    return Predictor(lambda shape: jnp.zeros(shape.num_layers), step, reach=table.shape[2])


def plain_timeline(demand, clock, slots, table=None):
    """LRU with given prefetch probabilities, on an absolute clock, with sets and dictionaries."""
    clock = {name: np.asarray(leaf, float) for name, leaf in clock._asdict().items()}
    num_steps, num_layers, num_experts = demand.shape
    depth = num_layers - 1
    now_s = link_free_s = 0.0
    resident = [set() for _ in range(num_layers)]
    worth, waiting, unused = ([{} for _ in range(num_layers)] for _ in range(3))
    landed_s = {}
    records = []

    def compute_s(layer, tokens, experts):
        if not experts:
            return 0.0
        read_s = len(experts) * clock["expert_read_s"][layer]
        token_s = sum(tokens[e] for e in experts) * clock["expert_token_s"][layer]
        return (read_s**8 + token_s**8) ** (1 / 8)

    def choose(event, next_s, queued):
        """The prefetch that gains most: (gain, steps ahead, expert, victim)."""
        best = (0.0, None, None, None)
        for d in range(depth):
            layer = (event + 1 + d) % num_layers
            chance = table[event // num_layers, event % num_layers, d]
            victim = None
            if len(resident[layer]) >= slots[layer]:
                evictable = [e for e in resident[layer] if e not in waiting[layer]]
                if not evictable:
                    continue
                victim = min(evictable, key=lambda e: (worth[layer].get(e, -1), -e))
            copy_s = clock["copy_s"][layer]
            lost = 0.0 if victim is None else chance[victim]
            for expert in set(range(num_experts)) - resident[layer]:
                overrun_s = max(queued + copy_s - next_s, 0.0)
                gain_s = (chance[expert] - lost - (1 - chance[expert])) * copy_s - overrun_s
                if queued < next_s and chance[expert] > 0 and gain_s > best[0]:
                    best = (gain_s, layer, expert, victim)
        return best

    for event in range(num_steps * num_layers):
        step, layer = divmod(event, num_layers)
        tokens = demand[step, layer]
        demanded = set(np.flatnonzero(tokens).tolist())
        now_s += clock["attention_s"]
        late = {e for e in demanded & resident[layer] if landed_s[layer, e] > now_s}
        hits, misses = (demanded & resident[layer]) - late, demanded - resident[layer]
        for expert in sorted(misses):
            link_free_s = max(link_free_s, now_s) + clock["copy_s"][layer]
            landed_s[layer, expert] = link_free_s
        last_s = max((landed_s[layer, e] for e in late | misses), default=now_s)
        wait_s = max(0.0, last_s - now_s)
        first_s = clock["shared_s"] + compute_s(layer, tokens, hits)
        then_s = compute_s(layer, tokens, late | misses)
        stall_s = wait_s - clock["overlap_ratio"] * min(first_s, wait_s)
        ending_s = clock["step_fixed_s"] if layer == num_layers - 1 else 0.0
        useful = len(demanded & set(unused[layer]))
        for expert in demanded:
            worth[layer][expert] = event
            unused[layer].pop(expert, None)
        order = sorted(resident[layer] | demanded, key=lambda e: (-worth[layer].get(e, -1), e))
        resident[layer] = set(order[: slots[layer]])
        waiting[layer] = {}
        wasted = [len(set(unused[layer]) - resident[layer])] + [0] * depth
        unused[layer] = {e: True for e in unused[layer] if e in resident[layer]}
        num_resident = len(resident[layer])
        demand_s, now_s = now_s, now_s + first_s + then_s + stall_s + ending_s
        issued = [0] * depth
        while table is not None and sum(issued) < MAX_PREFETCHES:
            queued = max(link_free_s, demand_s)
            _, target, expert, victim = choose(event, now_s + clock["attention_s"], queued)
            if target is None:
                break
            link_free_s = queued + clock["copy_s"][target]
            landed_s[target, expert] = link_free_s
            resident[target] = (resident[target] - {victim}) | {expert}
            wasted[1 + (target - layer - 1) % num_layers] += unused[target].pop(victim, False)
            waiting[target][expert] = unused[target][expert] = True
            issued[(target - layer - 1) % num_layers] += 1
            assert len(resident[target]) <= slots[target]
        records.append(
            Record(
                num_demands=len(demanded),
                num_hits=len(hits),
                num_late=len(late),
                num_misses=len(misses),
                num_on_host=0,
                num_fetched_rows=0,
                num_prefetches=issued,
                num_useful=useful,
                num_wasted=wasted,
                num_resident=num_resident,
                compute_s=clock["attention_s"] + first_s + then_s + ending_s,
                stall_s=stall_s,
            )
        )
    fields = (np.asarray(values, float) for values in zip(*records, strict=True))
    return Record(*(field.reshape(num_steps, num_layers, *field.shape[1:]) for field in fields))


@pytest.mark.parametrize("with_table", [False, True], ids=["lru", "prefetching"])
def test_timeline_equals_a_plain_clock(with_table, random_experts, round_clock, run_timeline):
    experts = random_experts(21, num_steps=50, num_layers=NUM_LAYERS, num_experts=8, most=4)
    # Two places that partly agree: tokens count, experts are fetched once.
    experts = np.concatenate([experts, random_experts(22, num_steps=50, num_layers=4, most=1)], -1)
    lane = replay(experts, NUM_EXPERTS)
    rng = np.random.default_rng(23)
    truth = np.concatenate([lane.demand, np.zeros_like(lane.demand[:1])]).reshape(-1, NUM_EXPERTS)
    ahead = np.arange(50 * NUM_LAYERS)[:, None] + 1 + np.arange(3)[None, :]
    table = (0.6 * rng.random((200, 3, NUM_EXPERTS)) + 0.4 * (truth[ahead] > 0)).astype(np.float32)
    table = table.reshape(50, NUM_LAYERS, 3, NUM_EXPERTS)
    # Sizes differ by layer, and the link is now ahead of compute, now behind it.
    clock = round_clock(
        NUM_LAYERS,
        copy_s=np.array([3.1e-6, 1.7e-6, 9.3e-6, 4.9e-6]),
        expert_token_s=np.array([1.9e-6, 0.3e-6, 1e-6, 2.3e-6]),
    )
    strategy = with_prefetch(lru(), given(table)) if with_table else lru()
    found = run_timeline(strategy, lane, clock, SLOTS, topk=TOPK)
    for i, slots in enumerate(SLOTS):
        plain = plain_timeline(lane.demand, clock, slots.tolist(), table if with_table else None)
        for name, expected, leaf in zip(Record._fields, plain, found, strict=True):
            # A wait is a difference of microseconds: 1e-6 of the event, not of the difference.
            atol = 1e-6 * plain.compute_s.max() if name.endswith("_s") else 0
            np.testing.assert_allclose(
                leaf[i], expected, rtol=1e-6, atol=atol, err_msg=f"{name} at {slots}"
            )
    if with_table:
        assert found.num_late.sum() > 10
        assert 50 < found.num_useful.sum() < found.num_prefetches.sum()
        outstanding = found.num_prefetches.sum() - found.num_useful.sum() - found.num_wasted.sum()
        assert 0 <= outstanding <= found.num_resident[-1].sum()
        assert found.num_wasted[..., 0].sum() > 0 < found.num_wasted[..., 1:].sum()


def test_a_prefetch_that_was_dropped_on_the_way_is_a_miss(round_clock, run_timeline):
    """Admission may drop a prefetch after an event that did not want it, still on the wire."""
    experts = np.full((3, 2, 1), 255, np.uint8)
    experts[2, 1] = 3
    table = np.zeros((3, 2, 1, 4), np.float32)
    table[0, 0, 0, 3] = 1.0
    clock = round_clock(2, copy_s=np.array([1e-6, 400e-6]))
    strategy = with_prefetch(on_demand(), given(table))
    record = run_timeline(strategy, replay(experts, 4), clock, np.array([[2, 2]], np.int32), topk=1)
    assert record.num_prefetches.sum() == 1
    assert (record.num_late.sum(), record.num_misses.sum()) == (0, 1)
