"""The ladder: an engine's cases as a profile predicts them, as the timeline has them, as measured.

Rung 1 is the closed form of the counts (`moejax.cost.counted_case`), rung 2 the timeline with the
engine's own schedule of prefetches, rung 3 the engine. Cases that the profile was fitted to are
marked, and do not count in the summary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.cards import Hardware, ModelSpec
from moejax.cost import (
    CostParameters,
    CountedCase,
    StepParts,
    counted_case,
    from_hardware,
    interval,
    sample_parameters,
)

from ._engine_fit import Row, is_fitted, model_spec, typical_step
from ._ladder_baselines import baselines
from ._ladder_parts import Contrasts, find_contrasts
from ._ladder_timeline import simulated_steps

PARTS = ("copy", "experts", "attention", "fixed")
"""What a step is made of, each predicted and, where the run holds the contrast, measured."""


def ladder(
    results: Row,
    hardware: Hardware,
    *,
    simulate: bool = True,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for every case of an engine's run.

    Args:
      results: What `describe_bench` and `run_cases` give.
      hardware: Profile of the machine, whose fit must not have seen the cases that count.
      simulate: Whether the timeline runs, for cases whose routing can be made again.
      seed: Seed of the draws behind intervals.
      progress: Told before each simulation.

    Returns:
      Records with the fields of the case, `is_held_out`, `predicted_s`, `interval_s` (None where
      the profile does not say how sure it is), `simulated_s`, `measured_s`,
      `measured_spread_s` (quartiles), `counts_equal`, `error_ratio`, `simulated_error_ratio`,
      `parts` (name -> `predicted_s`, `measured_s`), `roofline_s` and `two_constants_s`.

    Raises:
      BadFileError: The profile lacks a constant.
    """
    model, rows = model_spec(results), list(results["engine"])
    cases = [typical_step(row, results["sizes"]["expert_bytes"]) for row in rows]
    intervals = _intervals(hardware, model, cases, seed)
    contrasts = find_contrasts(results, cases)
    steps = simulated_steps(results, hardware, progress) if simulate else [None] * len(rows)
    found = []
    for row, case, bounds, simulated in zip(rows, cases, intervals, steps, strict=True):
        parts, predicted_s = _predicted_parts(hardware, model, case)
        simulated_s = None if simulated is None else float(np.median(simulated.step_s))
        equal = row["simulator_counts_equal"]
        if simulated is not None:
            equal = bool(equal) and simulated.counts_equal
        found.append(
            {
                "strategy": row["strategy"],
                "slots": row["slots"],
                "scope": row["scope"],
                "batch_size": row["batch_size"],
                "routing": row["routing"],
                "is_held_out": not is_fitted(row, results),
                "misses_per_step": row["misses_per_step"],
                "late_per_step": row["late_per_step"],
                "fetched_bytes_per_step": row["fetched_bytes_per_step"],
                "predicted_s": predicted_s,
                "interval_s": None if bounds is None else list(bounds),
                "simulated_s": simulated_s,
                "measured_s": case.step_s,
                "measured_spread_s": _quartiles(row["step_s"]["samples"]),
                "counts_equal": equal,
                "error_ratio": predicted_s / case.step_s - 1,
                "simulated_error_ratio": (
                    None if simulated_s is None else simulated_s / case.step_s - 1
                ),
                "parts": _beside(parts, contrasts, case),
                **baselines(results, row, case),
            }
        )
    return found


def summarise_ladder(rows: Sequence[Row]) -> dict[str, Any]:
    """Errors over the cases that the fit did not see, and what share of them intervals hold.

    Returns:
      `num_cases`, `num_counts_equal` (of `num_counted`), `median_ratio` and `worst_ratio` of the
      absolute error of `predicted`, `simulated`, `roofline` and `two_constants`, `coverage_ratio`
      of the intervals, and for each part the median absolute error in seconds and as a share of
      the step; None where nothing tells.
    """
    held_out = [row for row in rows if row["is_held_out"]]
    counted = [row for row in held_out if row["counts_equal"] is not None]
    bounded = [row for row in held_out if row["interval_s"] is not None]
    num_inside = sum(
        row["interval_s"][0] <= row["measured_s"] <= row["interval_s"][1] for row in bounded
    )
    return {
        "num_cases": len(held_out),
        "num_counted": len(counted),
        "num_counts_equal": sum(row["counts_equal"] for row in counted),
        "errors": {
            name: _errors([(row[f"{name}_s"], row["measured_s"]) for row in held_out])
            for name in ("predicted", "simulated", "roofline", "two_constants")
        },
        "coverage_ratio": num_inside / len(bounded) if bounded else None,
        "parts": {name: _part_errors(name, held_out) for name in PARTS},
    }


