"""Hardware profiles: what loads, and what is refused."""

import json
from dataclasses import asdict

import pytest

from moejax.cards import CONSTANT_NAMES, HARDWARE, KINDS, load_hardware
from moejax.errors import BadFileError, UsageError

_PROFILE = """
name = "toy"
title = "A toy"
source = "made up for this test"

[constants.vram_bytes]
value = 8_000_000_000
unit = "B"
kind = "datasheet"
source = "box"

[constants.copy_latency_s]
value = 1e-5
unit = "s"
kind = "fitted"
standard_error = 2e-7
source = "fit"

[constants.overlap_ratio]
value = 0
unit = "1"
kind = "assumed"
source = "worst case"
"""


def test_profile_loads(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(_PROFILE)
    hardware = load_hardware(path)
    assert hardware.value("vram_bytes") == 8e9
    assert hardware.value("overlap_ratio") == 0
    assert hardware.constants["copy_latency_s"].standard_error == 2e-7
    assert hardware.constants["vram_bytes"].standard_error is None
    assert hardware.kinds == {
        "vram_bytes": "datasheet",
        "copy_latency_s": "fitted",
        "overlap_ratio": "assumed",
    }
    with pytest.raises(BadFileError, match="nvme_bytes_per_s"):
        hardware.value("nvme_bytes_per_s")


def test_json_is_the_same_profile(tmp_path):
    toml, as_json = tmp_path / "toy.toml", tmp_path / "toy.json"
    toml.write_text(_PROFILE)
    as_json.write_text(json.dumps(asdict(load_hardware(toml))))
    assert load_hardware(as_json) == load_hardware(toml)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_profile_loads(name):
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware.title
    assert set(hardware.constants) <= set(CONSTANT_NAMES)
    assert set(hardware.kinds.values()) <= set(KINDS)
    assert all(constant.source for constant in hardware.constants.values())


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("8_000_000_000", "-8.0", "-8"),
        ("8_000_000_000", "0", "positive"),
        ("8_000_000_000", "nan", "finite"),
        ("8_000_000_000", "inf", "finite"),
        ("8_000_000_000", "1" + "0" * 400, "finite"),
        ("8_000_000_000", "true", "True"),
        ("8_000_000_000", '"8 GB"', "8 GB"),
        ("vram_bytes", "vram_byte", "vram_byte"),
        ('"datasheet"', '"guessed"', "guessed"),
        ('source = "box"', "", "source"),
        ("standard_error = 2e-7", "standard_error = -1", "standard_error"),
        ("value = 0", "value = 1.5", "ratio"),
        ('title = "A toy"', "title = 3", "title"),
        ('name = "toy"', "constants = 3", "read"),
    ],
)
def test_bad_profile(tmp_path, old, new, named):
    path = tmp_path / "toy.toml"
    assert old in _PROFILE
    path.write_text(_PROFILE.replace(old, new))
    with pytest.raises(BadFileError, match=named):
        load_hardware(path)


def test_empty_profile(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text('name = "toy"')
    with pytest.raises(BadFileError, match="constants"):
        load_hardware(path)


def test_unknown_profile():
    with pytest.raises(UsageError, match="rtx-309O"):
        load_hardware("rtx-309O")
    with pytest.raises(BadFileError, match="not a file"):
        load_hardware("no/such.toml")
