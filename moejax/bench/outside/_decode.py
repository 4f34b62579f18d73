"""Published decode steps as the cost model has them, and the law of step time against misses."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moejax.cards import Constant, Hardware, ModelSpec, load_hardware
from moejax.cost import ServedStep, served_step

from ._published import PublishedStep, Rig

TARGET_RATIO = 0.15
"""Largest median error of a source that counts as met."""

Adjust = Callable[[Hardware, PublishedStep], Hardware]


class DecodeRow(NamedTuple):
    """One published step and ours.

    Attributes:
      source: Title of the source.
      model: Model card.
      test: The source's name of the run.
      hit_ratio: As stated; None where it is not.
      published_s: Seconds a token.
      predicted_s: Ours; None where something needed is not stated.
      error_ratio: Predicted over published, minus 1.
      layers_s: Attention, shared experts, head and fixed costs of the prediction.
      experts_s: Its routed experts on the device.
      misses_s: Its waiting for misses, less what is hidden.
      remark: What is assumed; or why there is no prediction.
    """

    source: str
    model: str | None
    test: str
    hit_ratio: float | None
    published_s: float
    predicted_s: float | None
    error_ratio: float | None
    layers_s: float | None
    experts_s: float | None
    misses_s: float | None
    remark: str


class DecodeSummary(NamedTuple):
    """The errors of one source, and its linear law beside ours.

    Attributes:
      source: Title of the source.
      num_rows: Published steps.
      num_predicted: Those that can be predicted.
      median_error_ratio: Median absolute error; None without a prediction.
      worst_error_ratio: Largest one.
      bias_ratio: Median error with its sign.
      is_met: Whether the median is at most `TARGET_RATIO`.
      published_intercept_s: Step time without misses, by least squares over its cached steps.
      predicted_intercept_s: The same over our predictions of those steps.
      published_slope_s: What the step grows by from no miss to all missed.
      predicted_slope_s: Ours.
      linear_ratio: Share of the variance of the published steps that its line explains.
      stated_law: Intercept and slope as the source states them, in seconds.
      explained: Why the target is missed; empty where it is met.
    """

    source: str
    num_rows: int
    num_predicted: int
    median_error_ratio: float | None
    worst_error_ratio: float | None
    bias_ratio: float | None
    is_met: bool | None
    published_intercept_s: float | None
    predicted_intercept_s: float | None
    published_slope_s: float | None
    predicted_slope_s: float | None
    linear_ratio: float | None
    stated_law: tuple[float, float] | None
    explained: str


def predict_decode(steps: Iterable[PublishedStep], adjust: Adjust | None = None) -> list[DecodeRow]:
    """Predicts every step that states what that needs.

    Args:
      steps: What `read_decode` gives.
      adjust: Changes the hardware for a step, to try an explanation of its error.

    Raises:
      BadFileError: A profile lacks a constant.
    """
    return [_predict(step, adjust) for step in steps]


def summarise_decode(
    steps: Sequence[PublishedStep], rows: Sequence[DecodeRow]
) -> list[DecodeSummary]:
    """A summary for each source, in the order in which they come."""
    rigs = dict.fromkeys(step.rig for step in steps)
    pairs = list(zip(steps, rows, strict=True))
    return [_summary(rig, [pair for pair in pairs if pair[0].rig == rig]) for rig in rigs]


def _predict(step: PublishedStep, adjust: Adjust | None) -> DecodeRow:
    row = DecodeRow(
        source=step.rig.title,
        model=None if step.stored is None else step.stored.spec.name,
        test=step.test,
        hit_ratio=step.hit_ratio,
        published_s=step.step_s,
        predicted_s=None,
        error_ratio=None,
        layers_s=None,
        experts_s=None,
        misses_s=None,
        remark=f"not predictable: the {step.not_stated} is not stated",
    )
    if step.stored is None or step.hit_ratio is None or step.context_tokens is None:
        return row
    hardware = _hardware_of(step.rig)
    if adjust is not None:
        hardware = adjust(hardware, step)
    served = _served(hardware, step, step.stored.spec, step.hit_ratio, step.context_tokens)
    return row._replace(
        predicted_s=served.step_s,
        error_ratio=served.step_s / step.step_s - 1,
        layers_s=served.layers_s,
        experts_s=served.experts_s,
        misses_s=served.misses_s,
        remark=step.assumption,
    )


def _served(
    hardware: Hardware, step: PublishedStep, spec: ModelSpec, hit_ratio: float, context_tokens: int
) -> ServedStep:
    def served(hit_ratio: float) -> ServedStep:
        on_host = step.misses != "link"
        return served_step(
            hardware, spec, hit_ratio, on_host=on_host, context_tokens=context_tokens
        )

    if step.misses != "host layers":
        return served(hit_ratio)
    # A layer has all of its experts on one side.
    hits, misses = served(1.0), served(0.0)
    return ServedStep(
        *(hit_ratio * a + (1 - hit_ratio) * b for a, b in zip(hits, misses, strict=True))
    )


def _hardware_of(rig: Rig) -> Hardware:
    """The profile of the card, with what the source states about its host."""
    hardware = load_hardware(rig.profile)
    stated = Constant(rig.host_read_bytes_per_s, "B/s", "measured", None, rig.source)
    constants = {**hardware.constants, "host_read_bytes_per_s": stated}
    return dataclasses.replace(hardware, constants=constants)


def _summary(rig: Rig, pairs: Sequence[tuple[PublishedStep, DecodeRow]]) -> DecodeSummary:
    errors = [row.error_ratio for _, row in pairs if row.error_ratio is not None]
    median = statistics.median(map(abs, errors)) if errors else None
    cached = [
        (1 - step.hit_ratio, step.step_s, row.predicted_s)
        for step, row in pairs
        if step.hit_ratio is not None and row.predicted_s is not None and step.misses == "host"
    ]
    published = predicted = linear_ratio = None
    if len({miss_ratio for miss_ratio, *_ in cached}) > 1:
        misses, published_s, predicted_s = np.array(cached).T
        published, predicted = (_line(misses, steps_s) for steps_s in (published_s, predicted_s))
        if len(misses) > 2:
            linear_ratio = float(np.corrcoef(misses, published_s)[0, 1] ** 2)
    return DecodeSummary(
        source=rig.title,
        num_rows=len(pairs),
        num_predicted=len(errors),
        median_error_ratio=median,
        worst_error_ratio=max(map(abs, errors)) if errors else None,
        bias_ratio=statistics.median(errors) if errors else None,
        is_met=None if median is None else median <= TARGET_RATIO,
        published_intercept_s=published and published[0],
        predicted_intercept_s=predicted and predicted[0],
        published_slope_s=published and published[1],
        predicted_slope_s=predicted and predicted[1],
        linear_ratio=linear_ratio,
        stated_law=rig.stated_law,
        explained=rig.explained,
    )


def _line(misses: np.ndarray, steps_s: np.ndarray) -> tuple[float, float]:
    slope_s, intercept_s = np.polyfit(misses, steps_s, 1)
    return float(intercept_s), float(slope_s)
