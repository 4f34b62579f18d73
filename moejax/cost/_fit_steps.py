"""Fits the constants of a machine to the steps of an engine on it, with their errors.

The law is `counted_case`; the unknowns are logarithms, so that errors are relative. Of a case, the
median step counts, once: its steps share their run and are not independent. Which constants are
free depends on what the cases tell apart. The covariance of the logarithms is s^2 (J^T J)^-1 with
the Jacobian J at the optimum and s^2 the mean square of log(measured / predicted), for the degrees
of freedom. How far a new case may be off is what each case would be off had the fit not seen it:
its residual over 1 - h, with its leverage h.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import least_squares

from moejax.cards import Constant, ModelSpec, Uncertainty
from moejax.errors import BadFileError

from ._counted import StepCounts, counted_case
from ._parameters import CostParameters

# Cases that are off by more weigh less: some waited for something else.
_USUAL_RATIO = 0.02
# A strategy whose cost is not so many standard errors above nothing costs nothing: below, by
# Akaike's criterion, leaving it out predicts better.
_NUM_ERRORS = 2.0**0.5
# A case that fixes a constant by itself says nothing of how well others are predicted.
_MOST_OWN = 0.9
# Logarithms less sure than this are not determined at all.
_LARGEST_ERROR = 1.0
# A constant that moves no prediction by more than this share of its own change is not seen.
_LEAST_SLOPE = 1e-4
_SMALLEST_S, _SMALLEST_RATIO = 1e-9, 1e-3


class CountedCase(NamedTuple):
    """A case as the fit sees it.

    Attributes:
      strategy: Name of the strategy.
      batch_size: Requests.
      context_tokens: Mean tokens behind each.
      num_demands, num_misses, num_late, num_shadowed: `StepCounts` of the typical step.
      step_s: Median step time.
    """

    strategy: str
    batch_size: int
    context_tokens: float
    num_demands: float
    num_misses: float
    num_late: float
    num_shadowed: float
    step_s: float

    @property
    def counts(self) -> StepCounts:
        """What the law reads."""
        return StepCounts(self.num_demands, self.num_misses, self.num_late, self.num_shadowed)

    @property
    def is_all_hit(self) -> bool:
        """Whether the typical step waits for nothing."""
        return self.num_misses + self.num_late == 0


class StepFit(NamedTuple):
    """Fitted constants and how sure they are."""

    constants: dict[str, Constant]
    strategy_layer_s: dict[str, Constant]
    uncertainty: Uncertainty


def fit_steps(
    cases: Sequence[CountedCase],
    model: ModelSpec,
    known: CostParameters,
    *,
    what: str = "cases",
    fits_flops: bool = False,
) -> StepFit:
    """Fits what the cases determine; `known` supplies everything else and where to start.

    A constant at its bound, or not determined beside the others, has no error; the cost of a
    strategy that cannot be told from nothing is left out.

    Args:
      cases: Measured cases.
      model: Card of their model.
      known: Constants of the machine; rates of the link and of device memory are kept.
      what: What the cases are, for the source of each constant.
      fits_flops: Whether operations bound the steps, as on a CPU, so that their rate shows.

    Raises:
      BadFileError: There are not more cases than unknowns.
    """
    names = _free_constants(cases)
    if fits_flops:
        names.append("matmul_flops")
    strategies = _free_strategies(cases)
    while True:
        fitted = _fit(cases, model, known, names, strategies)
        unsure = [
            name
            for name in strategies
            if not fitted.errors.get(_key(name), np.inf) * _NUM_ERRORS < 1.0
        ]
        if not unsure:
            break
        # The least sure one goes first: others may be told apart without it.
        strategies.remove(max(unsure, key=lambda name: fitted.errors.get(_key(name), np.inf)))
    source = f"fitted to {len(cases)} {what}"

    def constant(key: str) -> Constant:
        value, error = fitted.values[key], fitted.errors.get(key)
        unit = "FLOP/s" if key == "matmul_flops" else "1" if key.endswith("_ratio") else "s"
        return Constant(value, unit, "fitted", None if error is None else error * value, source)

    return StepFit(
        constants={name: constant(name) for name in names},
        strategy_layer_s={name: constant(_key(name)) for name in strategies},
        uncertainty=Uncertainty(
            spread_ratio=fitted.spread_ratio,
            num_degrees=fitted.num_degrees,
            names=tuple(fitted.errors),
            correlations=tuple(map(tuple, fitted.correlations.tolist())),
        ),
    )


class _Fitted(NamedTuple):
    values: dict[str, float]
    errors: dict[str, float]
    correlations: np.ndarray
    spread_ratio: float
    num_degrees: int


def _fit(
    cases: Sequence[CountedCase],
    model: ModelSpec,
    known: CostParameters,
    names: Sequence[str],
    strategies: Sequence[str],
) -> _Fitted:
    keys = [*names, *map(_key, strategies)]
    num_degrees = len(cases) - len(keys)
    if num_degrees < 1:
        raise BadFileError(
            f"{len(cases)} cases cannot determine {len(keys)} constants with errors",
            "Measure more cases.",
        )
    start = [max(float(getattr(known, name)), 1e-6) for name in names]
    start = np.log([*start, *([1e-6] * len(strategies))])
    is_ratio = np.array([key.endswith("_ratio") for key in keys])
    low = np.log(np.where(is_ratio, _SMALLEST_RATIO, _SMALLEST_S))
    high = np.where(np.array(keys) == "matmul_flops", np.log(1e18), 0.0)
    with jax.enable_x64(True):
        residuals = _residuals(cases, model, known, names, strategies)
        slopes = jax.jit(jax.jacfwd(residuals))
        found = least_squares(
            lambda x: np.asarray(residuals(x)),
            np.clip(start, low + 1e-3, high - 1e-3),
            jac=lambda x: np.asarray(slopes(x)),  # pyright: ignore[reportArgumentType]
            bounds=(low, high),
            loss="soft_l1",
            f_scale=_USUAL_RATIO,
            xtol=1e-10,
        )
        left, jacobian = np.asarray(residuals(found.x)), np.asarray(slopes(found.x))
    variance = float(left @ left) / num_degrees
    is_free = (found.x > low + 1e-2) & (found.x < high - 1e-3)
    is_free &= np.linalg.norm(jacobian, axis=0) > _LEAST_SLOPE
    covariance, errors = _covariance(jacobian, is_free, variance)
    while errors.size and errors.max() > _LARGEST_ERROR:
        # Two that only their sum tells apart: one stays where it is, and the other becomes sure.
        is_free[np.flatnonzero(is_free)[errors.argmax()]] = False
        covariance, errors = _covariance(jacobian, is_free, variance)
    free = jacobian[:, is_free]
    own = np.einsum("ij,jk,ik->i", free, np.linalg.pinv(free.T @ free), free)
    is_judged = own < _MOST_OWN
    without = left[is_judged] / (1.0 - own[is_judged])
    return _Fitted(
        values=dict(zip(keys, np.exp(found.x).tolist(), strict=True)),
        errors=dict(
            zip([k for k, f in zip(keys, is_free, strict=True) if f], errors.tolist(), strict=True)
        ),
        correlations=np.clip(covariance / np.outer(errors, errors), -1.0, 1.0),
        spread_ratio=float(np.sqrt(np.mean(without**2))),
        num_degrees=num_degrees,
    )


def _covariance(
    jacobian: Float[np.ndarray, "cases unknowns"], is_free: np.ndarray, variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of the logarithms of the free unknowns, and their standard errors."""
    free = jacobian[:, is_free]
    covariance = variance * np.linalg.pinv(free.T @ free)
    return covariance, np.sqrt(np.diag(covariance))


