"""Published decode steps: what is read, what is predicted, and what the summaries say."""

from pathlib import Path

import pytest

from moejax.bench.outside import (
    EXPLANATIONS,
    TARGET_RATIO,
    explain_decode,
    predict_decode,
    read_decode,
    summarise_decode,
)
from moejax.cards import load_hardware, models_dir
from moejax.cost import served_step
from moejax.errors import BadFileError

FOLDER = models_dir() / "hardware" / "measurements"
STEPS = read_decode()
ROWS = predict_decode(STEPS)
SUMMARIES = summarise_decode(STEPS, ROWS)
BOX = "neurall README, rented box"
HEADER = (FOLDER / "decode.csv").read_text(encoding="utf-8").splitlines()[0]
CARD = (FOLDER / "decode.toml").read_text(encoding="utf-8")


def test_every_step_is_predicted_or_says_what_is_not_stated():
    assert len(ROWS) == len(STEPS) == 36
    for step, row in zip(STEPS, ROWS, strict=True):
        assert row.published_s == step.step_s
        if row.predicted_s is None:
            assert row.error_ratio is None
            assert row.remark == f"not predictable: the {step.not_stated} is not stated"
        else:
            assert row.predicted_s == pytest.approx(row.layers_s + row.experts_s + row.misses_s)
            assert row.error_ratio == pytest.approx(row.predicted_s / row.published_s - 1)
    assert sum(row.predicted_s is not None for row in ROWS) == 22


def test_files_have_the_sizes_that_their_source_prints():
    specs = {step.stored.spec for step in STEPS if step.stored is not None}
    assert len(specs) == 3
    original = next(spec for spec in specs if spec.dense_bits > 9 and "glm" in spec.name)
    assert original.routed_bytes == pytest.approx(102_222 * 2**20, rel=1e-7)
    embedding = original.vocab_size * original.hidden_size
    on_devices = original.stored_bytes(original.dense_params - embedding)
    assert on_devices == pytest.approx(9_165 * 2**20, rel=1e-7)


def test_a_prediction_is_that_of_the_profile_with_the_stated_memory():
    step, row = next(pair for pair in zip(STEPS, ROWS, strict=True) if pair[1].source == BOX)
    hardware = load_hardware("rtx-3090")
    shipped = served_step(hardware, step.stored.spec, step.hit_ratio, on_host=True)
    num_misses = step.stored.spec.num_moe_layers * 8 * (1 - step.hit_ratio)
    slower_s = num_misses * step.stored.spec.expert_bytes * (1 / 74e9 - 1 / 91.0966e9)
    assert row.predicted_s - shipped.step_s == pytest.approx(slower_s, rel=1e-3)


def test_layers_of_one_side_mix_the_steps_of_all_and_none():
    layers = [step for step in STEPS if step.misses == "host layers"]
    step = next(step for step in layers if step.hit_ratio is not None)
    (mixed,) = predict_decode([step])
    hits, misses = (
        predict_decode([step._replace(hit_ratio=ratio, misses="host")])[0].predicted_s
        for ratio in (1.0, 0.0)
    )
    assert mixed.predicted_s == pytest.approx(0.33 * hits + 0.67 * misses)


def test_the_line_through_a_source_is_the_one_that_it_states():
    box = next(found for found in SUMMARIES if found.source == BOX)
    intercept_s, slope_s = box.stated_law
    assert box.published_intercept_s == pytest.approx(intercept_s, rel=0.01)
    assert box.published_slope_s == pytest.approx(slope_s, rel=0.01)
    assert box.linear_ratio > 0.98


def test_lines_are_found_again():
    """Published steps that lie on a line, and predictions that do not move."""
    steps = [
        step._replace(step_s=0.02 + 0.05 * (1 - step.hit_ratio))
        for step in STEPS
        if step.rig.title == BOX
    ]
    (found,) = summarise_decode(steps, predict_decode(steps))
    assert found.published_intercept_s == pytest.approx(0.02)
    assert found.published_slope_s == pytest.approx(0.05)
    assert found.linear_ratio == pytest.approx(1)
    box = next(found for found in SUMMARIES if found.source == BOX)
    assert found.predicted_slope_s == pytest.approx(box.predicted_slope_s)


def test_a_missed_target_is_explained_and_a_met_one_is_not():
    for found in SUMMARIES:
        assert (found.is_met is False) == bool(found.explained)
        if found.is_met is not None:
            assert found.is_met == (found.median_error_ratio <= TARGET_RATIO)


def test_no_source_moves_without_an_explanation_and_two_terms_bring_all_within_the_target():
    found = {explanation.name: summaries for explanation, summaries in explain_decode(STEPS)}
    assert list(found) == [explanation.name for explanation in EXPLANATIONS]
    both = found["hand-off once and quantised kernels"]
    assert all(one.is_met for one in both if one.median_error_ratio is not None)
    for one in both:
        if one.published_slope_s is not None:
            for name in ("intercept", "slope"):
                ours, theirs = (getattr(one, f"{who}_{name}_s") for who in WHO)
                assert abs(ours / theirs - 1) < 0.15


WHO = ("predicted", "published")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("nobody,glm-3bit,a,0.5,host,512,20,,", "is not described"),
        ("neurall-box,nothing,a,0.5,host,512,20,,", "is not described"),
        ("neurall-box,glm-3bit,a,0.5,moon,512,20,,", "misses = 'moon'"),
        ("neurall-box,glm-3bit,a,1.5,host,512,20,,", "hit_ratio = '1.5'"),
        ("neurall-box,glm-3bit,a,x,host,512,20,,", "hit_ratio = 'x'"),
        ("neurall-box,glm-3bit,a,0.5,host,512,,,", "what is missing"),
        ("neurall-box,glm-3bit,a,,host,512,20,,", "what is missing"),
        ("neurall-box,glm-3bit,a,0.5,host,512,20,nothing,", "what is missing"),
    ],
)
def test_bad_rows_name_their_line(tmp_path: Path, row, problem):
    (tmp_path / "decode.toml").write_text(CARD, encoding="utf-8")
    (tmp_path / "decode.csv").write_text(f"{HEADER}\n{row}\n", encoding="utf-8")
    with pytest.raises(BadFileError, match="line 2") as caught:
        read_decode(tmp_path)
    assert problem in caught.value.cause


def test_a_source_without_its_memory_is_refused(tmp_path: Path):
    bad = CARD.replace("host_read_bytes_per_s = 74e9", "host_read_bytes_per_s = -1.0")
    (tmp_path / "decode.toml").write_text(bad, encoding="utf-8")
    (tmp_path / "decode.csv").write_text(f"{HEADER}\n", encoding="utf-8")
    with pytest.raises(BadFileError, match="host_read_bytes_per_s"):
        read_decode(tmp_path)
