import dataclasses
from pathlib import Path

import pytest

from moejax.cards import load_model
from moejax.report import load_data
from moejax.report._answer import answer
from moejax.report._room import room

from ._factory import results, without_links, write_run

MODEL = load_model("qwen1.5-moe-a2.7b")


def run_on(folder: Path, memory_bytes: float, **model):
    content = results(strategies=("on_demand", "lru"), batch_sizes=(1,), num_runs=2)
    content["model"] = dataclasses.asdict(MODEL) | {"routed_bytes": MODEL.routed_bytes} | model
    content["settings"]["context_tokens"] = 512
    content["hardware"]["constants"]["vram_bytes"]["value"] = memory_bytes
    return load_data(write_run(folder, content))


def test_slots_are_what_the_rest_of_the_card_holds(tmp_path: Path):
    data = run_on(tmp_path, 24 * 2**30)
    found = room(data)
    assert found is not None
    rest = 24 * 2**30 - MODEL.dense_bytes - 512 * MODEL.kv_bytes_per_token
    slot_bytes = MODEL.num_moe_layers * MODEL.expert_bytes
    assert found.slots * slot_bytes <= rest < (found.slots + 1) * slot_bytes
    text = without_links(answer(data))
    assert "25.8 GB (24.0 GiB)" in text
    assert f"room for {found.slots} slots a layer" in text
    hits = data.run.hit_curve["lru"]
    assert f"{100 * hits.hit_ratio_warm[hits.slots.index(45)]:.1f} % with 45" in text


@pytest.mark.parametrize(
    ("memory_bytes", "said"),
    [(80e9, "Every expert fits beside them"), (3e9, "No layer can have a slot of its own")],
)
def test_a_card_that_is_large_or_small_enough_to_settle_it(tmp_path, memory_bytes, said):
    assert said in answer(run_on(tmp_path, memory_bytes))


@pytest.mark.parametrize("model", [{"dtype": "float7"}, {"vocab_size": None}, {"num_layers": "24"}])
def test_a_model_that_says_too_little(tmp_path: Path, model):
    data = run_on(tmp_path, 24e9, **model)
    assert room(data) is None
    assert "that is a setting, not what fits" in answer(data)
