"""Fits of positive parameters to times, with standard errors.

A law t(parameters, inputs) is fitted by minimising the mean square of log(predicted / observed),
so that an error of 10 % weighs the same at 4 KiB and at 512 MiB. The unknowns are the logarithms
of the parameters: positive by construction, and of one scale. L-BFGS runs in float64, inside a
context that leaves the program's own precision alone.

With J the Jacobian of the n residuals in the k log parameters at the optimum and s^2 = RSS / (n -
k), the covariance is s^2 (J^T J)^-1 (Gauss-Newton). Where measurements of one row disagree, their
standard error sigma_i (of the log) is propagated too and added: A diag(sigma^2) A^T with A = (J^T
J)^-1 J^T. A parameter's standard error is its value times the root of its diagonal entry.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from moejax.errors import BadFileError

Law = Callable[[Float[Array, " parameters"], Float[Array, "rows inputs"]], Float[Array, " rows"]]
"""Times of all rows from the parameters (not their logarithms)."""

_MAX_STEPS = 200
_GRADIENT_TOLERANCE = 1e-9
# Rows are padded to a multiple of this, so that fits of different length share one compilation.
_ROW_BLOCK = 32
_ROUNDING = float(np.finfo(np.float64).eps)


class LogFit(NamedTuple):
    """Fitted parameters and what is known about them.

    Attributes:
      parameters: Fitted values.
      standard_errors: One per parameter, in its unit; infinite where the rows say nothing about it.
      error_ratios: predicted / observed - 1 of every row.
      log_covariance: Of the logarithms of the parameters; zero along what the rows do not say.
      spread_ratio: s, the standard deviation of log(predicted / observed).
      num_degrees: n - k.
    """

    parameters: np.ndarray
    standard_errors: np.ndarray
    error_ratios: np.ndarray
    log_covariance: np.ndarray
    spread_ratio: float
    num_degrees: int


def fit_log_parameters(
    law: Law,
    initial: Shaped[np.ndarray, " parameters"],
    inputs: Shaped[np.ndarray, "rows inputs"],
    observed_s: Shaped[np.ndarray, " rows"],
    observed_errors: Shaped[np.ndarray, " rows"] | None = None,
) -> LogFit:
    """Least squares in log(predicted / observed) over log parameters.

    Args:
      law: Pure function of the parameters; a module-level one is compiled once.
      initial: Positive starting values.
      inputs: What the law needs of each row.
      observed_s: Measured times.
      observed_errors: Standard errors of their logarithms; they widen the parameters' errors but
        do not weigh the rows.

    Returns:
      The fit; deterministic.

    Raises:
      BadFileError: There are not more rows than parameters, or a value is not finite and positive,
        or no parameters describe the rows.
    """
    num_rows, num_parameters = len(observed_s), len(initial)
    if num_rows <= num_parameters:
        raise BadFileError(
            f"{num_rows} measurements cannot determine {num_parameters} parameters with errors",
            f"Measure at least {num_parameters + 1} different sizes.",
        )
    if not (_is_positive(observed_s) and _is_positive(initial) and np.isfinite(inputs).all()):
        raise BadFileError(
            "a measured time or size is not a finite positive number",
            "Repeat the measurement; remove rows that are empty, zero, negative or NaN.",
        )
    num_padding = -num_rows % _ROW_BLOCK
    with jax.enable_x64(True):
        padded = np.pad(np.asarray(inputs, np.float64), ((0, num_padding), (0, 0)), mode="edge")
        times_s = np.pad(np.asarray(observed_s, np.float64), (0, num_padding), mode="edge")
        weights = np.pad(np.ones(num_rows), (0, num_padding))
        log_parameters, jacobian, residuals = _minimise(
            law, np.log(np.asarray(initial, np.float64)), padded, times_s, weights
        )
        parameters = np.exp(np.asarray(log_parameters))
    residuals, jacobian = np.asarray(residuals)[:num_rows], np.asarray(jacobian)[:num_rows]
    if not (np.isfinite(parameters).all() and np.isfinite(residuals).all()):
        raise BadFileError(
            f"the law does not describe the measurements: the fit ended at {parameters}",
            "Look at the measured times: they may belong to different machines or units.",
        )
    # No fit is better known than float64 rounds, even where the residuals vanish.
    variance = max(float(residuals @ residuals), _ROUNDING**2) / (num_rows - num_parameters)
    variances = variance * _inverse_diagonal(jacobian.T @ jacobian)
    if observed_errors is not None:
        variances = variances + np.linalg.pinv(jacobian) ** 2 @ np.square(observed_errors)
    return LogFit(
        parameters=parameters,
        standard_errors=parameters * np.sqrt(variances),
        error_ratios=np.expm1(residuals),
        log_covariance=variance * np.linalg.pinv(jacobian.T @ jacobian),
        spread_ratio=math.sqrt(variance),
        num_degrees=num_rows - num_parameters,
    )


@functools.partial(jax.jit, static_argnums=0)
def _minimise(
    law: Law,
    initial: Float[Array, " parameters"],
    inputs: Float[Array, "rows inputs"],
    observed_s: Float[Array, " rows"],
    weights: Float[Array, " rows"],
) -> tuple[Float[Array, " parameters"], Float[Array, "rows parameters"], Float[Array, " rows"]]:
    def residuals(log_parameters: Float[Array, " parameters"]) -> Float[Array, " rows"]:
        return weights * jnp.log(law(jnp.exp(log_parameters), inputs) / observed_s)

    def loss(log_parameters: Float[Array, " parameters"]) -> Float[Array, ""]:
        return jnp.sum(residuals(log_parameters) ** 2) / jnp.sum(weights)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        log_parameters, state, _, index = carry
        value, gradient = value_and_grad(log_parameters, state=state)
        updates, state = optimizer.update(
            gradient, state, log_parameters, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(log_parameters, updates), state, gradient, index + 1

    def goes_on(carry):
        _, _, gradient, index = carry
        return (index < _MAX_STEPS) & (jnp.max(jnp.abs(gradient)) > _GRADIENT_TOLERANCE)

    start = (initial, optimizer.init(initial), jnp.ones_like(initial), jnp.zeros((), jnp.int32))
    fitted = jnp.asarray(jax.lax.while_loop(goes_on, step, start)[0])
    return fitted, jax.jacfwd(residuals)(fitted), residuals(fitted)


def _inverse_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Diagonal of the inverse; infinite along directions that the matrix does not see."""
    values, vectors = np.linalg.eigh(matrix)
    is_seen = values > 1e-12 * max(values.max(), 1e-300)
    shares = vectors**2
    diagonal = np.sum(np.where(is_seen, shares / np.where(is_seen, values, 1.0), 0.0), axis=1)
    return np.where((shares[:, ~is_seen] > 1e-9).any(axis=1), np.inf, diagonal)


def _is_positive(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and (np.asarray(values) > 0).all())