def _residuals(cases, model, known, names, strategies):
    """Logarithms of predicted over measured, as a function of the logarithms of the unknowns."""
    rows = jnp.asarray(
        [(case.batch_size, case.context_tokens, *case.counts) for case in cases], float
    )
    is_own = jnp.asarray([[case.strategy == name for name in strategies] for case in cases], float)
    is_own = is_own.reshape(len(cases), len(strategies))
    step_s = jnp.asarray([case.step_s for case in cases], float)

    def one(values: Float[Array, " unknowns"], row: Float[Array, " inputs"], own: Array) -> Array:
        parameters = known._replace(**dict(zip(names, values[: len(names)], strict=True)))
        return counted_case(
            parameters,
            model,
            StepCounts(*row[2:]),
            batch_size=row[0],
            context_tokens=row[1],
            strategy_layer_s=jnp.sum(own * values[len(names) :]),
        ).step_s

    @jax.jit
    def residuals(logs: Float[Array, " unknowns"]) -> Float[Array, " cases"]:
        predicted_s = jax.vmap(one, in_axes=(None, 0, 0))(jnp.exp(logs), rows, is_own)
        return jnp.log(predicted_s / step_s)

    return residuals


def _free_constants(cases: Sequence[CountedCase]) -> list[str]:
    """Constants that something among the cases tells apart from the others."""
    batched = [case for case in cases if case.batch_size > 1]
    names = ["layer_fixed_s"]
    if len({round(case.num_misses, 3) for case in cases}) > 2:
        names.append("copy_latency_s")
    if batched:
        names.append("batched_layer_s")
    if len({round(case.num_demands) for case in batched if case.is_all_hit}) > 1:
        names.append("kernel_efficiency_ratio")
    if sum(case.num_misses > 0 for case in batched) > 1:
        names.append("overlap_ratio")
    if any(case.num_shadowed > 0 for case in cases):
        names.append("prefetch_overlap_ratio")
    return names


def _free_strategies(cases: Sequence[CountedCase]) -> list[str]:
    """Strategies with a case that misses nothing, beside which their cost shows; `lru` is zero."""
    found = {case.strategy: None for case in cases if case.is_all_hit}
    return [name for name in found if name != "lru"]


def _key(strategy: str) -> str:
    return f"layer_s.{strategy}"
