"""Hardware profiles: committed ones regenerate, measured ones are fitted."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from moejax.cards import HARDWARE, load_hardware, load_model, models_dir
from moejax.cost import estimate, fit_profile, format_profile, from_hardware
from moejax.errors import BadFileError

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_hardware.py"


def transfer(memory: str, num_bytes: float, time_s: float) -> dict:
    samples_s = [time_s, 0.99 * time_s, 1.01 * time_s]
    return {"kind": "transfer", "memory": memory, "num_bytes": num_bytes, "samples_s": samples_s}


def transfers(memory: str, latency_s: float, bytes_per_s: float) -> list[dict]:
    sizes = (4096, 65536, 2**20, 2**24, 2**26)
    return [transfer(memory, size, latency_s + size / bytes_per_s) for size in sizes]


def computes(fixed_s: float, bytes_per_s: float, flops: float, tokens=(1, 8, 64, 512, 4096)):
    num_bytes, token_flops = 4 * 17301504, 17301504
    return [
        {
            "kind": "compute",
            "num_tokens": count,
            "num_experts": 4,
            "num_bytes": num_bytes,
            "num_flops": count * token_flops,
            "samples_s": [
                fixed_s
                + ((num_bytes / bytes_per_s) ** 8 + (count * token_flops / flops) ** 8) ** 0.125
            ],
        }
        for count in tokens
    ] + [
        {
            "kind": "compute",
            "num_tokens": 1,
            "num_experts": 1,
            "num_bytes": num_bytes / 1000,
            "num_flops": token_flops / 1000,
            "samples_s": [fixed_s + num_bytes / 1000 / bytes_per_s],
        }
    ]


def test_committed_profiles_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert {name for name in written if name.endswith(".toml")} == {f"{n}.toml" for n in HARDWARE}
    for name, text in written.items():
        assert (models_dir() / "hardware" / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("name", HARDWARE)
def test_every_profile_has_every_constant_with_a_source(name):
    hardware = load_hardware(name)
    values = from_hardware(hardware)._asdict()
    # What only an engine's steps tell is neutral: nothing more for a batch, prefetches hidden.
    neutral = {"batched_layer_s": 0.0, "prefetch_overlap_ratio": 1.0}
    assert all(
        value == neutral[name] if name in neutral else value > 0 for name, value in values.items()
    )
    assert all(constant.source for constant in hardware.constants.values())
    assert 0 < hardware.value("overlap_ratio") <= 1


def test_the_rtx_3090_profile_says_what_it_is_and_keeps_the_anchors():
    hardware = load_hardware("rtx-3090")
    assert "fitted to published third-party RTX 3090 measurements" in hardware.title
    assert hardware.kinds["pinned_h2d_bytes_per_s"] == "fitted"
    assert hardware.constants["copy_latency_s"].standard_error > 0
    np.testing.assert_allclose(hardware.value("pinned_h2d_bytes_per_s"), 25.3e9, rtol=0.01)
    np.testing.assert_allclose(hardware.value("pageable_h2d_bytes_per_s"), 14.1e9, rtol=0.01)
    np.testing.assert_allclose(hardware.value("nvme_bytes_per_s"), 7.1e9, rtol=0.01)
    assert 831e9 <= hardware.value("vram_bytes_per_s") <= 839e9
    assert 75.5e12 <= hardware.value("matmul_flops") <= 76.7e12
    loaded = hardware.value("contention_ratio") * hardware.value("pinned_h2d_bytes_per_s")
    assert 14.5e9 <= loaded <= 15e9


def test_the_h100_profile_gives_back_the_steps_it_was_measured_with():
    result = estimate(load_hardware("h100"), load_model("qwen1.5-moe-a2.7b"), context_tokens=64)
    np.testing.assert_allclose(result.all_hit_step_s, 2.11e-3, rtol=0.02)
    np.testing.assert_allclose(result.all_miss_step_s, 34.63e-3, rtol=0.02)


def test_a_profile_survives_being_written_and_read(tmp_path):
    hardware = load_hardware("rtx-3090")
    path = tmp_path / "copy.toml"
    path.write_text(format_profile(hardware, header="two\nlines"), encoding="utf-8")
    again = load_hardware(path)
    assert again == hardware
    assert path.read_text(encoding="utf-8").startswith("# two\n# lines\n")


def test_bench_measurements_are_recovered_with_small_errors():
    hardware = fit_profile(
        [
            *transfers("pinned", 8e-6, 20e9),
            *transfers("pageable", 2e-5, 10e9),
            *transfers("host", 1e-6, 30e9),
            *computes(3e-5, 5e11, 4e13),
        ]
    )
    expected = {
        "copy_latency_s": 8e-6,
        "pinned_h2d_bytes_per_s": 20e9,
        "pageable_latency_s": 2e-5,
        "pageable_h2d_bytes_per_s": 10e9,
        "host_copy_bytes_per_s": 30e9,
        "layer_fixed_s": 3e-5,
        "vram_bytes_per_s": 5e11,
        "matmul_flops": 4e13,
    }
    for name, value in expected.items():
        constant = hardware.constants[name]
        np.testing.assert_allclose(constant.value, value, rtol=1e-3, err_msg=name)
        assert constant.kind == "fitted"
        assert constant.standard_error < 0.01 * value
    assert hardware.value("kernel_efficiency_ratio") == 1.0
    assert hardware.constants["nvme_bytes_per_s"].kind == "assumed"
    assert hardware.constants["nvme_bytes_per_s"].standard_error is None


def test_without_an_accelerator_host_copies_stand_for_the_link():
    hardware = fit_profile(transfers("host", 2e-6, 12e9))
    for name in ("pinned_h2d_bytes_per_s", "pageable_h2d_bytes_per_s", "host_copy_bytes_per_s"):
        np.testing.assert_allclose(hardware.value(name), 12e9, rtol=1e-4)
    assert hardware.kinds["vram_bytes_per_s"] == "assumed"
    assert "no accelerator" in hardware.constants["copy_latency_s"].source


def test_a_peak_that_no_measurement_reaches_is_not_claimed():
    base = load_hardware("rtx-3090")
    few_tokens = computes(3e-5, 5e11, 4e17, tokens=(1, 2, 3, 4, 5))
    hardware = fit_profile(few_tokens, base=base)
    np.testing.assert_allclose(hardware.value("vram_bytes_per_s"), 5e11, rtol=1e-3)
    assert hardware.kinds["matmul_flops"] == "assumed"
    assert hardware.value("matmul_flops") == base.value("matmul_flops")
    assert "do not determine" in hardware.constants["matmul_flops"].source


@pytest.mark.parametrize(
    ("measurements", "match"),
    [
        ([], "no measurement to fit"),
        ([{"kind": "transfer", "memory": "tape"}], "kind 'transfer' and memory 'tape'"),
        ([{}], "kind None"),
        (transfers("pinned", 1e-5, 1e9)[:2], "2 different sizes"),
        ([transfer("pinned", 4096, float("nan"))], "finite positive"),
        ([transfer("pinned", 4096, 0.0)], "finite positive"),
        ([transfer("pinned", -1, 1.0)], "num_bytes = -1"),
        ([transfer("pinned", None, 1.0)], "num_bytes = None"),
        ([transfer("pinned", 4096, 1.0) | {"samples_s": []}], "no samples_s"),
        ([transfer("pinned", 4096, 1.0) | {"samples_s": "abc"}], "no samples_s"),
        (computes(1e-5, 1e11, 1e12)[:3], "3 measurements cannot determine 3"),
    ],
)
def test_unusable_measurements_are_refused(measurements, match):
    with pytest.raises(BadFileError, match=match):
        fit_profile(measurements)
