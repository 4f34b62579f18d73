"""What more devices buy: the script on forced parts of a CPU, and parts that fail."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.results import read_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_devices
import devices_sweep

ROOT = Path(__file__).resolve().parents[2]

TINY = """
import sys
sys.path.insert(0, "scripts")
import bench_devices, devices_sweep
devices_sweep.WIDE = devices_sweep.Geometry(2, 8, 300, 3)
devices_sweep.CLOCKED_MODEL, devices_sweep.CLOCKED_STEPS = "tiny-moe", 6
devices_sweep.CLOCKED.pop("intelligent")
devices_sweep.make_strategies = lambda profile: {"lru": devices_sweep.lru()}
sys.exit(bench_devices.main(sys.argv[1:]))
"""


def test_devices_share_the_work_and_change_no_bit(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-c", TINY, "--devices", "1,2,8", "--lanes", "8", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--out", str(out), "--parts", "sweep,timeline"],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, "on 8: first call" in done.stderr) == ("", True)
    results = read_json(out)
    assert (results["failed"], results["device_counts"]) == ({}, [1, 2, 8])
    assert results["environment"]["num_devices"] == 8
    for part in ("sweep", "timeline"):
        records = results[part]
        points = [(one["strategy"], one["num_devices"]) for one in records]
        assert points == [(name, count) for name in ("lru", "all") for count in (1, 2, 8)]
        for one in records:
            assert one["is_identical"]
            assert len(one["run_s"]["samples"]) == 2
            assert min(one["first_call_s"], *one["run_s"]["samples"], one["speedup_ratio"]) > 0
        assert [one["speedup_ratio"] for one in records[::3]] == [1.0, 1.0]


def test_another_bit_is_seen():
    found = {1: np.arange(6), 2: np.arange(6) + np.eye(1, 6, 3, dtype=int)[0]}
    first, second = devices_sweep.compare("lru", {"num_lanes": 2}, found.get, [1, 2], 1)
    assert (first["is_identical"], second["is_identical"]) == (True, False)
    assert devices_sweep.digest(np.arange(6)) != devices_sweep.digest(np.arange(6).reshape(2, 3))


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"

    def fail(_):
        raise RuntimeError("no room")

    parts = {"broken": fail, "whole": lambda options: [{"num_devices": options.devices[0]}]}
    monkeypatch.setattr(bench_devices, "PARTS", parts)
    assert bench_devices.main(["--out", str(out), "--devices", "1", "--parts", "broken,whole"]) == 1
    results = read_json(out)
    assert results["failed"] == {"broken": "RuntimeError: no room"}
    assert "broken" not in results
    assert results["whole"] == [{"num_devices": 1}]
    assert "no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--parts", "swep"], "swep unknown"),
        (["--devices", "999", "--lanes", "999"], "--devices 999: there are"),
        (["--devices", "0"], "below 1"),
        (["--devices", "1", "--lanes", "0"], "below 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(tmp_path, capsys, arguments, cause):
    out = tmp_path / "results.json"
    assert bench_devices.main(["--out", str(out), "--devices", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert cause in error
    assert not out.exists()
