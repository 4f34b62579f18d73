import itertools

import numpy as np
import pytest

from moejax.report._palette import FAINT, LOOKS, contrast_ratio, look, text_colour

# Machado, Oliveira and Fernandes, 2009, full severity, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritan": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
WEB_CACHES = ("sieve", "s3fifo", "arc", "least_stale")
RGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)


def linear_rgb(colour: str) -> np.ndarray:
    shares = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = RGB_TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_apart_for_every_eye(vision: str):
    seen = [lab(VISION[vision] @ linear_rgb(one.colour)) for one in LOOKS.values()]

    def closest(colours) -> float:
        return min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2))

    assert closest(seen[: len(LOOKS) - len(WEB_CACHES)]) > 22
    assert closest(seen) > 17


@pytest.mark.parametrize("strategy", LOOKS)
def test_contrast_with_paper(strategy: str):
    assert contrast_ratio(look(strategy).colour) >= 3.0
    assert contrast_ratio(text_colour(strategy)) >= 4.5


def test_the_caches_of_the_web_come_last():
    assert tuple(LOOKS)[-len(WEB_CACHES) :] == WEB_CACHES


def test_contrast_of_known_colours():
    assert contrast_ratio("#000000") == pytest.approx(21.0)
    assert contrast_ratio("#FFFFFF") == pytest.approx(1.0)
    assert contrast_ratio(FAINT) >= 4.5


def test_no_two_strategies_share_a_shape():
    assert len({one.marker for one in LOOKS.values()}) == len(LOOKS)


def test_unknown_strategy_looks_the_same_every_time():
    assert look("pinned(lru, 0.3)") == look("pinned(lru, 0.3)")
    assert look("pinned(lru, 0.3)").marker not in {one.marker for one in LOOKS.values()}
