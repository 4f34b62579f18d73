"""Experts dealt out among devices: forced parts of a CPU, in a process of its own."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.devices import team
from moejax.engine import OffloadEngine
from moejax.errors import UsageError
from moejax.strategies import lru

from . import _on_devices
from ._offloaded import WITH_A_GAP, take_apart

ROOT = Path(__file__).resolve().parents[2]
# Tiny programs take longer to make fast than to run.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@functools.cache
def found() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine._on_devices"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": XLA_FLAGS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [check.__name__ for check in _on_devices.CHECKS])
def test_several_devices(name):
    assert found()[name] == ""


def test_more_devices_than_there_are_are_refused_with_the_cure():
    with pytest.raises(UsageError, match=r"99 device.s. are asked for, and there are 1") as caught:
        team(99)
    assert "Use 1 to 1" in caught.value.hint


def test_one_strategy_or_one_for_each():
    model, store = take_apart(WITH_A_GAP)
    plan = _on_devices.SlotPlan("layer", (2, 2, 2))
    with pytest.raises(UsageError, match="2 strategies were given for 1 device"):
        OffloadEngine(model, store, plan, [lru(), lru()], kernels="xla")
