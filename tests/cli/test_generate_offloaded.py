"""`moejax generate` with experts in host memory: any cache, the same tokens, and what it says."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moejax import cli, engine
from moejax.engine import COUNTS
from moejax.trace import Trace, save_trace

from ._checkpoint import CONFIG, write_checkpoint
from ._tiny import make_trace

# An expert of the checkpoint: three matrices of 16 by 8 in float32.
EXPERT_BYTES = 3 * 16 * 8 * 4
PROMPT = ("--prompt-ids", "84,104,101", "--max-new-tokens", 12)
CONTRADICTIONS = {
    ("--budget", "1GB", "--slots", 2): "--budget and --slots exclude each other",
    ("--slots", 2, "--plan", "plan.json"): "--slots and --plan exclude each other",
    ("--slots", 2, "--include-dense"): "--include-dense has no meaning without --budget",
    ("--strategy", "lru"): "--strategy has no meaning with every expert on the device",
    ("--scope", "pool"): "--scope has no meaning with every expert on the device",
    ("--kernels", "xla"): "--kernels has no meaning with every expert on the device",
    ("--profile", "x"): "--profile has no meaning with every expert on the device",
    ("--devices", 2): "--devices has no meaning with every expert on the device",
    ("--slots", 2, "--devices", 99): "6 experts cannot be dealt out among 99 devices",
    ("--slots", 2, "--devices", 5): "5 device(s) are asked for, and there are 1",
    ("--slots", 0): "0 slots for the 6 experts of a layer",
    ("--slots", 7): "7 slots for the 6 experts of a layer",
    ("--slots", 13, "--scope", "pool"): "13 slots for the 12 experts of all layers",
    ("--slots", 2, "--strategy", "none"): "--strategy: 'none' is not known",
    ("--slots", 2, "--strategy", "oracle"): "--strategy: oracle reads the future",
    (
        "--slots",
        2,
        "--strategy",
        "top_k",
    ): "--strategy: top_k learns from a profile and none was given",
    ("--budget", "much"): "--budget: 'much' is not a size",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("offloaded") / "tiny")


@pytest.fixture
def generate(capsys, folder):
    def run(*arguments: str | Path, model: Path = folder) -> tuple[int, str, str]:
        command = ["generate", "--model", model, *PROMPT, *arguments]
        code = cli.main([str(argument) for argument in command])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def read(generate):
    """What a run with `-o json` says, and what it said meanwhile."""

    def run(*arguments: str | Path) -> tuple[dict, str]:
        code, out, err = generate(*arguments, "-o", "json")
        assert code == 0, err
        return json.loads(out), err

    return run


def routing(num_layers: int) -> Trace:
    """A trace of as many experts as the checkpoint has."""
    scores = np.random.default_rng(0).random((60, num_layers, CONFIG.num_experts))
    experts = scores.argsort(axis=-1)[..., : CONFIG.num_experts_per_tok].astype(np.uint8)
    return make_trace(experts=experts, num_experts=CONFIG.num_experts, model="")


class StubEngine:
    """Keeps what it was made of; says two tokens with counts that are easy to add up."""

    kernels = "stub"
    device_bytes = {"dense": 5, "slots": 7}  # noqa: RUF012

    def __init__(self, model, store, plan, strategy, *, kernels):
        self.made.append(SimpleNamespace(**(locals() | {"self": None})))

    def generate(self, prompts, **settings):
        return StubGeneration()


class StubGeneration:
    # Two steps of two layers; each event: 4 demands, 2 hits, 1 late, 1 miss, 1 prefetch, 20 rows.
    counts = np.tile(np.array([4, 2, 1, 1, 1, 20], np.int32), (2, 2, 1))
    token_ids, finish_reasons = ([65, 66, 67],), ["length"]
    timing = SimpleNamespace(compile_s=2.0, ttft_s=0.5, step_s=[0.1, 0.2])

    def __iter__(self):
        for token in self.token_ids[0]:
            yield SimpleNamespace(token_ids=np.array([token]), is_live=np.array([True]))


@pytest.fixture
def made(monkeypatch) -> list:
    """What a stub in place of the engine was made of."""
    own = type("OwnStub", (StubEngine,), {"made": []})
    monkeypatch.setattr(engine, "OffloadEngine", own)
    return own.made


@pytest.fixture
def write_plan(tmp_path):
    def write(**changes) -> Path:
        tier = {"name": "L1", "memory": "device", "experts_per_layer": [4, 1]}
        table = {"model": "tiny", "strategy": "lfu", "tiers": [tier]}
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(table | changes))
        return path

    return write


@pytest.fixture(scope="module")
def whole(folder) -> dict:
    """What the model says when every expert has a slot."""
    return cli_json(folder, "--slots", CONFIG.num_experts)


def cli_json(folder: Path, *arguments: str | int) -> dict:
    command = ["generate", "--model", folder, *PROMPT, *arguments, "-o", "json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([str(argument) for argument in command]) == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize(
    ("strategy", "slots", "scope"),
    [
        ("lru", 1, "layer"),
        ("lru", 4, "pool"),
        ("intelligent", 4, "layer"),
        ("intelligent", 1, "pool"),
        ("on_demand", 4, "layer"),
    ],
)
def test_whatever_stays_on_the_device_the_tokens_are_the_same(
    folder, whole, strategy, slots, scope
):
    found = cli_json(folder, "--slots", slots, "--scope", scope, "--strategy", strategy)
    assert found["token_ids"] == whole["token_ids"]
    offload = found["offload"]
    counted = sum(offload[f"num_{kind}"] for kind in ("hits", "late", "misses"))
    # 11 steps: the first new token comes from the prompt.
    assert counted == 11 * len(CONFIG.moe_layers) * CONFIG.num_experts_per_tok
    assert (offload["strategy"], offload["scope"]) == (strategy, scope)
    if strategy == "on_demand":
        assert offload["num_misses"] == counted
        assert offload["fetched_bytes_per_step"] == counted / 11 * EXPERT_BYTES


def test_the_resident_model_says_the_same(folder, whole):
    resident = cli_json(folder)
    assert resident["token_ids"] == whole["token_ids"]
    assert "offload" not in resident


def test_the_record_says_what_was_fetched(made, read):
    offload = read("--slots", 3)[0]["offload"]
    assert offload == {
        "strategy": "lru",
        "scope": "layer",
        "slots": [3, 3],
        "devices": 1,
        "kernels": "stub",
        "hit_ratio": 0.5,
        "num_hits": 8,
        "num_late": 4,
        "num_misses": 4,
        "fetched_bytes_per_step": 2 * 20 * 16 * 4,
        "device_bytes": {"dense": 5, "slots": 7},
    }
    assert COUNTS == ("demands", "hits", "late", "misses", "prefetches", "fetched_rows")


def test_the_person_who_waits_reads_the_same(made, generate):
    code, _, err = generate("--slots", 3)
    assert code == 0
    if jax.default_backend() == "cpu":
        assert err.startswith("no GPU: running on the CPU")
    assert err.splitlines()[-1] == (
        "lru with 6 slots over 2 layers, hits 50.0 %, late 4, misses 4, fetched 2.56 kB a token"
    )


def test_without_a_decode_step_there_is_no_hit_ratio(made, read, monkeypatch):
    monkeypatch.setattr(StubGeneration, "counts", np.zeros((0, 2, len(COUNTS)), np.int32))
    offload = read("--slots", 3)[0]["offload"]
    assert (offload["hit_ratio"], offload["fetched_bytes_per_step"]) == (None, None)


def test_the_model_comes_without_its_experts_and_the_store_with_them(made, read):
    read("--slots", 3)
    (one,) = made
    assert one.model.layers[0].mlp.experts.down_proj.shape == (0, 16, 8)
    assert one.store.layout == (6, 16, 8, "float32")
    assert [layer.shape for layer in one.store.layers] == [(6, 24, 16)] * 2
    assert one.store.layout.expert_bytes == EXPERT_BYTES


@pytest.mark.parametrize(
    ("options", "scope", "slots"),
    [
        (("--budget", f"{7 * EXPERT_BYTES}B"), "layer", (4, 3)),
        (("--budget", "1GB", "--scope", "pool"), "pool", (12,)),
        (("--slots", 5, "--scope", "pool"), "pool", (5,)),
    ],
)
def test_a_budget_or_slots_make_a_plan(made, read, options, scope, slots):
    read(*options)
    assert made[0].plan == (scope, slots)
    assert made[0].kernels == "auto"


def test_a_plan_brings_its_slots_and_its_strategy(made, read, write_plan):
    assert read("--plan", write_plan())[0]["offload"]["strategy"] == "lfu"
    assert made[0].plan == ("layer", (4, 1))
    record, _ = read("--plan", write_plan(), "--strategy", "fifo", "--scope", "pool")
    assert record["offload"]["strategy"] == "fifo"
    assert made[1].plan == ("pool", (5,))


def test_the_rest_may_be_paid_from_the_budget(made, generate):
    code, _, err = generate("--budget", "1kB", "--include-dense")
    assert code == 3
    assert "does not hold one expert of 1.54 kB beside" in err
    smallest = int(err.split("The smallest feasible budget is ")[1].split("B")[0])
    assert generate("--budget", f"{smallest}B", "--include-dense")[0] == 0
    assert made[0].plan == ("layer", (1, 0))
    assert generate("--budget", f"{smallest - 1}B", "--include-dense")[0] == 3
    parameters = sum(
        leaf.nbytes for leaf in jax.tree.leaves(made[0].model) if isinstance(leaf, jax.Array)
    )
    # A cache for 32 positions of 2 layers, keys and values 8 wide, and two layers on their way.
    known = parameters + 32 * 2 * 2 * 8 * 4 + 2 * 6 * EXPERT_BYTES + EXPERT_BYTES
    assert known < smallest < known + 100_000


def test_a_budget_below_one_expert_names_the_smallest(generate):
    code, out, err = generate("--budget", "1kB")
    assert (code, out) == (3, "")
    assert f"The smallest feasible budget is {EXPERT_BYTES}B" in err


@pytest.mark.parametrize("options", CONTRADICTIONS, ids=lambda options: " ".join(map(str, options)))
def test_contradictions_are_refused_before_weights_are_read(generate, monkeypatch, options):
    monkeypatch.setattr("moejax.qwen_moe.params.load", lambda *_, **__: pytest.fail("loaded"))
    code, out, err = generate(*options)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {CONTRADICTIONS[options]}")
    assert "\nhint: " in err


def test_a_plan_of_another_model_is_refused(generate, write_plan):
    code, _, err = generate("--plan", write_plan(model="other"))
    assert code == 2
    assert "is a plan of other with 2 layers and up to 4 slots" in err


def test_a_plan_that_is_none_is_refused(generate, write_plan):
    code, _, err = generate("--plan", write_plan(tiers=[]))
    assert code == 4
    assert "is not a plan" in err


def test_a_truncated_checkpoint_is_refused(generate, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(content[: None if name == "config.json" else -100])
    code, _, err = generate("--slots", 2, model=tmp_path)
    assert code == 4
    assert "model.safetensors" in err


def test_kernels_need_a_gpu(generate):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    code, _, err = generate("--slots", 2, "--kernels", "pallas")
    assert code == 5
    assert err.startswith("error: --kernels pallas needs an NVIDIA GPU")


def test_a_small_pool_is_warned_of(made, generate):
    code, _, err = generate("--slots", 2, "--scope", "pool")
    assert code == 0
    assert "warning: a pool of 2 experts (3.07 kB) is below one step's cycle of 3" in err
    assert "warning" not in generate("--slots", 3, "--scope", "pool")[2]


def test_a_strategy_learns_from_a_profile(made, read, generate, tmp_path):
    path = tmp_path / "profile.safetensors"
    save_trace(routing(num_layers=2), path)
    assert read("--slots", 3, "--strategy", "top_k", "--profile", path)[0]["offload"]
    assert "knowing nothing" in read("--slots", 3, "--strategy", "intelligent")[1]
    said = read("--slots", 3, "--strategy", "intelligent", "--profile", path)[1]
    assert "knowing nothing" not in said
    save_trace(routing(num_layers=3), path)
    code, _, err = generate("--slots", 3, "--strategy", "top_k", "--profile", path)
    assert code == 2
    assert "the profile has (layers, experts, topk) (3, 6, 2), the model (2, 6, 2)" in err


def test_two_devices_say_what_one_says_with_a_plan_for_two(generate, folder, tmp_path):
    plan = tmp_path / "plan.json"
    tier = {"memory": "device", "experts_per_layer": [2, 1]}
    plan.write_text(
        json.dumps({"model": "tiny", "strategy": "lru", "num_devices": 2, "tiers": [tier]})
    )
    code, _, said = generate("--plan", plan)
    assert code == 2
    assert "is a plan for 2 device(s), not for 1" in said
    # A CPU becomes two devices only before it computes.
    command = ["generate", "--model", folder, *PROMPT, "--plan", plan, "--devices", 2, "-o", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "moejax", *map(str, command)],
        capture_output=True,
        text=True,
        check=True,
    )
    two = json.loads(done.stdout)
    one = json.loads(generate("--slots", 2, "-o", "json")[1])
    assert two["token_ids"] == one["token_ids"]
    assert two["offload"]["devices"] == 2
    assert two["offload"]["slots"] == [2, 1]
    totals = [each["offload"][n] for each in (one, two) for n in ("num_hits", "num_misses")]
    assert totals[0] + totals[1] == totals[2] + totals[3]
