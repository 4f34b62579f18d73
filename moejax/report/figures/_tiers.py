"""Tier sizes per layer."""

import numpy as np
from matplotlib.figure import Figure

from .._data import NotDrawnError, ReportData
from .._palette import INK, TIER_COLOURS
from ._canvas import new_figure

_HATCHES = ("", "////", "....", "")


def tiers(data: ReportData) -> Figure:
    """Experts that each memory tier holds, stacked, a bar a layer.

    Raises:
      NotDrawnError: There is no plan beside the run.
    """
    plan = data.run.tiers
    if not plan:
        raise NotDrawnError("there is no plan; `moejax tune-cache -o json` makes one (plan.json)")
    heights = [(f"{tier.name} ({tier.memory})", tier.experts_per_layer) for tier in plan]
    num_experts = data.run.model.get("num_experts")
    if isinstance(num_experts, int):
        held = np.sum([experts for _, experts in heights], axis=0)
        heights.append(("store only", tuple(np.maximum(num_experts - held, 0))))
    figure = new_figure(3.0)
    axes = figure.subplots()
    layers = np.arange(len(plan[0].experts_per_layer))
    bottom = np.zeros(len(layers))
    for index, (label, experts) in enumerate(heights):
        if not np.any(experts):
            continue
        style = -1 if label == "store only" else min(index, len(TIER_COLOURS) - 2)
        axes.bar(
            layers,
            experts,
            bottom=bottom,
            width=0.86,
            label=label,
            color=TIER_COLOURS[style],
            hatch=_HATCHES[style],
            edgecolor=INK if style == -1 else "white",
            linewidth=0.3,
        )
        bottom += experts
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("experts")
    figure.legend(loc="outside lower center", ncols=4)
    return figure
