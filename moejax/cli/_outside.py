"""Numbers that others published or that arithmetic gives, beside ours."""

from collections.abc import Iterator
from typing import NamedTuple

from ._options import DEFAULT_HARDWARE, DEFAULT_MODEL
from ._outside_hardware import hardware_figures
from ._outside_workloads import gated_figures
from ._progress import Progress

_ROUTING_SOURCE = "arXiv:2505.16056, digitised; statistics of recorded routing"
# The published curves could be read off their figure no better than this.
_CURVE_TOLERANCE = 0.03
_LARGEST_HELD_OUT_RATIO = 0.10
_MEDIAN_HELD_OUT_RATIO = 0.05
_LINK_BYTES_PER_S = 26e9
_ANCHOR_BYTES_PER_S = 25.3e9
_ANCHOR_TOLERANCE_RATIO = 0.03
# Billions of parameters, and half of the last digit given.
_PUBLISHED_PARAMS = {
    "qwen1.5-moe-a2.7b": (14.3, 0.05),
    "deepseek-moe-16b": (16.38, 0.005),
    "deepseek-v2-lite": (15.7, 0.05),
}


class Check(NamedTuple):
    """One number from outside and ours.

    Attributes:
      check: What is compared, with its unit.
      expected: The number from outside; [lowest, highest] where that is a range.
      ours: What moejax computes.
      tolerance: Largest difference allowed, in the same unit; of a range, from its nearer end.
      ok: Whether the difference is within it; None where it is not and the source says why.
      source: Where `expected` comes from.
    """

    check: str
    expected: float | list[float]
    ours: float
    tolerance: float
    ok: bool | None
    source: str


def check_outside_numbers(seed: int, progress: Progress) -> list[Check]:
    """Computes every number anew and compares.

    Args:
      seed: Of the requests that the workload's figures are measured on.
      progress: Told before each part.
    """
    parts = {
        "arithmetic": _check_sizes(),
        "RTX 3090 copies": _check_copies(),
        "decode steps": _check_decode(),
        "default workload": _check_workload(seed),
        "other workloads": _check_other_workloads(seed),
    }
    checks: list[Check] = []
    for index, (name, part) in enumerate(parts.items()):
        progress(index, len(parts), name)
        checks += part
    return checks


def _check_sizes() -> Iterator[Check]:
    from moejax.cards import load_model
    from moejax.simulate import slots_within

    model = load_model(DEFAULT_MODEL)
    by_hand = "arithmetic on config.json"
    step_bytes = model.num_moe_layers * model.num_experts_per_tok * model.expert_bytes
    slots = slots_within(2 * 10**9, [model.expert_bytes] * model.num_moe_layers, model.num_experts)
    yield _near("one expert, bytes", 3 * 2048 * 1408 * 2, model.expert_bytes, 0, by_hand)
    yield _near("all routed experts, GB", 24.9, model.routed_bytes / 1e9, 0.05, by_hand)
    all_bytes = model.routed_bytes + model.dense_bytes
    yield _near("all weights, GB", 28.6, all_bytes / 1e9, 0.05, by_hand)
    yield _near("experts of one token, GB", 1.661, step_bytes / 1e9, 0.0005, by_hand)
    yield _near("experts that 2GB hold", 115, sum(slots), 0, by_hand)
    ceiling = _LINK_BYTES_PER_S / step_bytes
    yield _near("all-miss ceiling at 26 GB/s, tokens/s", 15.7, ceiling, 0.1, by_hand)
    for name, (billions, tolerance) in _PUBLISHED_PARAMS.items():
        ours = load_model(name).total_params / 1e9
        label = f"parameters of {name}, billions"
        yield _near(label, billions, ours, tolerance, "published with the model")


def _check_copies() -> Iterator[Check]:
    import statistics

    from moejax.cards import load_hardware, models_dir
    from moejax.cost import fit_csv
    from moejax.units import format_bytes

    folder = models_dir() / "hardware" / "measurements"
    found = fit_csv(folder / "transfer.csv", gpu="RTX 3090")
    held_out = [row for row in found.copy.rows if row.is_held_out]
    source = f"{found.rig}, {found.time_domain} times"
    for row in held_out:
        tolerance = _LARGEST_HELD_OUT_RATIO * row.observed_s
        name = f"held-out copy of {format_bytes(row.num_bytes)}, s"
        yield _near(name, row.observed_s, row.predicted_s, tolerance, source)
    median = statistics.median(abs(row.error_ratio) for row in held_out)
    yield _near("held-out copies, median error", 0, median, _MEDIAN_HELD_OUT_RATIO, source)
    ours = load_hardware(DEFAULT_HARDWARE).value("pinned_h2d_bytes_per_s")
    yield _near(
        "pinned copies of the profile rtx-3090, GB/s",
        _ANCHOR_BYTES_PER_S / 1e9,
        ours / 1e9,
        _ANCHOR_TOLERANCE_RATIO * _ANCHOR_BYTES_PER_S / 1e9,
        "published large copies, idle host",
    )


def _check_decode() -> Iterator[Check]:
    for figure in hardware_figures():
        check = _near(figure.label, 0, figure.error_ratio, figure.target_ratio, figure.source)
        if not check.ok and figure.explained:
            check = check._replace(ok=None, source=f"{figure.source}: {figure.explained}")
        yield check


def _check_workload(seed: int) -> Iterator[Check]:
    from moejax.workloads import WORKLOADS, assess, default_workload, deviations

    workload = WORKLOADS[default_workload]
    achieved = assess(workload, seed=seed)
    for path, deviation in deviations(workload.targets, achieved):
        measure, name, *slots = path
        if slots:
            expected = workload.targets[measure][name][slots[0]]
            label = f"{name}, hit ratio with {slots[0]} slots a layer"
            ours, tolerance = achieved[measure][name][slots[0]], _CURVE_TOLERANCE
        else:
            expected = list(workload.targets[measure][name])
            label = name.removesuffix("_ratio").replace("_", " ")
            ours, tolerance = achieved[measure][name], 0.0
        is_near = abs(deviation) <= tolerance
        yield Check(
            f"{default_workload}: {label}", expected, ours, tolerance, is_near, _ROUTING_SOURCE
        )


def _check_other_workloads(seed: int) -> Iterator[Check]:
    for figure in gated_figures(seed):
        yield _near(*figure)


def _near(check: str, expected: float, ours: float, tolerance: float, source: str) -> Check:
    return Check(check, expected, ours, tolerance, abs(ours - expected) <= tolerance, source)
