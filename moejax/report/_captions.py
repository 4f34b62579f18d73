"""What each figure shows, in words that stand on their own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ._data import ReportData
from ._published import PUBLISHED_ERROR_RATIO, PUBLISHED_SOURCE, published_points
from ._wording import num_runs, provenance_in_short, routing


def caption(name: str, data: ReportData) -> str:
    """The caption of a figure: what it shows, then what it rests on."""
    return f"{_SHOWS[name](data)} {_RESTS_ON.get(name, provenance_in_short)(data)}"


def title(name: str) -> str:
    """The heading of a figure's section."""
    return _TITLES[name]


def _overview(data: ReportData) -> str:
    return (
        "What each strategy costs and gives, means over runs. Shorter is better except for the "
        "hit ratio."
    )


def _latency(data: ReportData) -> str:
    panels = ", a panel a dispatch" if len(data.run.dispatches) > 1 else ""
    return (
        f"Mean latency of one decode step against batch size, log axes{panels}; error bars are 1 "
        f"standard deviation over {_draws(data)}. Points are set apart sideways to stay visible."
    )


def _speedup(data: ReportData) -> str:
    return (
        f"Mean step latency of `{data.baseline}` divided by that of the strategy, over the same "
        "draws of requests; error bars are the 95 % bootstrap interval."
    )


def _hit_rate(data: ReportData) -> str:
    return (
        "Share of demanded experts that were resident when demanded; late prefetches do not "
        "count. Error bars are 1 standard deviation over runs. Hit ratio is not speed."
    )


def _hit_curve(data: ReportData) -> str:
    shown = (
        "Hit ratio against slots per layer, without prefetches. Warm: the first demand of an "
        "expert is not counted as a miss while a slot is free, as in the published curves."
    )
    if "top_k" in data.run.hit_curve:
        shown += " `top_k` pins at most half of a layer's experts and is flat from there on."
    if published_points(data.run.model["name"]):
        shown += (
            f" Hollow markers are published points ({PUBLISHED_SOURCE}, "
            f"±{PUBLISHED_ERROR_RATIO:g})."
        )
    return shown


def _stall_breakdown(data: ReportData) -> str:
    return (
        "Where a mean step goes: computing while the link is idle, computing while a transfer "
        "hides behind it, and waiting for a transfer. The number is the whole step. Scales "
        "differ between panels."
    )


def _tail(data: ReportData) -> str:
    return (
        "(a) Percentiles over the steps of a run, averaged over runs. (b) 99th percentile against "
        "batch size. (c) Standard deviation over steps divided by the mean."
    )


def _scalability(data: ReportData) -> str:
    return (
        "(a) Step latency. (b) Tokens per second: batch size / step latency. (c) Hit ratio per GB "
        "of device memory for experts. (d) Experts fetched per step, demand and prefetch."
    )


def _memory(data: ReportData) -> str:
    return (
        "Most device memory that a strategy's experts take, from the smallest to the largest "
        "batch size: resident experts and those that pass through. Dense weights and KV cache "
        "come on top and are the same for all."
    )


def _pareto(what: str) -> Callable[[ReportData], str]:
    def shown(data: ReportData) -> str:
        bound = " `oracle` knows the future and cannot be built." if _has_oracle(data) else ""
        return (
            f"{what} Filled markers are on the front (grey line): no other strategy is at least "
            f"as good in both. Costs that agree in three digits count as equal.{bound}"
        )

    return shown


def _tiers(data: ReportData) -> str:
    return (
        "Experts of each layer by the fastest memory tier that holds them. The device copies from "
        "pinned host memory directly, from pageable memory more slowly."
    )


def _claims_budget(data: ReportData) -> str:
    return (
        "(a) Experts on the device by reading of the claims. (b) Hit ratio with so many slots in "
        "every layer, and as claimed: the claimed memory gives the triangles."
    )


def _claims_oracle(data: ReportData) -> str:
    return (
        "Speedup over `on_demand` against the slots' memory, equal in every layer, and as claimed "
        "(hollow). A prefetcher that keeps nothing can hide no more than the compute of a step: at "
        "most 1 + compute / stall, the lower dashed line."
    )


def _claims_batch(data: ReportData) -> str:
    return (
        "(a) Latency at larger batches over that at batch 1: claimed (thin line), ours one request "
        "after another (grey), ours in lockstep (strategies). (b) Throughput likewise, in "
        "lockstep; the claimed latency and the claimed throughput exclude each other."
    )


