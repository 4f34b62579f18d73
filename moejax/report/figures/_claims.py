"""The study's claims against what its own experiment gives: batch, budget, oracle, memory."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from moejax.claims import STRATEGIES_OF_STUDY, table

from .._data import NotDrawnError, ReportData
from .._palette import FAINT, INK, look
from .._study import Study
from ._canvas import (
    batch_ticks,
    from_zero,
    line_look,
    log_axis,
    new_figure,
    percent_axis,
    strategy_axis,
    strategy_legend,
)

_CACHING = tuple(name for name in STRATEGIES_OF_STUDY if name != "on_demand")
_HELP = {"color": FAINT, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 0}


def claims_batch(data: ReportData) -> Figure:
    """Latency and throughput at larger batches, relative to batch 1, as claimed and as found.

    Raises:
      NotDrawnError: The run has no audit.
    """
    study = audited_study(data)
    sizes = np.array(study.batch_sizes, float)
    figure = new_figure(3.3)
    growth, gain = figure.subplots(1, 2)
    alone = np.array([_latencies_s(study, name, "sequential") for name in STRATEGIES_OF_STUDY])
    grown = alone / alone[:, :1]
    growth.fill_between(sizes, grown.min(0), grown.max(0), color=FAINT, alpha=0.35, linewidth=0)
    growth.plot(sizes, sizes, color=INK, linewidth=0.9)
    for name in STRATEGIES_OF_STUDY:
        together = _latencies_s(study, name, "batched")
        growth.plot(sizes, together / together[0], **line_look(name))
        gain.plot(sizes, sizes * together[0] / together, **line_look(name))
    growth.set_yscale("log", base=2)
    growth.set_yticks(sizes, [f"{size:g}" for size in sizes])
    growth.yaxis.set_minor_locator(NullLocator())
    _note(growth, 6.0, 9.0, "thin line: claimed\ngrey: one after another", "right")
    growth.set_title("a  latency over that at batch 1")
    growth.set_ylabel("times")
    claimed = data.claims["throughput_requests_per_s"]["oracle"]
    latency = table(data.claims, "latency_ms", "batch1_mean")["oracle"]
    crowded = table(data.claims, "latency_ms", "batch16_mean")["oracle"]
    points = (claimed["batch16"] / claimed["batch1"], 16 * latency / crowded)
    for value, said in zip(points, ("throughput", "latency"), strict=True):
        gain.plot([16], [value], "d", color=INK, markersize=7, fillstyle="none", clip_on=False)
        _note(gain, 13, value - 0.9, f"by the claimed {said}", "right")
    gain.set_title("b  throughput over that at batch 1")
    gain.set_ylabel("times")
    from_zero(gain)
    for axes in (growth, gain):
        batch_ticks(axes, study.batch_sizes)
    strategy_legend(figure, STRATEGIES_OF_STUDY)
    return figure


def claims_budget(data: ReportData) -> Figure:
    """How many experts the claimed memory holds, and what then hits.

    Raises:
      NotDrawnError: The run has no audit.
    """
    study = audited_study(data)
    figure = new_figure(3.5)
    held, hits = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _experts_held(held, study, data)
    claimed = table(data.claims, "hit_rate_percent", "mean")
    markers = {"stated": "o", "in_tiers": "s", "in_bytes": "v"}
    for row, name in enumerate(_CACHING):
        colour = look(name).colour
        found = [study.mean(name, "hit_ratio", slots=study.slots[way]) for way in markers]
        hits.plot([min(found), max(found)], [row, row], color=colour, linewidth=1, alpha=0.5)
        for value, marker in zip(found, markers.values(), strict=True):
            hits.plot([value], [row], marker, color=colour, markersize=5.5)
        hits.plot([claimed[name] / 100], [row], "d", color=INK, markersize=7, fillstyle="none")
    strategy_axis(hits, _CACHING)
    hits.set_xlim(0, 1)
    percent_axis(hits.xaxis)
    hits.set_title("b  hit ratio, batch 1")
    handles = [Line2D([], [], linestyle="", marker="d", color=INK, fillstyle="none")]
    handles += [Line2D([], [], linestyle="", marker=one, color=FAINT) for one in markers.values()]
    labels = [f"{study.slots[way]} slots a layer" for way in markers]
    figure.legend(handles, ["claimed", *labels], loc="outside lower center", ncols=4)
    return figure


def claims_oracle(data: ReportData) -> Figure:
    """Speedup against memory, between what prefetch alone and what full residency can give.

    Raises:
      NotDrawnError: The run has no audit.
    """
    study = audited_study(data)
    figure = new_figure(3.6)
    axes = figure.subplots()
    sizes_gb = _sizes_gb(study)
    base_s = study.mean("on_demand", "latency_s")
    for name in _CACHING:
        speedups = [
            base_s / study.mean(name, "latency_s", slots=slots) for slots in study.slot_choices()
        ]
        axes.plot(sizes_gb, speedups, **line_look(name))
    memory_mb = table(data.claims, "memory", "memory_mb")
    for name, claimed in table(data.claims, "latency_ms", "speedup").items():
        if name in _CACHING:
            axes.plot(
                [memory_mb[name] / 1e3], [claimed], look(name).marker, color=look(name).colour,
                markerfacecolor="white", markersize=9 if look(name).marker == "*" else 6,
            )  # fmt: skip
    compute_s, stall_s = (study.mean("on_demand", field) for field in ("compute_s", "stall_s"))
    axes.axhline(1 + compute_s / stall_s, **_HELP)
    axes.axhline(1 + stall_s / compute_s, **_HELP)
    right = sizes_gb[-1] * 1.2
    _note(axes, right, 1 + compute_s / stall_s, "most that prefetch alone can give", "right")
    _note(axes, right, 1 + stall_s / compute_s, "every expert resident", "right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sizes_gb[0] / 1.3, right * 1.05)
    axes.set_ylim(0.9, 1.5 * (1 + stall_s / compute_s))
    log_axis(axes.xaxis, sizes_gb)
    log_axis(axes.yaxis, [1, 1 + stall_s / compute_s])
    axes.set_xlabel("device slots for experts (GB)")
    axes.set_ylabel("speedup over on_demand (times), batch 1")
    hollow = Line2D(
        [], [], linestyle="", marker="o", color=INK, markerfacecolor="white", label="claimed"
    )
    handles = [Line2D([], [], label=name, **line_look(name)) for name in _CACHING]
    figure.legend(handles=[*handles, hollow], loc="outside lower center", ncols=5)
    return figure


def claims_memory(data: ReportData) -> Figure:
    """Device memory that is claimed, and what the claimed hit rates take.

    Raises:
      NotDrawnError: The run has no audit.
    """
    study = audited_study(data)
    claimed = table(data.claims, "memory", "memory_mb")
    figure = new_figure(2.9)
    axes = figure.subplots()
    for row, name in enumerate(STRATEGIES_OF_STUDY):
        ours_gb = study.mean(name, "memory_bytes", dispatch="sequential") / 1e9
        ends_gb = (claimed[name] / 1e3, ours_gb)
        axes.plot(ends_gb, [row, row], color=look(name).colour, linewidth=1.2, alpha=0.5)
        axes.plot(ends_gb[:1], [row], "d", color=INK, markersize=7, fillstyle="none")
        axes.plot(ends_gb[1:], [row], look(name).marker, color=look(name).colour, markersize=6.5)
    expert_gb = study.facts["expert_bytes"] / 1e9
    whole = study.facts["num_moe_layers"] * study.facts["num_experts"] * expert_gb
    lines_gb = {
        "three tiers": sum(data.claims["cache_slots"].values()) * expert_gb,
        "left on an\nRTX 3090": study.facts["available_gb.RTX 3090"],
        "all experts": whole,
    }
    axes.set_xscale("log")
    for said, size_gb in lines_gb.items():
        axes.axvline(size_gb, **_HELP)
        axes.annotate(
            f"{said}\n{size_gb:.3g} GB", (size_gb, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="right" if "left" in said else "center",
            color=FAINT, fontsize=7,
        )  # fmt: skip
    strategy_axis(axes, STRATEGIES_OF_STUDY)
    axes.set_xlim(0.15, 1.5 * whole)
    log_axis(axes.xaxis, [0.2, whole])
    axes.set_xlabel("device memory for experts (GB), batch 1")
    marks = [
        Line2D([], [], linestyle="", marker="d", color=INK, fillstyle="none", label="claimed"),
        Line2D([], [], linestyle="", marker="o", color=FAINT, label=_stated(study)),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2)
    return figure


def audited_study(data: ReportData) -> Study:
    """The study's experiment.

    Raises:
      NotDrawnError: The run has no audit.
    """
    if data.run.study is None:
        raise NotDrawnError("the run has no audit; `moejax bench --audit` makes one")
    return data.run.study


def _latencies_s(study: Study, strategy: str, dispatch: str) -> np.ndarray:
    sizes = study.batch_sizes
    return np.array([study.mean(strategy, "latency_s", size, dispatch=dispatch) for size in sizes])


def _experts_held(axes: Axes, study: Study, data: ReportData) -> None:
    cached = table(data.claims, "memory", "experts_cached")
    layers, experts = study.facts["num_moe_layers"], study.facts["num_experts"]
    rows = {
        "all experts\nof the model": layers * experts,
        _stated(study).replace(" ", "\n", 1): layers * study.slots["stated"],
        "the three\ntiers": sum(data.claims["cache_slots"].values()),
        "the claimed\nmemory": max(cached.values()),
    }
    axes.barh(list(rows), list(rows.values()), height=0.55, color=FAINT)
    for row, number in enumerate(rows.values()):
        a_layer = number / layers
        axes.text(number + 30, row, f"{number:,}: {a_layer:.3g} a layer", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * layers * experts)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title("a  experts on the device")


def _stated(study: Study) -> str:
    return f"{study.slots['stated']} in every layer"


def _sizes_gb(study: Study) -> list[float]:
    expert_gb = study.facts["expert_bytes"] / 1e9
    return [slots * study.facts["num_moe_layers"] * expert_gb for slots in study.slot_choices()]


def _note(axes: Axes, x: float, y: float, text: str, side: str) -> None:
    axes.annotate(
        text, (x, y), xytext=(0, 3), textcoords="offset points", ha=side, va="bottom",
        color=FAINT, fontsize=7,
    )  # fmt: skip
