"""Fits of laws: parameters recovered, errors honest, bad input refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cards import models_dir
from moejax.cost import fit_copy, fit_csv, fit_log_parameters, format_fit, read_transfers
from moejax.errors import BadFileError

SIZES = 4096.0 * 4.0 ** np.arange(9)
TRANSFERS = models_dir() / "hardware" / "measurements" / "transfer.csv"


def copy_times_s(latency_s: float, bytes_per_s: float, noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (latency_s + SIZES / bytes_per_s) * np.exp(noise * rng.standard_normal(len(SIZES)))


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(5e-6, 25e9), (2e-5, 3e9), (1e-6, 400e9)])
def test_recovers_the_law_it_was_given(latency_s, bytes_per_s):
    fit = fit_copy(SIZES, copy_times_s(latency_s, bytes_per_s))
    np.testing.assert_allclose(fit.latency_s, latency_s, rtol=1e-6)
    np.testing.assert_allclose(fit.bytes_per_s, bytes_per_s, rtol=1e-6)
    assert fit.held_out_error_ratios.max() < 1e-6


def test_standard_errors_cover_the_truth_under_noise():
    fit = fit_copy(SIZES, copy_times_s(5e-6, 25e9, noise=0.03))
    assert abs(fit.latency_s - 5e-6) < 3 * fit.latency_standard_error_s < 5e-6
    assert abs(fit.bytes_per_s - 25e9) < 3 * fit.bytes_per_s_standard_error < 25e9


def test_disagreeing_measurements_of_one_size_widen_the_errors_and_leave_the_fit():
    times_s = copy_times_s(5e-6, 25e9)
    plain = fit_copy(SIZES, times_s)
    sizes = np.append(SIZES, SIZES[0])
    spread = fit_copy(
        sizes, np.append(times_s, times_s[0] * 1.5) * np.where(sizes == 4096, 1.5**-0.5, 1)
    )
    np.testing.assert_allclose(spread.latency_s, plain.latency_s, rtol=0.01)
    assert spread.latency_standard_error_s > 0.1 * spread.latency_s


def test_holds_out_every_third_size_and_never_the_smallest():
    rows = fit_copy(SIZES[::-1], copy_times_s(5e-6, 25e9)[::-1]).rows
    assert [row.num_bytes for row in rows] == list(SIZES)
    assert [row.is_held_out for row in rows] == [False, False, True] * 3


def test_four_sizes_are_all_fitted():
    assert not any(
        row.is_held_out for row in fit_copy(SIZES[:4], copy_times_s(5e-6, 25e9)[:4]).rows
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_refuses_times_and_sizes_that_are_none(bad):
    times_s = copy_times_s(5e-6, 25e9)
    with pytest.raises(BadFileError, match="copy measurement 5"):
        fit_copy(SIZES, np.where(np.arange(9) == 4, bad, times_s))
    with pytest.raises(BadFileError, match="copy measurement 5"):
        fit_copy(np.where(np.arange(9) == 4, bad, SIZES), times_s)


def test_refuses_two_sizes():
    sizes = np.array([4096.0, 4096.0, 8192.0])
    with pytest.raises(BadFileError, match="2 different sizes"):
        fit_copy(sizes, sizes / 25e9)


def test_a_parameter_that_no_row_sees_has_no_finite_error():
    def law(parameters, inputs):
        return inputs[:, 0] * parameters[0] + 0.0 * parameters[1]

    inputs = np.arange(1.0, 6.0)[:, None]
    fit = fit_log_parameters(law, np.ones(2), inputs, 3.0 * inputs[:, 0])
    np.testing.assert_allclose(fit.parameters[0], 3.0, rtol=1e-9)
    assert fit.standard_errors[0] < 1e-6
    assert np.isinf(fit.standard_errors[1])


def test_a_law_that_cannot_describe_the_rows_is_refused():
    def law(parameters, inputs):
        return inputs[:, 0] * parameters[0] - 1e9

    with pytest.raises(BadFileError, match="does not describe"):
        fit_log_parameters(law, np.ones(1), np.ones((3, 1)), np.ones(3))


def test_fits_in_float64_without_changing_the_precision_of_the_program():
    fit_copy(SIZES, copy_times_s(5e-6, 25e9))
    assert not jax.config.read("jax_enable_x64")
    assert jnp.ones(1).dtype == jnp.float32


def test_published_rtx_3090_copies_are_predicted_at_held_out_sizes():
    fit = fit_csv(TRANSFERS, gpu="RTX 3090")
    assert (fit.rig, fit.time_domain) == ("Sidecar", "device")
    errors = fit.copy.held_out_error_ratios
    assert len(fit.copy.rows) == 9
    assert len(errors) == 3
    assert errors.max() < 0.10
    assert np.median(errors) < 0.05
    assert 25.2e9 < fit.copy.bytes_per_s < 25.6e9
    assert 4.1e-6 < fit.copy.latency_s < 7.4e-6
    roofline = [
        abs(row.roofline_s / row.observed_s - 1) for row in fit.copy.rows if row.is_held_out
    ]
    assert min(roofline) > errors.max()


def test_other_rigs_are_checks_and_not_pooled():
    fit = fit_csv(TRANSFERS, gpu="RTX 3090")
    idle = [check for check in fit.checks if "idle host" in check.row.note]
    assert len(idle) == 1
    assert abs(idle[0].error_ratio) < 0.01
    loaded = [check for check in fit.checks if "loads DRAM" in check.row.note]
    assert loaded[0].error_ratio > 0.5
    assert {check.row.gpu for check in fit.checks} == {"RTX 3090"}


def test_fitted_constants_replace_those_of_the_base():
    fit = fit_csv(TRANSFERS, gpu="RTX 3090")
    assert fit.hardware.name == "rtx-3090"
    assert fit.hardware.kinds["copy_latency_s"] == "fitted"
    assert fit.hardware.kinds["overlap_ratio"] == "derived"
    assert fit.hardware.value("pinned_h2d_bytes_per_s") == fit.copy.bytes_per_s


def test_the_table_shows_held_out_sizes_baselines_and_checks(tmp_path):
    text = format_fit(fit_csv(TRANSFERS, gpu="RTX 3090"), title="Some title")
    assert text.startswith("# Some title\n")
    assert text.count("| yes |") == 3
    assert "| baseline: datasheet bandwidth, no latency | 19.7 % | 25.2 % |" in text
    assert "| moetier | pinned | not given | unstated | 25.5 |" in text
    rows = [f"x,h2d,pinned,{size:.0f},{1e-5 + size / 50e9},,here," for size in SIZES[:4]]
    short = format_fit(fit_csv(write_csv(tmp_path, *rows)))
    assert short.startswith("# Copy law of x\n")
    assert "Too few sizes to hold any out." in short
    assert "Outside checks" not in short


HEADER = "gpu,direction,host_memory,bytes,seconds,gb_per_s,source,note\n"


def write_csv(tmp_path, *rows: str, header: str = HEADER):
    path = tmp_path / "copies.csv"
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


def test_another_card_borrows_the_rest_and_marks_it_assumed(tmp_path):
    rows = [f"RTX 9000,h2d,pinned,{size:.0f},{1e-5 + size / 50e9},,here," for size in SIZES]
    fit = fit_csv(write_csv(tmp_path, *rows))
    assert fit.hardware.name == "rtx-9000"
    np.testing.assert_allclose(fit.hardware.value("copy_latency_s"), 1e-5, rtol=1e-4)
    kinds = fit.hardware.kinds
    assert {kinds.pop("copy_latency_s"), kinds.pop("pinned_h2d_bytes_per_s")} == {"fitted"}
    assert set(kinds.values()) == {"assumed"}


def test_words_of_a_note_tell_time_domain_and_number_of_copies(tmp_path):
    path = write_csv(
        tmp_path,
        "x,h2d,pinned,4096,1e-5,,a/b c,time domain: host API call",
        'x,h2d,pinned,8192,2e-5,,a/b c,"2 copies of 4096 bytes, synchronised after each copy"',
        "x,h2d,pinned,134217728,5.3e-3,,a/b c,16 x 8 MiB; device (CUDA event) time",
        "x,h2d,pinned,1000,,2,a/b c,",
        "x,h2d,pinned,,,,a/b c,",
    )
    rows = read_transfers(path)
    assert [row.time_domain for row in rows] == ["host_call", "end_to_end", "device", "device"]
    assert [row.num_bytes for row in rows] == [4096, 4096, 8388608, 1000]
    np.testing.assert_allclose([row.time_s for row in rows], [1e-5, 1e-5, 5.3e-3 / 16, 5e-7])
    assert {row.rig for row in rows} == {"a/b"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no column"),
        ("a,b\n1,2\n", "no column direction"),
        (HEADER, "holds no copy"),
        (HEADER + "x,h2d,pinned,4096,nan,,s,n\n", "line 2: seconds = 'nan'"),
        (HEADER + "x,h2d,pinned,4096,0,,s,n\n", "line 2: seconds = '0'"),
        (HEADER + "x,h2d,pinned,-4096,1,,s,n\n", "bytes = '-4096'"),
        (HEADER + "x,h2d,pinned,many,1,,s,n\n", "bytes = 'many'"),
        (HEADER + "x,h2d,pinned\n", "not as many fields"),
        (HEADER + "x,h2d,pinned,4096,1,,s,n,more\n", "not as many fields"),
        (HEADER + "x,d2h,pinned,4096,1,,s,n\n", "no copy from pinned memory"),
        (HEADER + "x,h2d,pinned,4096,1e-5,,s,n\n", "1 different sizes"),
    ],
)
def test_unusable_files_are_refused_with_the_place(tmp_path, text, match):
    path = tmp_path / "copies.csv"
    path.write_text(text)
    with pytest.raises(BadFileError, match=match):
        fit_csv(path)


def test_missing_binary_and_folder_are_refused(tmp_path):
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "none.csv", tmp_path, binary):
        with pytest.raises(BadFileError):
            fit_csv(path)
