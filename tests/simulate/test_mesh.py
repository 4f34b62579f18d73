"""Lanes on several devices: forced parts of a CPU, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from moejax.errors import UsageError
from moejax.simulate import spread_over

COMPARE = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from moejax.bench import _grid, simulate_lanes
from moejax.cards import load_hardware, load_model
from moejax.cost import layer_clock
from moejax.simulate import Marks, ranks, replay, spread_over, stream
from moejax.strategies import always_admit, fifo, intelligent, lru, oracle

rng = np.random.default_rng(0)
model = load_model("tiny-moe")
layers, experts, topk = model.num_moe_layers, model.num_experts, model.num_experts_per_tok
clock = layer_clock(load_hardware("rtx-3090"), model, batch_size=1, context_tokens=8)
chosen = rng.random((6, 12, layers, experts)).argsort(-1)[..., :topk].astype(np.uint8)
lanes = [replay(lane, experts) for lane in chosen]
slots = np.full((6, layers), experts // 2, np.int32)
# What is put on devices on purpose may move; nothing else does.
jax.config.update("jax_transfer_guard_device_to_device", "disallow")
compile_lanes, programs = _grid._compile_lanes, []
def compile_and_keep(*arguments):
    programs.append(compile_lanes(*arguments))
    return programs[-1]
_grid._compile_lanes = compile_and_keep
found = {}
for count in (1, 2, 4):
    records = simulate_lanes(
        intelligent(), lanes, [clock] * 6, slots, seeds=range(6), topk=topk, num_devices=count
    )
    leaves = [np.asarray(leaf) for record in records for leaf in jax.tree.leaves(record)]
    found[count] = [leaf.tobytes().hex() for leaf in leaves]
alone, beside = stream(chosen[0], experts), stream(np.moveaxis(chosen[:4], 0, 1), experts)
key, keys = jax.random.key(0), jax.random.split(jax.random.key(0), 4)
marks = Marks(np.arange(12) > 2, np.arange(12) == 7)
ranked = []
for strategy in (lru(), oracle(), fifo(), always_admit(lru())):
    for source, one in ((alone, key), (beside, keys)):
        counts = [
            ranks(strategy, source, np.arange(7), one, topk=topk, marks=marks, num_devices=count)
            for count in (1, 2, 4)
        ]
        ranked += [
            bool((a == b).all()) and a.shape == b.shape
            for other in counts[1:]
            for a, b in zip(counts[0], other, strict=True)
        ]
placed = spread_over(4)(np.arange(8))
print(json.dumps({
    "is_same": [found[count] == found[1] for count in (2, 4)],
    "ranks_same": ranked,
    "num_hits": int(sum(record.num_hits.sum() for record in records)),
    "num_devices": len(placed.sharding.device_set),
    "words": [program.as_text().count("all-reduce") for program in programs],
}))
"""


def test_no_bit_depends_on_the_number_of_devices():
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["is_same"] == [True, True]
    assert found["ranks_same"] == [True] * 80
    assert found["num_hits"] > 0
    assert found["num_devices"] == 4
    # A loop that turns as often as the slowest lane needs would be a word between devices.
    assert found["words"] == [0, 0, 0]


@pytest.mark.parametrize("count", [0, 99])
def test_devices_that_are_not_there_are_refused(count):
    with pytest.raises(UsageError, match="are asked for, and there"):
        spread_over(count)