def _predicted_parts(
    hardware: Hardware, model: ModelSpec, case: CountedCase
) -> tuple[dict[str, float], float]:
    constant = hardware.strategy_layer_s.get(case.strategy)
    layer_s = 0.0 if constant is None else constant.value
    parameters = from_hardware(hardware)
    whole, bare = (
        _priced(parameters, model, case, context_tokens, layer_s)
        for context_tokens in (case.context_tokens, 0.0)
    )
    parts = {
        "copy": float(whole.copy_s),
        "experts": float(whole.experts_s),
        "attention": float(whole.layers_s - bare.layers_s),
        "fixed": float(bare.layers_s),
    }
    return parts, float(whole.step_s)


def _priced(
    parameters: CostParameters,
    model: ModelSpec,
    case: CountedCase,
    context_tokens: float,
    layer_s: float,
) -> StepParts:
    numbers = (case.batch_size, context_tokens, layer_s)
    return _price(parameters, model, case.counts, *map(float, numbers))


@functools.partial(jax.jit, static_argnames="model")
def _price(parameters, model, counts, batch_size, context_tokens, layer_s):
    return counted_case(
        parameters,
        model,
        counts,
        batch_size=batch_size,
        context_tokens=context_tokens,
        strategy_layer_s=layer_s,
    )


def _intervals(
    hardware: Hardware, model: ModelSpec, cases: Sequence[CountedCase], seed: int
) -> list[tuple[float, float] | None]:
    samples = sample_parameters(hardware, jax.random.key(seed))
    if samples is None:
        return [None] * len(cases)
    nothing = jnp.zeros_like(samples.case_ratio)
    found = []
    for case in cases:
        layer_s = samples.strategy_layer_s.get(case.strategy, nothing)
        step_s = _sampled(
            samples.parameters,
            model,
            case.counts,
            float(case.batch_size),
            float(case.context_tokens),
            layer_s,
        )
        found.append(interval(step_s * samples.case_ratio))
    return found


@functools.partial(jax.jit, static_argnames="model")
def _sampled(parameters, model, counts, batch_size, context_tokens, layer_s):
    def one(parameters: CostParameters, layer_s: Array) -> Float[Array, ""]:
        return _price(parameters, model, counts, batch_size, context_tokens, layer_s).step_s

    return jax.vmap(one)(parameters, layer_s)


def _beside(
    parts: dict[str, float], contrasts: Contrasts, case: CountedCase
) -> dict[str, dict[str, float | None]]:
    measured = contrasts.parts(case)
    return {name: {"predicted_s": parts[name], "measured_s": measured.get(name)} for name in PARTS}


def _quartiles(samples_s: Sequence[float]) -> list[float]:
    return [float(value) for value in np.percentile(samples_s, [25, 75])]


def _errors(pairs: Sequence[tuple[float | None, float]]) -> dict[str, float] | None:
    ratios = [abs(said / measured - 1) for said, measured in pairs if said is not None]
    if not ratios:
        return None
    return {"median_ratio": float(np.median(ratios)), "worst_ratio": max(ratios)}


def _part_errors(name: str, rows: Sequence[Row]) -> dict[str, float] | None:
    pairs = [(row["parts"][name], row["measured_s"]) for row in rows]
    errors = [
        (abs(part["predicted_s"] - part["measured_s"]), step_s)
        for part, step_s in pairs
        if part["measured_s"] is not None
    ]
    if not errors:
        return None
    return {
        "median_s": float(np.median([error_s for error_s, _ in errors])),
        "median_step_ratio": float(np.median([error_s / step_s for error_s, step_s in errors])),
    }