def _claims_memory(data: ReportData) -> str:
    return (
        "Device memory for experts, log axis: as claimed, and with the slots that the claimed hit "
        "rates take. What is left on a card is without dense weights, KV cache and workspace."
    )


def _sizes(data: ReportData) -> str:
    return (
        "Mean step against the most device memory that a strategy's experts take, both log; a "
        "point a cache size, all strategies with the same slots. `on_demand` keeps nothing, so it "
        "is one point; `top_k` pins at most half of a layer."
    )


def _cards(data: ReportData) -> str:
    return (
        "Tokens per second of all requests together, with as many experts on each card as fit; "
        "log axis. Cards from the least memory to the most."
    )


def _hybrids(data: ReportData) -> str:
    return (
        "Change of the mean step by wrapping a strategy, beside the best of its parts on the same "
        "draws; left of the line is faster. Hollow: on a cautious host, which slows copies and "
        "computes slowly."
    )


def _has_oracle(data: ReportData) -> bool:
    return "oracle" in data.run.strategies


def _draws(data: ReportData) -> str:
    runs = num_runs(data)
    return f"{runs} runs (draws of requests)" if runs > 1 else "runs (here one, so there are none)"


def _counted(data: ReportData) -> str:
    return f"Simulated counts {routing(data)}; no clock is involved."


def _planned(data: ReportData) -> str:
    return "Predicted by the tuner (`moejax tune-cache`) from hit curves and the cost model."


def _of_cards(data: ReportData) -> str:
    return f"Simulated {routing(data)}, with each card's own profile."


def _of_the_study(data: ReportData) -> str:
    settings = {} if data.run.study is None else data.run.study.settings
    return (
        f"Simulated: profile `{settings.get('hardware')}`, the study's geometry, workload "
        f"`{settings.get('workload')}` fitted to its claimed hit rates."
    )


_SHOWS: Mapping[str, Callable[[ReportData], str]] = MappingProxyType(
    {
        "overview": _overview,
        "latency": _latency,
        "speedup": _speedup,
        "hit_rate": _hit_rate,
        "hit_curve": _hit_curve,
        "stall_breakdown": _stall_breakdown,
        "tail": _tail,
        "scalability": _scalability,
        "memory": _memory,
        "pareto_memory": _pareto("Speedup against device memory at the smallest batch."),
        "pareto_complexity": _pareto(
            "Speedup at the smallest batch against the complexity score that the reference study "
            "gave its five strategies; the score is its opinion, the speedup is ours."
        ),
        "pareto_efficiency": _pareto("Hit ratio against device memory at the smallest batch."),
        "tiers": _tiers,
        "claims_budget": _claims_budget,
        "claims_oracle": _claims_oracle,
        "claims_batch": _claims_batch,
        "claims_memory": _claims_memory,
        "sizes": _sizes,
        "cards": _cards,
        "hybrids": _hybrids,
    }
)

_RESTS_ON: Mapping[str, Callable[[ReportData], str]] = MappingProxyType(
    {
        "hit_curve": _counted,
        "tiers": _planned,
        "claims_budget": _of_the_study,
        "claims_oracle": _of_the_study,
        "claims_batch": _of_the_study,
        "claims_memory": _of_the_study,
        "cards": _of_cards,
    }
)

_TITLES = MappingProxyType(
    {
        "overview": "Overview",
        "latency": "Latency",
        "speedup": "Speedup",
        "hit_rate": "Hit ratio",
        "hit_curve": "Hit ratio against capacity",
        "stall_breakdown": "Where the time goes",
        "tail": "Tail latency",
        "scalability": "Scalability",
        "memory": "Memory",
        "pareto_memory": "Trade-off: speed and memory",
        "pareto_complexity": "Trade-off: speed and complexity",
        "pareto_efficiency": "Trade-off: hits and memory",
        "tiers": "Tier sizes per layer",
        "claims_budget": "What the claimed memory really buys",
        "claims_oracle": "The oracle and the limit of prefetch",
        "claims_batch": "Batches: one after another, or in lockstep",
        "claims_memory": "Memory of the claimed hit rates",
        "sizes": "What memory buys",
        "cards": "Speed of six cards",
        "hybrids": "Hybrids beside their parts",
    }
)
