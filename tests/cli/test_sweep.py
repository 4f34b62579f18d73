"""`moejax sweep`: shards, resuming, devices, and processes that share a job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.bench import Shard, SweepSettings, shards_of
from moejax.cli._app import main

# A width each, so that every shard compiles and takes a while.
LONG_SIZES = range(1, 25)


def words(text):
    return f"sweep --workload uniform --num-steps 24 {text}".split()


SMALL = words("--strategy lru,fifo --slots 8,16 --seeds 2")
LONG = words(f"--strategy lru --slots 8 --batch-sizes {','.join(map(str, LONG_SIZES))}")


def records(folder: Path):
    return json.loads((folder / "results.json").read_text())["records"]


def start(arguments, folder, *more):
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "moejax", *arguments, "--out", str(folder), *more],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def team(arguments, folder):
    """Two processes of one job, process 0 first."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    job = ("--coordinator", address, "--num-processes", "2", "--process-id")
    return [start(arguments, folder, *job, number) for number in ("0", "1")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process on one device counts."""
    folder = tmp_path_factory.mktemp("alone") / "sweep"
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


def test_every_strategy_batch_size_and_group_of_seeds_is_a_shard():
    settings = SweepSettings(("lru", "lfu"), (1, 4), 10, (8,), 32, seed=5)
    shards = shards_of(settings)
    assert len(shards) == 2 * 2 * 2
    assert shards[0] == Shard(0, "lru", 1, tuple(range(5, 13)))
    assert shards[1] == Shard(1, "lru", 1, (13, 14))
    assert len({shard.file_name for shard in shards}) == len(shards)


def test_one_record_a_strategy_seed_and_capacity(alone):
    found = records(alone)
    assert [(row["strategy"], row["seed"], row["slots"]) for row in found] == [
        (name, seed, slots) for name in ("lru", "fifo") for seed in (0, 1) for slots in (8, 16)
    ]
    assert all(row["num_hits"] + row["num_loads"] == 24 * 24 * 4 for row in found)
    assert found[0]["num_hits"] != found[2]["num_hits"]


def test_finished_shards_are_used_and_damaged_ones_made_again(alone, tmp_path, capsys):
    folder = tmp_path / "sweep"
    (folder / "shards").mkdir(parents=True)
    (folder / "sweep.json").write_bytes((alone / "sweep.json").read_bytes())
    first, second = sorted((alone / "shards").glob("*.json"))
    (folder / "shards" / first.name).write_bytes(first.read_bytes())
    (folder / "shards" / second.name).write_text(second.read_text()[:100])
    assert main([*SMALL, "--out", str(folder)]) == 2
    assert "holds finished shards" in capsys.readouterr().err
    assert main([*SMALL, "--out", str(folder), "--resume", "-o", "json"]) == 0
    printed = capsys.readouterr()
    assert "1 of 2 shards of this process were there already" in printed.err
    assert json.loads(printed.out) == records(folder) == records(alone)


def test_another_sweep_is_not_gone_on_with(alone, capsys):
    assert main([*SMALL, "--seed", "1", "--out", str(alone), "--resume"]) == 2
    assert "holds another sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (["--depths", "1"], "scale the times of --hardware"),
        (["--process-id", "1"], "need --coordinator"),
        (["--slots", "61"], "exceeds the 60 experts"),
        (["--strategy", "gate_look"], "next gates"),
        (["--hardware", "rtx-3090", "--link-scales", "0"], "out of range"),
        (["--hardware", "rtx-3090", "--link-scales", "1,x"], "not a list of numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(more, cause, tmp_path, capsys):
    assert main([*SMALL, *more, "--out", str(tmp_path / "sweep")]) == 2
    assert cause in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_times_are_of_every_scale_and_depth(tmp_path):
    points = "--link-scales 0.5,1 --compute-scales 1,4 --depths 0,2"
    arguments = words(f"--strategy lru --slots 30 --hardware rtx-3090 {points}")
    assert main([*arguments, "--out", str(tmp_path / "sweep")]) == 0
    found = records(tmp_path / "sweep")
    assert len(found) == 2 * 2 * 2
    by_point = {(r["link_scale"], r["compute_scale"], r["depth"]): r for r in found}
    slow, fast = by_point[0.5, 1, 0], by_point[1, 4, 0]
    assert slow["compute_s"] == pytest.approx(4 * fast["compute_s"])
    assert slow["transfer_s"] == pytest.approx(2 * fast["transfer_s"])
    assert len({row["num_hits"] for row in found}) == 1


def test_devices_and_processes_count_what_one_counts(alone, tmp_path):
    on_devices = start(SMALL, tmp_path / "devices", "--devices", "8")
    _, said = on_devices.communicate(timeout=120)
    assert on_devices.returncode == 0, said
    together = team(SMALL, tmp_path / "together")
    printed = [process.communicate(timeout=120) for process in together]
    assert [process.returncode for process in together] == [0, 0], printed
    assert records(tmp_path / "devices") == records(tmp_path / "together") == records(alone)
    assert "lru" in printed[0][0]
    assert printed[1][0] == ""


def test_a_killed_process_ends_the_job_and_its_shards_stand(tmp_path):
    folder = tmp_path / "sweep"
    survivor, victim = team(LONG, folder)
    until = time.monotonic() + 90
    while len(list((folder / "shards").glob("*.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    victim.communicate(timeout=60)
    _, said = survivor.communicate(timeout=60)
    assert time.monotonic() - killed_s < 60
    assert survivor.returncode == 5
    assert "error: process 1 of 2 stopped answering" in said
    assert "--resume" in said
    num_done = len(list((folder / "shards").glob("*.json")))
    assert 3 <= num_done < len(LONG_SIZES)
    assert main([*LONG, "--out", str(folder), "--resume"]) == 0
    assert [row["batch_size"] for row in records(folder)] == list(LONG_SIZES)
