"""Fits a workload's parameters to published figures."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.special import expit, logit

from moejax.errors import UsageError

from ._assess import assess
from ._workload import Figures, Workload

# A residual of this size costs twice its square: the worst point matters more than the mean.
_TOLERANCE_RATIO = 0.015
# Ranges are aimed at their inner three fifths, so that other requests stay inside too.
_RANGE_MARGIN = 0.2


def deviations(
    targets: Figures, achieved: Figures, *, margin: float = 0.0
) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Achieved less target of every figure, under its path of keys.

    A target range [lowest, highest] counts from its nearer end, 0 inside; `margin` is the share of
    its width by which both ends move in.
    """
    for measure, wanted in targets.items():
        for name, target in wanted.items():
            if isinstance(target, Mapping):
                for slots, ratio in target.items():
                    yield (measure, name, slots), achieved[measure][name][slots] - ratio
            else:
                lowest, highest = target
                inset = margin * (highest - lowest)
                value = achieved[measure][name]
                nearest = min(max(value, lowest + inset), highest - inset)
                yield (measure, name), value - nearest


def calibrate(
    workload: Workload,
    *,
    num_requests: int = 4,
    tokens_per_request: int = 512,
    seed: int = 0,
    max_rounds: int = 12,
) -> Workload:
    """Moves the `fitted` parameters until the figures come as near to their targets as they can.

    Damped Gauss-Newton with finite differences; every evaluation draws the same requests, so that
    differences come from the parameters alone.

    Returns:
      The workload with its new parameters; `achieved` is left as it was.

    Raises:
      UsageError: The workload has nothing to fit.
    """
    if not workload.fitted or not workload.targets:
        raise UsageError(
            f"the workload {workload.name!r} has nothing to fit",
            "Name parameters under `fitted` and figures under `targets` in its card.",
        )

    start = np.array([_to_free(name, workload.parameters[name]) for name in workload.fitted])

    # Around 1, because the solver's difference step is relative.
    def residuals(step: Float[np.ndarray, " parameters"]) -> Float[np.ndarray, " figures"]:
        tried = _with_point(workload, start + step - 1)
        achieved = assess(
            tried, num_requests=num_requests, tokens_per_request=tokens_per_request, seed=seed
        )
        found = dict(deviations(workload.targets, achieved, margin=_RANGE_MARGIN))
        misses = np.array(
            [miss / _scale(workload, measure) for (measure, *_), miss in found.items()]
        )
        num_alike = Counter(measure for measure, *_ in found)
        # Every measure weighs the same, however many points its curves have.
        weights = np.array([num_alike[measure] ** -0.5 for measure, *_ in found])
        shares = sum(value for name, value in tried.parameters.items() if name.endswith("_share"))
        misses *= weights * (1 + (misses / _TOLERANCE_RATIO) ** 2)
        return np.append(misses, 10 * max(0.0, shares - 1))

    found = least_squares(residuals, np.ones(len(start)), diff_step=0.05, max_nfev=max_rounds)
    return _with_point(workload, start + found.x - 1)


def _scale(workload: Workload, measure: str) -> int:
    """What makes a figure a share: counts of experts are seen beside all of a layer."""
    return workload.num_experts if measure == "distinct_experts" else 1


def _with_point(workload: Workload, point: Float[np.ndarray, " parameters"]) -> Workload:
    moved = {
        name: round(_from_free(name, value), 5)
        for name, value in zip(workload.fitted, point, strict=True)
    }
    return dataclasses.replace(
        workload, parameters=MappingProxyType({**workload.parameters, **moved})
    )


def _to_free(name: str, value: float) -> float:
    return math.log(value) if name == "popularity" else float(logit(value))


def _from_free(name: str, value: float) -> float:
    return math.exp(value) if name == "popularity" else float(expit(value))
