"""Figures of the report on the small models, drawn from its results.json."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from moejax.report._palette import FAINT, GRID, INK, LOOKS
from moejax.report.figures import STYLE
from moejax.report.figures._canvas import new_figure

PNG_DOTS_PER_INCH = 160
MODEL_COLOURS = {"tiny-moe": LOOKS["multi_look"].colour, "small-moe": LOOKS["intelligent"].colour}
AHEAD_LOOKS = {"1": ("o", "-"), "2": ("s", (0, (4, 1))), "3": ("^", (0, (1, 1)))}


def draw_all(results: dict[str, Any], folder: Path) -> None:
    """Writes every figure as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with style.context(dict(STYLE), after_reset=True):
        for name, draw in FIGURES.items():
            figure = draw(results)
            words = {"png": {"Software": None}, "svg": {"Date": None}}
            for kind, metadata in words.items():
                figure.savefig(folder / f"{name}.{kind}", dpi=PNG_DOTS_PER_INCH, metadata=metadata)


def loss(results: dict[str, Any]) -> Figure:
    """Training and held-out loss of both models over their steps."""
    figure = new_figure(2.7)
    panels = figure.subplots(1, 2)
    titles = zip("ab", results["training"].items(), panels, strict=True)
    for letter, (name, log), axes in titles:
        curve, heldout = log["curve"], log["heldout"]
        axes.plot(curve["step"], curve["loss"], color=FAINT, linewidth=0.8, label="training")
        steps = [line["step"] for line in heldout]
        values = [line["loss"]["all"] for line in heldout]
        axes.plot(
            steps, values, "o-", color=MODEL_COLOURS[name], label="held out, all domains", zorder=3
        )
        unit = "byte" if name == "tiny-moe" else "token"
        axes.set_yscale("log")
        ticks = [0.8, 1, 1.5, 2, 3, 4] if unit == "byte" else [1.5, 2, 3, 4, 6, 9]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{letter}  {name}")
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss (nats a {unit})")
        axes.legend()
    return figure


def hits(results: dict[str, Any]) -> Figure:
    """Hit ratio against slots per layer: small-moe, and Qwen1.5-MoE as published."""
    figure = new_figure(2.9)
    axes = figure.subplots()
    small = results["routing"]["small-moe"]
    published = results["published"]["hit_ratio_warm"]
    for name, label in (("oracle", "Belady"), ("lru", "LRU")):
        found = small[f"{name}_hit_ratio_warm"]
        look = LOOKS[name]
        axes.plot(
            [int(slots) for slots in found],
            list(found.values()),
            color=look.colour,
            linestyle="-" if name == "lru" else "--",
            label=f"{label}, small-moe",
        )
        axes.plot(
            [int(slots) for slots in published[name]],
            list(published[name].values()),
            look.marker,
            color=look.colour,
            label=f"{label}, Qwen1.5-MoE as published",
        )
    axes.plot([0, 60], [0, 1], color=FAINT, linewidth=0.8, label="routing at random")
    axes.set(xlim=(0, 60), ylim=(0, 1))
    axes.set_xlabel("slots per layer, of 60 experts")
    axes.set_ylabel("hit ratio, first touches forgiven")
    axes.legend(loc="lower right")
    return figure


def layers(results: dict[str, Any]) -> Figure:
    """What foretells small-moe's experts, and how often they stay, layer by layer."""
    figure = new_figure(2.9)
    ahead_axes, reuse_axes = figure.subplots(1, 2, width_ratios=(1.3, 1))
    small = results["routing"]["small-moe"]
    colour = MODEL_COLOURS["small-moe"]
    chance = small["reuse_chance_ratio"]
    for ahead, recalls in small["per_layer_lookahead_recall_ratio"].items():
        marker, line = AHEAD_LOOKS[ahead]
        plural = "" if ahead == "1" else "s"
        ahead_axes.plot(
            range(int(ahead), int(ahead) + len(recalls)),
            recalls,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=3,
            linewidth=1,
            label=f"its gate, {ahead} layer{plural} before",
        )
    recalls = small["per_layer_next_layer_recall_ratio"]
    ahead_axes.plot(
        range(1, 1 + len(recalls)),
        recalls,
        "D-",
        color=LOOKS["lru"].colour,
        markersize=3,
        linewidth=1,
        label="experts of the layer below",
    )
    ahead_axes.set_title("a  experts foretold")
    ahead_axes.set_ylabel("recall, best 4 of 60")
    reuse = small["per_layer_reuse_ratio"]
    reuse_axes.plot(range(len(reuse)), reuse, "o-", color=colour, markersize=3, label="small-moe")
    low, high = results["published"]["reuse_ratio"]
    reuse_axes.axhspan(low, high, color=GRID, label="Qwen1.5-MoE, mean of layers")
    reuse_axes.set_title("b  experts used again by the next token")
    reuse_axes.set_ylabel("reuse")
    for axes in (ahead_axes, reuse_axes):
        axes.axhline(chance, color=FAINT, linewidth=0.8, label="at random")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=6.5)
    ahead_axes.set_ylim(0, 1.38)
    ahead_axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ahead_axes.legend(fontsize=6.5, loc="upper center", ncols=2, handlelength=2)
    reuse_axes.set_ylim(0, 0.45)
    reuse_axes.legend(fontsize=6.5, loc="upper left")
    return figure


def domains(results: dict[str, Any]) -> Figure:
    """Distance between domains' routing, for both models."""
    figure = new_figure(3.6)
    panels = figure.subplots(1, 2)
    for letter, axes, (name, recording) in zip(
        "ab", panels, results["recording"].items(), strict=True
    ):
        _draw_distance(axes, recording["domains"]["distance"])
        axes.set_title(f"{letter}  {name}")
    return figure


def _draw_distance(axes: Axes, distance: dict[str, dict[str, float]]) -> None:
    values = np.array([list(row.values()) for row in distance.values()])
    axes.imshow(values, cmap="Purples", vmin=0, vmax=1)
    axes.grid(visible=False)
    names = list(distance)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=6.5)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        axes.text(
            column,
            row,
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=5.5,
            color="white" if value > 0.55 else INK,
        )


FIGURES = {"loss": loss, "hits": hits, "layers": layers, "domains": domains}
