import json
from dataclasses import fields

import pytest

from moejax.errors import BadFileError, InfeasibleBudgetError, UsageError
from moejax.offload import SlotPlan, describe_cliff, even_plan, fixed_bytes, read_plan
from moejax.results import write_json
from moejax.simulate import slots_within
from moejax.tune import Plan, TierPlan

QWEN = {"num_layers": 24, "num_experts": 60, "expert_bytes": 17_301_504}
TINY = {"num_layers": 3, "num_experts": 8, "expert_bytes": 100}
NAMED = {"model": "tiny", "num_layers": 3, "num_experts": 8}


def test_a_budget_buys_the_slots_that_the_simulator_says():
    plan = even_plan(budget_bytes=2 * 10**9, **QWEN)
    assert (plan.scope, plan.num_slots) == ("layer", 115)
    for budget in (100, 250, 1250, 2399, 10**6):
        ours = even_plan(budget_bytes=budget, **TINY)
        assert ours.slots == slots_within(budget, [100] * 3, 8)


def test_slots_are_of_a_layer_or_of_the_pool():
    assert even_plan(slots=4, **TINY) == SlotPlan("layer", (4, 4, 4))
    assert even_plan(slots=4, scope="pool", **TINY) == SlotPlan("pool", (4,))
    assert even_plan(budget_bytes=750, scope="pool", **TINY) == SlotPlan("pool", (7,))
    assert even_plan(budget_bytes=10**9, scope="pool", **TINY) == SlotPlan("pool", (24,))


@pytest.mark.parametrize(
    ("slots", "scope"), [(0, "layer"), (9, "layer"), (0, "pool"), (25, "pool")]
)
def test_slots_out_of_range_are_refused(slots, scope):
    with pytest.raises(UsageError, match=f"{slots} slots for the (8|24) experts"):
        even_plan(slots=slots, scope=scope, **TINY)


@pytest.mark.parametrize("given", [{}, {"slots": 1, "budget_bytes": 100}])
def test_slots_and_budget_exclude_each_other(given):
    with pytest.raises(UsageError, match="exclude each other"):
        even_plan(**given, **TINY)


@pytest.mark.parametrize("scope", ["layer", "pool"])
def test_a_budget_too_small_names_the_smallest(scope):
    with pytest.raises(InfeasibleBudgetError, match="does not hold one expert") as caught:
        even_plan(budget_bytes=99, scope=scope, **TINY)
    assert "100B" in caught.value.hint
    assert even_plan(budget_bytes=100, scope=scope, **TINY).num_slots == 1


def test_what_is_fixed_is_paid_first():
    fixed = fixed_bytes(
        dense_bytes=1000, kv_bytes_per_token=3, batch_size=2, num_positions=50, workspace_bytes=7
    )
    assert fixed == 1307
    assert even_plan(budget_bytes=1307 + 650, fixed_bytes=fixed, **TINY).slots == (2, 2, 2)
    with pytest.raises(InfeasibleBudgetError, match="beside") as caught:
        even_plan(budget_bytes=1406, fixed_bytes=fixed, **TINY)
    assert "1407B" in caught.value.hint


def write_plan(path, **changes):
    table = {
        "model": "tiny",
        "strategy": "lfu",
        "tiers": [
            {"name": "L1", "memory": "device", "experts_per_layer": [3, 0, 5]},
            {"name": "L2", "memory": "pinned", "experts_per_layer": [1, 8, 1]},
        ],
    }
    path.write_text(json.dumps(table | changes))
    return path


def device_tier(slots) -> dict:
    return {"tiers": [{"memory": "device", "experts_per_layer": slots}]}


def test_the_device_tier_of_a_plan_is_read(tmp_path):
    path = write_plan(tmp_path / "plan.json")
    assert read_plan(path, **NAMED) == (SlotPlan("layer", (3, 0, 5)), "lfu")
    assert read_plan(path, scope="pool", **NAMED).plan == SlotPlan("pool", (8,))


def test_the_format_is_what_the_tuner_writes(tmp_path):
    """The tuner takes half a minute; its own classes write what it would."""
    slots = {"device": (3, 2, 8), "pinned": (1, 1, 0), "pageable": (0, 0, 0)}
    numbers = {field.name: 0 for field in fields(Plan)}
    plan = Plan(
        **numbers
        | {
            "model": "tiny",
            "strategy": "lru",
            "tiers": tuple(
                TierPlan(f"L{number}", memory, 100, counts)
                for number, (memory, counts) in enumerate(slots.items(), start=1)
            ),
            "prefetch_slots_per_layer": (1, 0, 0),
            "marginals_s_per_100mb": {"device": -0.1},
            "warnings": (),
        }
    )
    path = tmp_path / "plan.json"
    write_json(path, plan.to_json() | {"workload": None, "trace": "t.safetensors"})
    assert read_plan(path, **NAMED) == (SlotPlan("layer", (3, 2, 8)), "lru")


def test_organisation_and_capitals_do_not_make_another_model(tmp_path):
    path = write_plan(tmp_path / "plan.json", model="Some/Tiny")
    assert read_plan(path, **NAMED).plan.num_slots == 8


@pytest.mark.parametrize(
    "changes",
    [{"model": "other"}, device_tier([3, 0]), device_tier([3, 0, 5, 1]), device_tier([3, 0, 9])],
)
def test_a_plan_of_another_model_is_refused(tmp_path, changes):
    path = write_plan(tmp_path / "plan.json", **changes)
    with pytest.raises(UsageError, match="tiny has 3 layers of 8 experts") as caught:
        read_plan(path, **NAMED)
    assert "tune-cache --model tiny" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (device_tier([3, -1, 5]), "gives a layer -1 slots"),
        (device_tier([3, True, 5]), "gives a layer True slots"),
        (device_tier([3, 1.5, 5]), r"gives a layer 1\.5 slots"),
        (device_tier([0, 0, 0]), "keeps no expert"),
        (device_tier([]), "no one device tier"),
        (device_tier("345"), "no one device tier"),
        ({"tiers": []}, "no one device tier"),
        ({"tiers": None}, "no one device tier"),
        ({"tiers": [1, None]}, "no one device tier"),
        ({"strategy": 3}, "does not name"),
        ({"model": None}, "does not name"),
    ],
)
def test_a_plan_that_is_none_is_refused(tmp_path, changes, said):
    path = write_plan(tmp_path / "plan.json", **changes)
    with pytest.raises(BadFileError, match=said):
        read_plan(path, **NAMED)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 10**5, b"3"])
def test_what_is_no_json_table_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=r"plan\.json"):
        read_plan(path, **NAMED)


def test_a_missing_plan_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BadFileError, match="missing or not a file"):
            read_plan(path, **NAMED)


def test_only_a_pool_below_a_cycle_is_warned_of():
    sizes = {"num_layers": 24, "num_demands": 4, "expert_bytes": 17_301_504}
    said = describe_cliff(SlotPlan("pool", (17,)), **sizes)
    assert said is not None
    assert "17 experts (294 MB) is below one step's cycle of 93" in said
    assert describe_cliff(SlotPlan("pool", (92,)), **sizes) is not None
    assert describe_cliff(SlotPlan("pool", (93,)), **sizes) is None
    assert describe_cliff(SlotPlan("layer", (1,) * 24), **sizes) is None
