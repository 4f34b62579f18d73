"""Fits of the copy law, with every third size held out and two baselines beside it."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Shaped
from scipy import stats

from moejax.errors import BadFileError

from ._fit import LogFit, fit_log_parameters
from ._uncertainty import INTERVAL_RATIO

# Two parameters, their errors, and at least three sizes left after holding out every third.
_MIN_SIZES_TO_HOLD_OUT = 5


class CopyFitRow(NamedTuple):
    """One size of a copy sweep: observed, predicted and what two baselines would have said.

    Attributes:
      num_bytes: Size of the copy.
      observed_s: Geometric mean of the measurements of this size.
      predicted_s: The fitted law.
      is_held_out: Whether the fit did not see this size.
      roofline_s: Datasheet bandwidth, no latency.
      two_point_s: latency + bandwidth through the smallest and the largest training size.
      interval_s: What 90 % of measurements of this size are to lie in, by the fit alone.
    """

    num_bytes: float
    observed_s: float
    predicted_s: float
    is_held_out: bool
    roofline_s: float
    two_point_s: float
    interval_s: tuple[float, float]

    @property
    def error_ratio(self) -> float:
        """Predicted over observed time, minus 1."""
        return self.predicted_s / self.observed_s - 1


class CopyFit(NamedTuple):
    """latency + bytes / bandwidth, fitted to one sweep.

    Attributes:
      latency_s: Time of a copy of no bytes.
      bytes_per_s: Bandwidth of a large copy.
      latency_standard_error_s: Of `latency_s`.
      bytes_per_s_standard_error: Of `bytes_per_s`.
      rows: One per size, ascending.
    """

    latency_s: float
    bytes_per_s: float
    latency_standard_error_s: float
    bytes_per_s_standard_error: float
    rows: tuple[CopyFitRow, ...]

    def predict_s(self, num_bytes: float) -> float:
        """The fitted law at one size."""
        return self.latency_s + num_bytes / self.bytes_per_s

    @property
    def held_out_error_ratios(self) -> np.ndarray:
        """Absolute relative errors at the sizes that the fit did not see."""
        return np.array([abs(row.error_ratio) for row in self.rows if row.is_held_out])

    @property
    def num_inside(self) -> int:
        """Sizes that the fit did not see and whose measurement lies in its interval."""
        return sum(
            row.interval_s[0] <= row.observed_s <= row.interval_s[1]
            for row in self.rows
            if row.is_held_out
        )


def fit_copy(
    num_bytes: Shaped[np.ndarray, " rows"],
    time_s: Shaped[np.ndarray, " rows"],
    *,
    roofline_bytes_per_s: float = 31.5e9,
) -> CopyFit:
    """Fits latency and bandwidth; from five sizes on, every third size is held out.

    Sizes are sorted; several measurements of one size count as one, their geometric mean. The
    third, sixth, ninth... size is held out, so the smallest one, which alone fixes the latency,
    is always in the fit.

    Args:
      num_bytes: Size of each measured copy.
      time_s: Its time.
      roofline_bytes_per_s: Datasheet bandwidth of the link for the baseline; PCIe 4.0 x16.

    Returns:
      The fit and its table.

    Raises:
      BadFileError: Fewer than three sizes, or a value that is not finite and positive.
    """
    sizes, observed_s, errors = _by_size(np.asarray(num_bytes, float), np.asarray(time_s, float))
    is_held_out = np.zeros(len(sizes), bool)
    if len(sizes) >= _MIN_SIZES_TO_HOLD_OUT:
        is_held_out[2::3] = True
    train, train_s = sizes[~is_held_out], observed_s[~is_held_out]
    initial = np.array([train_s.min(), (train / train_s).max()])
    fit = fit_log_parameters(_copy_law, initial, train[:, None], train_s, errors[~is_held_out])
    latency_s, bytes_per_s = (float(value) for value in fit.parameters)
    slope, intercept_s = np.polyfit(train[[0, -1]], train_s[[0, -1]], 1)
    rows = tuple(
        CopyFitRow(
            num_bytes=float(size),
            observed_s=float(seen_s),
            predicted_s=latency_s + float(size) / bytes_per_s,
            is_held_out=bool(held_out),
            roofline_s=float(size) / roofline_bytes_per_s,
            two_point_s=float(intercept_s + slope * size),
            interval_s=_interval(fit, float(size)),
        )
        for size, seen_s, held_out in zip(sizes, observed_s, is_held_out, strict=True)
    )
    latency_error_s, rate_error = (float(error) for error in fit.standard_errors)
    return CopyFit(latency_s, bytes_per_s, latency_error_s, rate_error, rows)


def _interval(fit: LogFit, num_bytes: float) -> tuple[float, float]:
    latency_s, bytes_per_s = fit.parameters
    predicted_s = latency_s + num_bytes / bytes_per_s
    # Slopes of the logarithm of the law in the logarithms of its parameters.
    slopes = np.array([latency_s, -num_bytes / bytes_per_s]) / predicted_s
    variance = slopes @ fit.log_covariance @ slopes + fit.spread_ratio**2
    tail = stats.t.ppf((1 + INTERVAL_RATIO) / 2, fit.num_degrees)
    factor = math.exp(tail * math.sqrt(variance))
    return float(predicted_s / factor), float(predicted_s * factor)


def _copy_law(
    parameters: Float[Array, "2"], inputs: Float[Array, "rows 1"]
) -> Float[Array, " rows"]:
    return parameters[0] + inputs[:, 0] / parameters[1]


def _by_size(
    num_bytes: np.ndarray, time_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, geometric mean time of each, and the standard error of its logarithm."""
    if num_bytes.shape != time_s.shape or num_bytes.ndim != 1:
        raise BadFileError(
            f"{num_bytes.shape} sizes do not match {time_s.shape} times", "Give a time per size."
        )
    is_bad = ~(np.isfinite(num_bytes) & np.isfinite(time_s) & (num_bytes > 0) & (time_s > 0))
    if is_bad.any():
        row = int(np.argmax(is_bad))
        raise BadFileError(
            f"copy measurement {row + 1} has {num_bytes[row]} bytes and {time_s[row]} s",
            "Both must be finite and positive; remove or repeat the measurement.",
        )
    sizes, place = np.unique(num_bytes, return_inverse=True)
    if len(sizes) < 3:
        raise BadFileError(
            f"copies of {len(sizes)} different sizes cannot determine latency and bandwidth",
            "Measure at least 3 sizes, from some kB to some MB; 5 let every third be held out.",
        )
    counts = np.bincount(place)
    log_means = np.bincount(place, weights=np.log(time_s)) / counts
    squares = np.bincount(place, weights=(np.log(time_s) - log_means[place]) ** 2)
    errors = np.sqrt(squares / np.maximum(counts - 1, 1) / counts)
    return sizes, np.exp(log_means), errors
