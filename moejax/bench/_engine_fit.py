"""An engine's cases as the cost model sees them, and the constants that fit those it may see."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from moejax.cards import Constant, Fields, Hardware, ModelSpec, load_hardware, read_config
from moejax.cost import CountedCase, StepFit, fit_steps, from_hardware

Row: TypeAlias = Mapping[str, Any]

_DEFAULT_BASE = "rtx-3090"
# A copy that ran beside layers is counted in rows and may be off by rounding.
_ROUNDING = 1e-6


def engine_fit(results: Row, base: Hardware | None) -> tuple[dict[str, Constant], StepFit] | None:
    """What a machine's own measurements say: rates of its memories, and the fit to its steps.

    The fit sees the cases marked `fit`; where none is, those of `lru` with slots for each layer at
    one request.

    Args:
      results: What `describe_bench` and `run_cases` give.
      base: Profile that supplies what steps do not tell; None takes that of the RTX 3090.

    Returns:
      Measured constants by name, and the fit; None where there are fewer than three numbers of
      misses among the cases.

    Raises:
      BadFileError: The cases cannot be fitted.
    """
    rows = [row for row in results["engine"] if is_fitted(row, results)]
    cases = [typical_step(row, results["sizes"]["expert_bytes"]) for row in rows]
    if len({round(case.num_misses, 1) for case in cases}) < 3:
        return None
    measured = _measured_rates(results["ceilings"])
    values = {name: constant.value for name, constant in measured.items()}
    known = from_hardware(base or load_hardware(_DEFAULT_BASE))._replace(**values)
    is_cpu = results["environment"]["backend"] == "cpu"
    fit = fit_steps(
        cases, model_spec(results), known, what="cases of the engine", fits_flops=is_cpu
    )
    return measured, fit


def is_fitted(row: Row, results: Row) -> bool:
    """Whether the fit may see a case."""
    if any(other.get("fit") for other in results["engine"]):
        return bool(row.get("fit"))
    kind = (row["strategy"], row["scope"], row["batch_size"])
    return row["replayed"] and kind == ("lru", "layer", 1)


def typical_step(row: Row, expert_bytes: int) -> CountedCase:
    """The typical step of a case: the mean of the half of its steps nearest to the median.

    Steps are ordered by how many experts they wait for, which the simulator tells as well.
    """
    steps = {name: np.asarray(values, float) for name, values in row["steps"].items()}
    order = np.argsort(steps["misses"] + steps["late"], kind="stable")
    middle = order[len(order) // 4 : len(order) - len(order) // 4]
    mean = {name: float(values[middle].mean()) for name, values in steps.items()}
    # Of a late expert half was copied beside layers.
    num_shadowed = mean["fetched_bytes"] / expert_bytes - mean["misses"] - mean["late"] / 2
    return CountedCase(
        strategy=row["strategy"],
        batch_size=row["batch_size"],
        context_tokens=row["mean_context"],
        num_demands=mean["hits"] + mean["late"] + mean["misses"],
        num_misses=mean["misses"],
        num_late=mean["late"],
        num_shadowed=num_shadowed if num_shadowed > _ROUNDING else 0.0,
        step_s=row["step_s"]["median"],
    )


def model_spec(results: Row) -> ModelSpec:
    """The facts of the model that was measured.

    Raises:
      BadFileError: Its configuration is incomplete.
    """
    model = results["model"]
    fields = {**model["config"], "torch_dtype": model["dtype"]}
    return read_config(Fields(fields, "the results"), name=model["name"])


def _measured_rates(ceilings: Row) -> dict[str, Constant]:
    def measured(name: str, unit: str, what: str) -> Constant:
        source = f"{what}, the fastest sample of the run"
        return Constant(ceilings[name], unit, "measured", None, source)

    return {
        "vram_bytes_per_s": measured("hbm_bytes_per_s", "B/s", "device memory read"),
        "matmul_flops": measured("flops_per_s", "FLOP/s", "a large product"),
        "pinned_h2d_bytes_per_s": measured("link_bytes_per_s", "B/s", "a layer copied"),
        "kernel_efficiency_ratio": Constant(1.0, "1", "derived", None, "folded into layer_fixed_s"),
    }
